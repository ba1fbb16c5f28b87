"""The evaluation: every trial under every system, one record each, in the order in which the memory grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console

from longmem.console import item_progress, token_progress
from longmem.evaluation.distance.asking import ask
from longmem.evaluation.distance.haystack import (
    Haystack,
    Trial,
    plan_trials,
    read_haystack,
    replaced_windows,
    validate_sizes,
    windows_of_depths,
)
from longmem.evaluation.distance.longeval import Prompt, read_longeval, tokens_and_distance
from longmem.evaluation.distance.memory import HaystackMemory
from longmem.evaluation.distance.settings import DistanceSettings
from longmem.evaluation.runs import RunFolder, describe, digest, spread
from longmem.evaluation.runs.folder import timed
from longmem.evaluation.systems import BackboneSystem, Banks, GivenMemory, System, make_systems
from longmem.model.modeling import LongMemForCausalLM

MEMORY_SYSTEMS = ("off", "on", "wrong")
QUARTERS = 4  # LongEval's facts lie anywhere; the figure has a row for each quarter of the record


class Evaluated(NamedTuple):
    """All that could be asked, of which a limit takes some: trials in the haystack, and LongEval's prompts."""

    haystack: Haystack | None
    trials: list[Trial]
    prompts: list[Prompt]


def evaluate_distance(settings: DistanceSettings, model: LongMemForCausalLM, console: Console) -> RunFolder:
    """Ask everything that the folder of the run does not have yet, and return the folder.

    Raises:
        ValueError: settings do not fit the model or the texts, or the folder holds another run.
    """
    asked = plan(settings, model)
    data = {
        "haystack": None if asked.haystack is None else digest(asked.haystack.token_ids),
        "asked": digest([*map(dataclasses.asdict, asked.trials), *map(dataclasses.asdict, asked.prompts)]),
    }
    config = describe(settings, model, data)
    del config["settings"]["bank_folder"]  # it changes no number
    run = RunFolder(settings.output, config)
    with run:
        if asked.haystack is not None:
            run_haystack(settings, model, asked.haystack, asked.trials, run, console)
        run_longeval(settings, model, asked.prompts, run, console)
    return run


def plan(settings: DistanceSettings, model: LongMemForCausalLM) -> Evaluated:
    """Return all trials and prompts of the tasks.

    Raises:
        ValueError: sizes or facts do not fit the model or the haystack, or LongEval's files are missing or others.
    """
    haystack, trials, prompts = None, [], []
    if settings.haystack_tasks:
        validate_sizes(settings, model)
        ids = read_haystack(model.tokenizer, settings.haystack, max(settings.sizes))
        haystack = Haystack(ids, model.config.segment_length)
        for task in settings.haystack_tasks:
            trials += plan_trials(settings, haystack, model.tokenizer, task)
    for task in settings.longeval_tasks:
        prompts += read_longeval(str(settings.longeval), task, settings.num_choices, settings.seed)
    return Evaluated(haystack, trials, prompts)


# Haystack ----------------------------------------------------------------------------------------------------------


def run_haystack(
    settings: DistanceSettings,
    model: LongMemForCausalLM,
    haystack: Haystack,
    trials: Sequence[Trial],
    run: RunFolder,
    console: Console,
) -> None:
    """Ask about the facts in the haystack, the smallest memory first: the larger ones go on from it."""
    waiting = []
    for task in settings.haystack_tasks:
        own = [trial for trial in trials if trial.task == task]
        chosen = [own[number] for number in spread(len(own), settings.limit)]
        waiting += [trial for trial in chosen if trial.trial_id not in run]
    if not waiting:
        return
    systems = haystack_systems(settings, model)
    memory = None
    if any(system.name in ("on", "wrong") for system in systems):
        places = {
            window
            for size in settings.sizes
            for window in windows_of_depths(settings, size, haystack.window_length).values()
        }
        memory = HaystackMemory(
            model,
            haystack,
            sizes=settings.sizes,
            replaceable=places,
            folder=settings.bank_folder,
            index=settings.index,
            storage_dtype=settings.storage_dtype,
        )
    try:
        for size in sorted(settings.sizes):
            own = [trial for trial in waiting if trial.size == size]
            if not own:
                continue
            if memory is not None:
                with token_progress(f"encoding {size:,} tokens", console) as report:
                    memory.encode(size, report)
            with item_progress(f"facts in {size:,} tokens", console) as report:
                for number, trial in enumerate(own, start=1):
                    run.write([ask_trial(settings, haystack, memory, systems, trial, trials)])
                    report(number, len(own))
    finally:
        if memory is not None:
            memory.bank.close()


