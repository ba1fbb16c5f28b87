"""The evaluations by name, listed without importing any of them."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longmem.errors import name_known
from longmem.plugins import PLUGINS, find, import_plugins_of_packages

if TYPE_CHECKING:
    from rich.console import Console

    from longmem.evaluation.runner import Finished

CONFIGS = Path(__file__).parent / "configs"


class Entry(NamedTuple):
    """Where a task is in `longmem.evaluation`, as "module:Class", and what it asks, in one line."""

    place: str
    summary: str


TASKS = {
    "perplexity": Entry("perplexity:Perplexity", "perplexity of long texts, by length and distance of what is needed"),
    "perplexity-books": Entry(
        "perplexity:PerplexityOfBooks", "perplexity of one stretch of each book, beside longer windows"
    ),
    "chapterbreak": Entry("tasks.chapterbreak:ChapterBreak", "which passage begins the next chapter (ChapterBreak)"),
    "in-context": Entry("tasks.labelled:Labelled", "labels of texts after thousands of demonstrations (SST-2, ...)"),
    "squad": Entry("tasks.squad:Squad", "questions about passages after demonstrations (SQuAD v1.1)"),
    "quality": Entry("tasks.quality:Quality", "multiple choice on stories and articles (QuALITY)"),
    "recall": Entry("tasks.facts:Facts", "a fact far back in a text, by size of memory and distance"),
    "notes": Entry("tasks.notes:Notes", "questions about notes in memory, in the chat format"),
    "longeval": Entry("tasks.longeval:LongEval", "a fact in a long record of lines or topics (LongEval)"),
    "dated": Entry("tasks.dated:Dated", "facts of dated texts that are newer than the model, and which text was read"),
    "harness": Entry("harness.task:Harness", "any task of lm-evaluation-harness"),
    "locomo": Entry("tasks.locomo:Locomo", "written answers about months of conversation (LoCoMo)"),
}


def known_tasks() -> dict[str, str]:
    """Return the names of all evaluations, with what each asks; those that other packages register come last."""
    import_plugins_of_packages()
    registered = {name: (kind.__doc__ or "").partition("\n")[0] for name, kind in PLUGINS["task"].items()}
    return {name: entry.summary for name, entry in TASKS.items()} | registered


def refuse_unknown_task(name: str) -> None:
    """Raise ValueError unless an evaluation has this name."""
    if name not in TASKS and name not in (known := known_tasks()):
        raise ValueError(f"`task` must be a known evaluation, got {name!r}; {name_known(name, known, limit=20)}")


def task_class(name: str) -> Any:
    """Return the class of a task. Raises ValueError for a name that is not known."""
    refuse_unknown_task(name)
    if name not in TASKS:
        return find("task", name)
    module, _, kind = TASKS[name].place.partition(":")
    return getattr(importlib.import_module(f"longmem.evaluation.{module}"), kind)


def default_settings(name: str) -> Path | None:
    """Return the YAML file with the default settings of a task, None for one of another package: its class has them."""
    return CONFIGS / f"{name}.yaml" if name in TASKS else None


def run_task(
    name: str, overrides: Sequence[str] = (), console: "Console | None" = None, file: str | Path | None = None
) -> "Finished":
    """Run an evaluation to its end, or go on with a stopped one; return folder, title and metrics.

    Settings come from a YAML file, by default the task's own, and from overrides, each `name=value` with the value in YAML.
    Tables are shown and written; figures are another layer's: `longmem.plots.plot_finished(finished)`. Raises ValueError if a
    setting is wrong, or settings, model and data do not go together.
    """
    from longmem.console import SafeConsole
    from longmem.evaluation.runner import evaluate
    from longmem.evaluation.settings import load_evaluation
    from longmem.evaluation.task import Task

    kind, console = task_class(name), SafeConsole() if console is None else console
    settings = load_evaluation(kind.kind, default_settings(name) if file is None else file, overrides)
    if issubclass(kind, Task):
        return evaluate(kind(settings), console)
    return kind(settings).run(console)  # it has a loop of its own
