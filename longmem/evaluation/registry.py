"""The evaluations by name, listed without importing any of them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longmem.errors import name_known

if TYPE_CHECKING:
    from rich.console import Console

    from longmem.evaluation.runner import Finished

CONFIGS = Path(__file__).parent / "configs"


class Entry(NamedTuple):
    """Where a task is, as "module:Class", and what it asks, in one line."""

    place: str
    summary: str


TASKS = {
    "perplexity": Entry(
        "longmem.evaluation.perplexity:Perplexity",
        "perplexity of long texts, by length and by distance of what is needed",
    ),
    "perplexity-books": Entry(
        "longmem.evaluation.perplexity:PerplexityOfBooks",
        "perplexity of one stretch of each book, beside longer windows",
    ),
    "chapterbreak": Entry(
        "longmem.evaluation.tasks.chapterbreak:ChapterBreak", "which passage begins the next chapter (ChapterBreak)"
    ),
    "in-context": Entry(
        "longmem.evaluation.tasks.labelled:Labelled",
        "labels of texts after thousands of demonstrations (SST-2, MR, ...)",
    ),
    "squad": Entry(
        "longmem.evaluation.tasks.squad:Squad", "questions about passages after demonstrations (SQuAD v1.1)"
    ),
    "quality": Entry("longmem.evaluation.tasks.quality:Quality", "multiple choice on stories and articles (QuALITY)"),
    "recall": Entry(
        "longmem.evaluation.tasks.facts:Facts", "a fact far back in a text, by size of memory and distance"
    ),
    "longeval": Entry(
        "longmem.evaluation.tasks.longeval:LongEval", "a fact in a long record of lines or topics (LongEval)"
    ),
    "harness": Entry("longmem.evaluation.harness.task:Harness", "any task of lm-evaluation-harness"),
    "locomo": Entry("longmem.evaluation.tasks.locomo:Locomo", "written answers about months of conversation (LoCoMo)"),
}


def task_class(name: str) -> Any:
    """Return the class of a task. Raises ValueError for a name that is not known."""
    if name not in TASKS:
        raise ValueError(f"`task` must be a known evaluation, got {name!r}; {name_known(name, TASKS)}")
    module, _, kind = TASKS[name].place.partition(":")
    return getattr(importlib.import_module(module), kind)


def default_settings(name: str) -> Path:
    """Return the YAML file with the default settings of a task."""
    return CONFIGS / f"{name}.yaml"


def run_task(
    name: str, overrides: Sequence[str] = (), console: Console | None = None, file: str | Path | None = None
) -> Finished:
    """Run an evaluation to its end, or go on with a stopped one; return folder, title and metrics.

    Tables are shown on the console and written to the folder. The figures are another layer's:
    `longmem.plots.plot_finished(finished)`.

    Args:
        name: of a task.
        overrides: settings, each `name=value` with the value in YAML.
        console: default: a new one.
        file: YAML file of settings; default: the task's own.

    Raises:
        ValueError: a setting is wrong, or settings, model and data do not go together.
    """
    from rich.console import Console

    from longmem.evaluation.runner import evaluate
    from longmem.evaluation.settings import load_evaluation
    from longmem.evaluation.task import Task

    kind, console = task_class(name), Console() if console is None else console
    settings = load_evaluation(kind.kind, default_settings(name) if file is None else file, overrides)
    if issubclass(kind, Task):
        return evaluate(kind(settings), console)
    return kind(settings).run(console)  # it has a loop of its own
