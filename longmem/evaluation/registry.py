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
    """Where a task is in `longmem.evaluation`, as "module:Class", and what it asks, in one line."""

    place: str
    summary: str


TASKS = {
    "chapterbreak": Entry("tasks.chapterbreak:ChapterBreak", "which passage begins the next chapter (ChapterBreak)"),
    "in-context": Entry(
        "tasks.labelled:Labelled", "labels of texts after thousands of demonstrations (SST-2, MR, ...)"
    ),
    "squad": Entry("tasks.squad:Squad", "questions about passages after demonstrations (SQuAD v1.1)"),
    "quality": Entry("tasks.quality:Quality", "multiple choice on stories and articles (QuALITY)"),
    "recall": Entry("tasks.facts:Facts", "a fact far back in a text, by size of memory and distance"),
    "longeval": Entry("tasks.longeval:LongEval", "a fact in a long record of lines or topics (LongEval)"),
    "harness": Entry("harness.task:Harness", "any task of lm-evaluation-harness"),
    "locomo": Entry("tasks.locomo:Locomo", "written answers about months of conversation (LoCoMo)"),
}


def task_class(name: str) -> Any:
    """Return the class of a task. Raises ValueError for a name that is not known."""
    if name not in TASKS:
        raise ValueError(f"`task` must be a known evaluation, got {name!r}; {name_known(name, TASKS)}")
    module, _, kind = TASKS[name].place.partition(":")
    return getattr(importlib.import_module(f"longmem.evaluation.{module}"), kind)


def default_settings(name: str) -> Path:
    """Return the YAML file with the default settings of a task."""
    return CONFIGS / f"{name}.yaml"


def run_task(
    name: str, overrides: Sequence[str] = (), console: Console | None = None, file: str | Path | None = None
) -> Finished:
    """Run an evaluation to its end, or go on with a stopped one; return folder, title and metrics.

    Tables are shown on the console and written to the folder. The figure is another layer's:
    `longmem.plots.plot_evaluation(finished.folder / "accuracy.png", finished.metrics, title=finished.title)`.

    Settings come from a YAML file, by default the task's own, and from overrides, each `name=value` with the value in YAML.

    Raises:
        ValueError: a setting is wrong, or settings, model and data do not go together.
    """
    from rich.console import Console

    from longmem.evaluation.runner import evaluate
    from longmem.evaluation.settings import load_evaluation

    kind = task_class(name)
    settings = load_evaluation(kind.kind, default_settings(name) if file is None else file, overrides)
    return evaluate(kind(settings), Console() if console is None else console)