def haystack_systems(settings: DistanceSettings, model: LongMemForCausalLM) -> list[System]:
    """Return the systems in their order; those of LongMem are given their memory."""
    options: dict[str, Any] = {"window": settings.window, "batch_size": settings.batch_size}
    others = [name for name in settings.systems if name not in MEMORY_SYSTEMS]
    made = {system.name: system for system in (make_systems(others, model, **options) if others else ())}
    return [made.get(name) or GivenMemory(name, model, **options) for name in settings.systems]


def ask_trial(
    settings: DistanceSettings,
    haystack: Haystack,
    memory: HaystackMemory | None,
    systems: Sequence[System],
    trial: Trial,
    trials: Sequence[Trial],
) -> dict[str, Any]:
    """Return the record of one trial."""
    replaced = replaced_windows(trial, trials, settings.needles == "together")
    answers = {}
    encoding: dict[str, float] = {}
    for system in systems:
        if isinstance(system, GivenMemory):
            if memory is not None and system.name != "off":
                with timed(encoding, "window"):
                    system.memory = memory.read(trial.size, replaced if system.name == "on" else None)
        elif not isinstance(system, BackboneSystem) or system.local_tokens:
            system.read(haystack.windows(trial.size, replaced))
        answers[system.name] = ask(system, trial.fact.question, trial.fact.values, max_new_tokens=new_tokens(settings))
    return {
        "id": trial.trial_id,
        "task": trial.task,
        "part": f"{trial.size:,}",
        "depth": trial.depth,
        "size": trial.size,
        "distance": trial.distance,
        "question": trial.fact.question,
        "values": trial.fact.values,
        "right": trial.fact.right,
        "encoding_seconds": round(encoding.get("window", 0.0), 3),
        "systems": answers,
    }


# LongEval ----------------------------------------------------------------------------------------------------------


def run_longeval(
    settings: DistanceSettings,
    model: LongMemForCausalLM,
    prompts: Sequence[Prompt],
    run: RunFolder,
    console: Console,
) -> None:
    """Ask about the records of LongEval: all of the record is the stream, and a wrong memory is the next record."""
    waiting = []
    for task in settings.longeval_tasks:
        own_prompts = [prompt for prompt in prompts if prompt.task == task]
        pairs = list(zip(own_prompts, [*own_prompts[1:], own_prompts[0]], strict=True))
        chosen = [pairs[number] for number in spread(len(pairs), settings.limit)]
        waiting += [(prompt, other) for prompt, other in chosen if prompt.trial_id not in run]
    if not waiting:
        return
    banks = Banks(model, index=settings.index, storage_dtype=settings.storage_dtype)
    systems = make_systems(settings.systems, model, window=settings.window, batch_size=settings.batch_size, banks=banks)
    with item_progress("prompts of LongEval", console) as report:
        for number, (prompt, other) in enumerate(waiting, start=1):
            record, distance = tokens_and_distance(model, prompt)
            instead, _ = tokens_and_distance(model, other)
            answers = {}
            for system in systems:
                system.read([record], instead=[instead])
                answers[system.name] = ask(
                    system,
                    prompt.question,
                    prompt.values,
                    before_value=prompt.before_value,
                    max_new_tokens=new_tokens(settings),
                )
            run.write(
                [
                    {
                        "id": prompt.trial_id,
                        "task": prompt.task,
                        "part": prompt.file,
                        "depth": f"{round(QUARTERS * distance / len(record)) / QUARTERS:g}",
                        "size": len(record),
                        "distance": distance,
                        "question": prompt.question,
                        "values": prompt.values,
                        "right": prompt.right,
                        "systems": answers,
                    }
                ]
            )
            report(number, len(waiting))


def new_tokens(settings: DistanceSettings) -> int | None:
    """Return how many tokens an answer may have, None where none is written."""
    return settings.max_new_tokens if settings.generate else None
