"""Running an experiment on staleness: what the folder of the run has is not done again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from rich.console import Console

from longmem.console import item_progress
from longmem.evaluation.runs import RunFolder
from longmem.evaluation.staleness.policies import draw_questions_about, run_system, write_library
from longmem.evaluation.staleness.readers import kept_model
from longmem.evaluation.staleness.settings import StalenessSettings
from longmem.evaluation.staleness.systems import SYSTEMS

MAY_CHANGE = ("output", "seeds")  # a finished run may be given more seeds


def evaluate_staleness(settings: StalenessSettings, console: Console) -> RunFolder:
    """Run what the folder of the run does not have yet, and return the folder.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    values = dataclasses.asdict(settings)
    run = RunFolder(settings.output, {name: value for name, value in values.items() if name not in MAY_CHANGE})
    with run:
        run_policies(settings, run, console)
    return run


def run_policies(settings: StalenessSettings, run: RunFolder, console: Console) -> None:
    """Write a record for every seed, regime, way of asking and system."""
    missing = [each for each in planned(settings) if record_id(*each) not in run]
    with item_progress("systems", console) as report:
        done = 0
        for (seed, asking), own in itertools.groupby(missing, key=lambda each: (each[0], each[2])):
            models = {
                name: kept_model(name, settings.task, settings.readers, seed, run.path / "models" / str(seed))
                for name in ("writer", *settings.regimes)
            }
            library, stream = draw_questions_about(settings.task, settings.library, asking, seed)
            written = write_library(models["writer"], library)
            for _, regime, _, name in own:
                answers = run_system(SYSTEMS[name], written, models[regime], library, stream, asking)
                found = {"id": record_id(seed, regime, asking, name), "seed": seed, "regime": regime, "asking": asking}
                run.write([{**found, "system": name, **answers}])
                done += 1
                report(done, len(missing))


def planned(settings: StalenessSettings) -> Iterator[tuple[int, str, str, str]]:
    """Yield (seed, regime, asking, system) of every record."""
    for seed in settings.seeds:
        for asking in settings.askings:
            for regime in settings.regimes:
                for system in settings.systems:
                    yield seed, regime, asking, system


def record_id(seed: int, regime: str, asking: str, system: str) -> str:
    """Return the id of a record in `predictions.jsonl`."""
    return f"{seed}/{regime}/{asking}/{system}"
