"""The one loop of all evaluations: every case, every system, every question that the folder does not have yet."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from longmem.console import PlainTable, item_progress
from longmem.evaluation.folder import RunFolder, describe
from longmem.evaluation.settings import open_evaluated
from longmem.evaluation.summary import summarize
from longmem.evaluation.systems import Banks, Question, System, make_systems, title_of_system
from longmem.evaluation.systems.system import text_before
from longmem.evaluation.tables import markdown, tables_of
from longmem.evaluation.task import Case, Item, Task
from longmem.model.modeling import LongMemForCausalLM


class Finished(NamedTuple):
    """A run that came to its end: where it is, what it is called, what it says."""

    folder: Path
    title: str
    metrics: dict[str, Any]


def evaluate(task: Task, console: Console, model: LongMemForCausalLM | None = None) -> Finished:
    """Ask what is missing, write the whole result folder and show brief tables; the figure is drawn by who calls.

    Raises ValueError if settings, model and data do not go together, or the folder holds another run. Without a model the one
    that the settings name is opened.
    """
    model = open_evaluated(task.settings) if model is None else model
    cases = task.cases(model)
    wrong = wrong_cases(task, cases)
    config = describe(task.settings, model, task.identity(cases), may_change=task.may_change)
    with RunFolder(task.settings.output, {"task": task.name, **config}) as run:
        if not task.ask(model, run, console):
            ask_all(task, model, cases, wrong, run, console)
        metrics = summarize(task, run.records)
        run.finish(title=task.run_title, metrics=metrics, table=markdown(metrics), seed=task.settings.seed)
    for heading, rows in tables_of(metrics, brief=True):
        console.print(f"\n{heading}", PlainTable(rows, emphasized=title_of_system("on")), markup=False)
    console.print(*metrics["notes"], sep="\n\n", markup=False)
    return Finished(run.path, task.run_title, metrics)


def wrong_cases(task: Task, cases: Sequence[Case]) -> dict[str, Case | None]:
    """Return the case in the wrong memory of each that needs one, by name."""
    return {case.name: task.wrong(case, cases) for case in cases if case.items and "wrong" in asked_systems(task, case)}


def asked_systems(task: Task, case: Case) -> Sequence[str]:
    """Return the names of the systems that are asked about a case."""
    return task.settings.systems if case.systems is None else case.systems


def record_id(case: Case, item: Item | None, system: str) -> str:
    """Return the id of an answer or, without an item, of the preparation for all answers."""
    return "/".join(filter(None, (case.name, "" if item is None else item.name, system)))


def ask_all(
    task: Task,
    model: LongMemForCausalLM,
    cases: Sequence[Case],
    wrong: Mapping[str, Case | None],
    run: RunFolder,
    console: Console,
) -> None:
    """Write a record for every case, item and system; those in the folder are not asked again.

    A record has `seconds` of answering; `preparing_seconds` and `encoded_tokens` are a question's share of what its case
    cost. LongMem's systems share banks, so the one that first needs a memory pays for it.
    """
    jobs: list[tuple[Case, str, list[Item]]] = []
    for case in cases:
        run.write(record for record in guessed(case) if record["id"] not in run)
        for name in asked_systems(task, case):
            left = [item for item in case.items if record_id(case, item, name) not in run]
            jobs += [(case, name, left)] * bool(left)
    if not jobs:
        return
    try:
        banks, settings = task.banks(model), task.settings
        options = {"window": settings.window, "batch_size": settings.batch_size, "retrieval": task.retrieval}
        systems = {system.name: system for system in make_systems(settings.systems, model, banks=banks, **options)}
        for stage, group in itertools.groupby(jobs, key=lambda job: job[0].stage):
            own = list(group)
            task.begin(list({case.name: case for case, _, _ in own}.values()), console)
            total, done = sum(len(items) for _, _, items in own), 0
            with item_progress(stage, console) as report:
                for case, name, items in own:
                    other = wrong.get(case.name) if name == "wrong" else None
                    for records in ask(task, systems[name], case, items, other, banks):
                        run.write(record for record in records if record["id"] not in run)
                        done += sum("item" in record for record in records)
                        report(done, total)
    finally:
        task.close()


def described(case: Case, item: Item) -> dict[str, Any]:
    """Return what a record says of what was asked."""
    name = "/".join(filter(None, (case.subject or case.name, item.name)))
    return {"case": case.name, "item": name, "group": case.group, **case.axes, **item.about}


def guessed(case: Case) -> Iterator[dict[str, Any]]:
    """Yield the records of what guesses without a model."""
    for item in case.items:
        for name, fields in item.guesses.items():
            yield {"id": record_id(case, item, name), "system": name, **described(case, item), **fields}


def ask(
    task: Task, system: System, case: Case, items: Sequence[Item], wrong: Case | None, banks: Banks
) -> Iterator[list[dict[str, Any]]]:
    """Have a system read a case and yield the records of its answers, some at a time."""
    before, began = spent(system, banks), time.perf_counter()
    prepared = task.prepare(system, case, wrong)
    answering = system.answering_seconds - before["seconds"]  # such as for a calibration
    system.preparing_seconds = before["preparing_seconds"] + time.perf_counter() - began - answering

    def shares(count: int) -> dict[str, float]:
        nonlocal before
        earlier, before = before, spent(system, banks)
        return {name: (now - earlier[name]) / count for name, now in before.items()}

    if prepared:
        common = {"case": case.name, "system": system.name, **case.axes}
        yield [{"id": record_id(case, None, system.name), **common, **prepared, **shares(1)}]
    alike: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        alike.setdefault(tuple(task.prefix(system, case, item)), []).append(item)
    for prefix, own in alike.items():
        for start in range(0, len(own), task.asked_at_once):
            batch = own[start : start + task.asked_at_once]
            answers = answers_of(task, system, case, batch, prefix)
            costs = shares(len(batch))
            yield [
                {"id": record_id(case, item, system.name), "system": system.name}
                | {**described(case, item), **task.placed(system, case, item), **answer, **costs}
                for item, answer in zip(batch, answers, strict=True)
            ]


def spent(system: System, banks: Banks) -> dict[str, float]:
    """Return what a system has cost so far: seconds of answering and of preparing, tokens encoded."""
    seconds = {"seconds": system.answering_seconds, "preparing_seconds": system.preparing_seconds}
    return {**seconds, "encoded_tokens": banks.encoded_tokens}


def answers_of(
    task: Task, system: System, case: Case, items: Sequence[Item], prefix: Sequence[int]
) -> list[dict[str, Any]]:
    """Return what a system writes, and how likely it finds the candidates; all items have candidates, or none has."""
    found: list[dict[str, Any]] = [{} for _ in items]
    if case.max_new_tokens:
        written = system.generate([item.token_ids for item in items], prefix, max_new_tokens=case.max_new_tokens)
        for answer, ids in zip(found, written, strict=True):
            text = str(system.model.tokenizer.decode(ids, skip_special_tokens=True))
            answer["prediction"] = text_before(text, ("\n",))
    if items[0].candidates:
        scored = system.score([Question(item.token_ids, item.candidates) for item in items], prefix)
        for answer, likelihoods in zip(found, scored, strict=True):
            answer.update(task.answered(system.model, likelihoods))
    return found
