"""The tasks of a run: found by name, with local data where there is some."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from longmem.errors import did_you_mean
from longmem.evaluation.harness.settings import HarnessSettings
from longmem.evaluation.runs import digest, spread
from longmem.quiet import without_warnings_of

Tasks = dict[str, Any]  # lm-eval's tasks by name


def load_tasks(settings: HarnessSettings) -> tuple[TaskManager, Tasks]:
    """Return lm-eval's index of tasks, and those of a run by name; groups and tags are taken apart.

    Raises:
        ValueError: there is no folder, or no task of a name.
    """
    for name in ("include_path", "data"):
        folder = getattr(settings, name)
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"`{name}` must be a folder, got {folder!r}.")
    # lm-eval's own index takes seconds to read: only where it is needed.
    manager = TaskManager(include_path=settings.include_path, include_defaults=False)
    if not all(name in manager.all_tasks for name in settings.tasks):
        manager = TaskManager(include_path=settings.include_path)
    for name in settings.tasks:
        if name not in manager.all_tasks:
            raise ValueError(
                f"`tasks` must be tasks of lm-eval or of `include_path`, got {name!r}."
                f"{did_you_mean(name, manager.all_tasks)}"
            )
    with without_warnings_of("lm_eval"):
        return manager, manager.load([with_data(name, settings.data) for name in settings.tasks])["tasks"]


def with_data(task: str, folder: str | None) -> str | dict[str, Any]:
    """Return a task, with the file that a folder holds for it if there is one."""
    path = None if folder is None else Path(folder) / f"{task}.jsonl"
    if path is None or not path.is_file():
        return task
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path.resolve())}}}
    # lm-eval lets only the members of a group differ from what the task's file says.
    return {"group": f"{task} with data", "task": [{"task": task, **data}]}


def chosen_items(task: Any, limit: int | None) -> list[int]:
    """Return the numbers of the items that are asked."""
    return spread(len(task.eval_docs), limit)


def describe_tasks(tasks: Mapping[str, Any], limit: int | None) -> dict[str, str]:
    """Return a hash of what each task asks: its configuration, wherever its data lie, and the items."""
    found = {}
    for name, task in tasks.items():
        config = {
            key: str(value) for key, value in task.dump_config().items() if not key.startswith(("dataset_", "meta"))
        }
        items = [task.eval_docs[number] for number in chosen_items(task, limit)]
        found[name] = digest([config, str(items)])
    return found
