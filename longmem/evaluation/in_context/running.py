"""The run: for every seed, set and system, one preparation and then the items, written as they come."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from longmem.console import item_progress
from longmem.evaluation.in_context.placing import never_cut
from longmem.evaluation.in_context.sets import SETS
from longmem.evaluation.in_context.settings import InContextSettings
from longmem.evaluation.in_context.tasks import Task
from longmem.evaluation.runs import RunFolder
from longmem.evaluation.systems import Banks, make_systems
from longmem.model.modeling import LongMemForCausalLM


def ask_all(
    settings: InContextSettings,
    model: LongMemForCausalLM,
    tasks: Mapping[str, Task],
    folder: RunFolder,
    console: Console,
    banks: Banks | None = None,
) -> None:
    """Ask every item under every system and seed that the folder does not have.

    Args:
        settings: of the run.
        model: that is evaluated.
        tasks: by set (`make_tasks`).
        folder: gets a record for each preparation and each answer.
        console: where the progress is shown.
        banks: default: new ones. The wrong memory of one set is the right one of the next, so they are shared.
    """
    banks = Banks(model) if banks is None else banks
    systems = make_systems(settings.systems, model, window=settings.window, batch_size=settings.batch_size, banks=banks)
    never_cut(systems)
    turns = [(seed, task, system) for seed in settings.seeds for task in tasks.values() for system in systems]
    done, total = 0, sum(len(task.lines) for _, task, _ in turns)
    drawn = None
    with item_progress("demonstrations", console) as report:
        for seed, task, system in turns:
            missing = [n for n in range(len(task.lines)) if task.record_id(seed, system, n) not in folder]
            done += len(task.lines) - len(missing)
            report(done, total)
            prepared = task.record_id(seed, system)
            if not missing and prepared in folder:
                continue
            if drawn is None or drawn[:2] != (seed, task.name):
                drawn = seed, task.name, task.shots(seed, tasks.get(other_set(task.name, settings.sets) or ""))
            shots = drawn[2]
            common = {"set": task.name, "seed": seed, "system": system.name}
            record = task.prepare(system, shots)
            if prepared not in folder:
                folder.write([{"id": prepared, **common, **record}])
            for records in task.ask(system, shots, missing):
                folder.write({"id": task.record_id(seed, system, each["item"]), **common, **each} for each in records)
                done += len(records)
                report(done, total)


def other_set(name: str, sets: tuple[str, ...]) -> str | None:
    """Return the classification set whose demonstrations are the wrong memory of a set: the next; None where there is none.

    >>> other_set("mr", ("sst-2", "mr", "squad")), other_set("squad", ("sst-2", "squad")), other_set("mr", ("mr",))
    ('sst-2', 'sst-2', None)
    """
    labelled = [each for each in sets if each in SETS]
    if name not in labelled:
        return labelled[0] if labelled else None
    other = labelled[(labelled.index(name) + 1) % len(labelled)]
    return None if other == name else other


def wrong_memory_of(name: str, sets: tuple[str, ...]) -> str:
    """Return in words what the wrong memory of a set holds.

    >>> wrong_memory_of("mr", ("mr",))
    'its own demonstrations, labels shuffled among them'
    """
    other = other_set(name, sets)
    if other is not None:
        return f"as many demonstrations of {other}" if name in SETS else f"demonstrations of {other}"
    return f"its own demonstrations, {'labels' if name in SETS else 'answers'} shuffled among them"
