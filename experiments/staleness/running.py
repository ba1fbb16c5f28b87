"""Running an experiment on staleness: what the folder of the run has is not done again."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from experiments.staleness import accuracy_tables, policy_tables
from experiments.staleness.content import superseded_content
from experiments.staleness.decoupled import check_decoupled
from experiments.staleness.learning import SYSTEMS as LEARNING_SYSTEMS
from experiments.staleness.learning import learn
from experiments.staleness.policies import draw_questions_about, run_system, write_library
from experiments.staleness.readers import kept_model
from experiments.staleness.settings import Experiment, StalenessSettings
from experiments.staleness.systems import SYSTEMS
from longmem.console import Report, item_progress
from longmem.evaluation.folder import RunFolder
from longmem.evaluation.tables import markdown_table
from longmem.model.modeling import LongMemForCausalLM

MAY_CHANGE = ("output", "seeds")  # a finished run may be given more seeds
Sections = list[tuple[str, list[list[str]]]]


class Steps(NamedTuple):
    """How an experiment is run, summarized and shown."""

    title: str
    run: Callable[[StalenessSettings, RunFolder, Report], None]
    summarize: Callable[..., dict[str, Any]]
    sections: Callable[..., Sections]


def evaluate_staleness(settings: StalenessSettings, console: Console) -> RunFolder:
    """Run what the folder of the run does not have yet, and return the folder.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    values = dataclasses.asdict(settings)
    run = RunFolder(settings.output, {name: value for name, value in values.items() if name not in MAY_CHANGE})
    with run, item_progress(settings.experiment, console) as report:
        EXPERIMENTS[settings.experiment].run(settings, run, report)
    return run


def summarize_staleness(settings: StalenessSettings, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the metrics of an experiment: see `policy_tables` and `accuracy_tables`."""
    return EXPERIMENTS[settings.experiment].summarize(records, min(settings.seeds))


def sections(settings: StalenessSettings, metrics: Mapping[str, Any], *, intervals: bool = True) -> Sections:
    """Return headings and tables of an experiment; without intervals they fit a terminal."""
    return EXPERIMENTS[settings.experiment].sections(metrics, intervals=intervals)


def markdown(settings: StalenessSettings, metrics: Mapping[str, Any]) -> str:
    """Return all tables for `table.md`."""
    found = sections(settings, metrics)
    return "\n".join(f"**{heading}**\n\n{markdown_table(rows)}\n" for heading, rows in found)


def title_of(settings: StalenessSettings) -> str:
    """Return what an experiment is called."""
    return EXPERIMENTS[settings.experiment].title


# The experiments ---------------------------------------------------------------------------------------------------


def run_policies(settings: StalenessSettings, run: RunFolder, report: Report) -> None:
    """Write a record for every seed, regime, way of asking and system."""
    missing = [each for each in planned(settings) if policy_id(*each) not in run]
    done = 0
    for (seed, asking), own in itertools.groupby(missing, key=lambda each: (each[0], each[1])):
        models = {name: kept(settings, run, seed, name) for name in ("writer", *settings.regimes)}
        library, stream = draw_questions_about(settings.task, settings.library, asking, seed)
        written = write_library(models["writer"], library)
        for _, _, regime, name in own:
            answers = run_system(SYSTEMS[name], written, models[regime], library, stream, asking)
            place = {"id": policy_id(seed, asking, regime, name), "seed": seed, "regime": regime, "asking": asking}
            run.write([{**place, "system": name, **answers}])
            done += 1
            report(done, len(missing))


def planned(settings: StalenessSettings) -> Iterator[tuple[int, Any, Any, str]]:
    """Yield (seed, way of asking, regime, system) of every record of the policy table."""
    yield from itertools.product(settings.seeds, settings.askings, settings.regimes, settings.systems)


def policy_id(seed: int, asking: str, regime: str, system: str) -> str:
    """Return the id of a record of the policy table."""
    return f"{seed}/{regime}/{asking}/{system}"


def run_content(settings: StalenessSettings, run: RunFolder, report: Report) -> None:
    """Write a record for every seed and way to read superseded content."""
    for number, seed in enumerate(settings.seeds, start=1):
        if f"{seed}/no prior" not in run:
            rows = superseded_content(kept(settings, run, seed, "writer"), settings.task, seed)
            run.write(
                {
                    "id": f"{seed}/{row.name}",
                    "seed": seed,
                    "system": row.name,
                    "right": row.answers.tolist(),
                    "older": row.got_older.tolist(),
                    "seconds": row.seconds,
                }
                for row in rows
            )
        report(number, len(settings.seeds))


def run_learning(settings: StalenessSettings, run: RunFolder, report: Report) -> None:
    """Write a record for every seed and way to train, and one for what the reader's training does to old banks."""
    everything = list(itertools.product(settings.seeds, (accuracy_tables.DECOUPLED, *settings.learning_systems)))
    for number, (seed, name) in enumerate(everything, start=1):
        if f"{seed}/{name}" not in run:
            backbone: Any = kept(settings, run, seed, "writer").backbone
            start, found = time.process_time(), dict[str, Any]()
            if name == accuracy_tables.DECOUPLED:
                fresh = check_decoupled(seed, settings.decoupled_steps, settings.task, backbone)
                found = {
                    field: getattr(fresh, field) for field in ("same_encoder", "changed_numbers", "stored_numbers")
                }
                found |= {"losses": fresh.mean_losses, "steps": settings.decoupled_steps}
            else:
                result = learn(backbone, LEARNING_SYSTEMS[name], settings.learning, settings.task, seed)
                found = {"answers": {kind: right.tolist() for kind, right in result.answers.items()}}
                found |= {field: getattr(result, field).tolist() for field in ("curve", "losses")}
                found |= {field: getattr(result, field) for field in ("drift", "aged_drift")}
            found["seconds"] = time.process_time() - start
            run.write([{"id": f"{seed}/{name}", "seed": seed, "system": name, **found}])
        report(number, len(everything))


def kept(settings: StalenessSettings, run: RunFolder, seed: int, name: str) -> LongMemForCausalLM:
    """Return a model of a seed, from the folder of the run if it is there."""
    return kept_model(name, settings.task, settings.readers, seed, run.path / "models" / str(seed))


EXPERIMENTS: dict[Experiment, Steps] = {
    "policies": Steps(
        "What refresh policies cost and recover",
        run_policies,
        policy_tables.summarize_policies,
        policy_tables.policy_sections,
    ),
    "learning": Steps(
        "Learning beside a moving writer",
        run_learning,
        accuracy_tables.summarize_learning,
        accuracy_tables.learning_sections,
    ),
    "content": Steps(
        "Superseded content", run_content, accuracy_tables.summarize_content, accuracy_tables.content_sections
    ),
}
