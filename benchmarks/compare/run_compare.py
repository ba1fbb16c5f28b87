"""Ask many systems the same questions of many kinds of work, with one meter, in pieces that go on after a stop.

python benchmarks/compare/run_compare.py docs/results/comparison --trials 12
python benchmarks/compare/run_compare.py docs/results/comparison --trials 12 --data books=BOOKS locomo=locomo10.json
python benchmarks/compare/write_comparison.py docs/results/comparison docs/comparison.md

Each cell, a kind of work and a system, is a folder with what it depends on and a record for every question; without texts.
A cell whose system or questions have changed is refused, and the others go on; delete it, and it is asked anew.
Questions come in an order that a seed decides, so that more trials go on from fewer. `--cells` may give an order.

A text is fed once for many questions. Seconds are those of processors, so that a busy machine does not count for its waiting,
and of one question as if it were the only one: what stands before all questions in the window is run once, and its seconds
count for each of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from systems import SYSTEMS, TOKEN_BYTES, After, FullWindow, make, models_by_config
from work import WORK

from longmem.encoder.path import hash_tensors
from longmem.evaluation.folder import RunFolder, as_json, describe
from longmem.evaluation.runner import record_id
from longmem.evaluation.systems import Question, RetrievalSystem, System, answer_questions
from longmem.evaluation.systems.scoring import run_context
from longmem.evaluation.task import Case, Item, Task
from longmem.files import write_file
from longmem.settings.environment import environment

DEPENDS_ON_SIDE_NETWORK = ("on", "off")


class Meter:
    """Tokens run through a backbone and the highest memory above the start, while it is entered.

    The highest memory is that of the process where the system tells it (Linux), else 0.
    """

    def __init__(self, model: Any) -> None:
        self._model, self.tokens, self.peak = model, 0, 0

    def __enter__(self) -> Meter:
        self._handle = self._model.backbone.get_input_embeddings().register_forward_pre_hook(self._count)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._start = psutil.Process().memory_info().rss
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            highest = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
            self.peak = max(0, highest - self._start)

    def _count(self, module: Any, inputs: Any) -> None:
        self.tokens += inputs[0].numel()


def kept_bytes(system: System, local: Any) -> int:
    """Return the bytes that a system keeps of a text, `local` being what it runs in its window."""
    memory = getattr(local, "memory", None)
    if memory is not None:
        return sum({id(bank): bank.nbytes for bank, _ in memory.parts()}.values())
    if system.name == "off" or type(system) is FullWindow:
        return TOKEN_BYTES * min(len(system.stream), system.window)
    own = getattr(system, "kept_bytes", None)
    return TOKEN_BYTES * len(system.stream) if own is None else own


@torch.no_grad()
def ask_case(task: Task, system: System, case: Case, items: Sequence[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Have a system read a case; yield each item with what is made of its candidates, and what that cost.

    `feeding_seconds` and `fed_run` (tokens run) are those of reading the case, `seconds` and `tokens_run` of one question.
    Systems that look for passages have them anew for each question.
    """
    model, device, empty = system.model, system.model.input_device, getattr(case, "content_free", ())
    with Meter(model) as meter:
        began = time.process_time()
        system.read(case.memory, (), case.local_tokens)
        prefix = task.prefix(system, case, items[0])
        questions = [Question(item.token_ids, item.candidates) for item in (*empty, *items)]
        room = max(question.room for question in questions)
        local, context = system.begun(prefix, room, questions[-1:])
        feeding, fed_run, kept = time.process_time() - began, meter.tokens, kept_bytes(system, local)
        looks = isinstance(system, RetrievalSystem)
        start, run = time.process_time(), meter.tokens
        if not looks and len(context) > 1:
            local, context = After(local, run_context(local, context[:-1], device)), context[-1:]
        shared, shared_run = time.process_time() - start, meter.tokens - run
        found = []
        for question in questions:
            start, run = time.process_time(), meter.tokens
            if looks:
                local, context = system.begun(prefix, room, [question])
            alone = [Question((), question.candidates)]
            (answer,) = answer_questions(local, [*context, *question.token_ids], alone, device=device)
            costs = {"seconds": shared + time.process_time() - start, "tokens_run": shared_run + meter.tokens - run}
            found.append((answer, costs))
    common = {"feeding_seconds": feeding, "fed_run": fed_run, "fed_tokens": len(system.stream), "kept_bytes": kept}
    common["peak_bytes"] = meter.peak
    free = {"content_free": [[each.total for each in answer.candidates] for answer, _ in found[: len(empty)]]}
    for item, (answer, costs) in zip(items, found[len(empty) :], strict=True):
        likely = {"likeliest": str(model.tokenizer.decode([answer.likeliest])), **(free if empty else {})}
        yield item, {**task.answered(model, answer), **likely, **common, **costs}


def merged(cases: Sequence[Case]) -> list[Case]:
    """Return cases of which no two have the same text; questions of equal ones are asked together, each of its own group."""
    found: dict[Any, Case] = {}
    for case in cases:
        about = {"group": case.group, **case.axes}
        items = [
            dataclasses.replace(item, name=f"{case.name}/{item.name}", about={**about, **item.about})
            for item in case.items
        ]
        key = (tuple(map(tuple, case.memory)), case.local_tokens, tuple(case.prefix))
        known = found.get(key)
        found[key] = dataclasses.replace(known or case, items=[*(known.items if known else ()), *items])
    return list(found.values())


def in_turn(cases: list[Case], items_of_case: int, trials: int, seed: int) -> Iterator[Case]:
    """Yield cases with the first `trials` questions of an order that a seed decides, at most `items_of_case` of each."""
    draw = random.Random(seed)
    left = trials
    for case in draw.sample(cases, len(cases)):
        items = draw.sample(list(case.items), min(items_of_case, len(case.items)))
        if items and left > 0:
            yield dataclasses.replace(case, items=items[:left], max_new_tokens=0)
            left -= len(items)


def run_cell(
    task: Task, cases: list[Case], name: str, model: Any, folder: Path, trials: int, own: dict[str, Any]
) -> int:
    """Ask what is missing of a cell; return how many questions were asked now."""
    asked, items_of_case = 0, WORK[own["work"]].items_of_case
    with RunFolder(folder, {**own, **described(task, cases, name, model)}) as run:
        system = make(name, model, task.banks(model), window=task.settings.window, retrieval=task.retrieval)
        for case in in_turn(merged(cases), items_of_case, trials, task.settings.seed):
            left = [item for item in case.items if record_id(case, item, name) not in run]
            records = []
            for item, found in ask_case(task, system, case, left) if left else ():
                about = {"case": case.name, "system": name, "group": case.group, **case.axes, **item.about}
                scores = task.score({**about, **found})
                costs = {key: value for key, value in found.items() if key not in NOT_KEPT}
                names = {"id": record_id(case, item, name), "item": item.name, "group": about["group"]}
                records.append({**names, "text": case.name, **scores, **costs})
            run.write(records)
            asked += len(left)
        task.close()
        write_file(folder / "environment.json", as_json(environment()))
    return asked


NOT_KEPT = ("likeliest", "content_free")  # words of texts, and what is the same for all questions


def described(task: Task, cases: list[Case], name: str, model: Any) -> dict[str, Any]:
    """Return what a cell depends on: task, system and its weights, settings but for paths, hashes of what is asked.

    A system of the backbone alone does not depend on how a side network is configured or trained.
    """
    paths = (*task.may_change, "data", "haystack")
    found = describe(task.settings, model, task.identity(cases), may_change=paths)
    if SYSTEMS[name].kind not in DEPENDS_ON_SIDE_NETWORK:
        found = {key: found[key] for key in ("settings", "data")}
        found |= {"dtype": str(model.backbone.dtype), "backbone": backbone_hash(model)}
    return {"task": task.name, "system": name, **found}


@functools.cache
def backbone_hash(model: Any) -> str:
    """Return a hash of the weights of a model's backbone."""
    return hash_tensors((name, each.detach().cpu().contiguous()) for name, each in model.backbone.named_parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the cells")
    parser.add_argument("--trials", type=int, nargs="+", default=[12], help="questions of each cell; several: rounds")
    parser.add_argument("--size", type=int, default=1024, help="tokens of a text, where the work leaves it open")
    parser.add_argument("--window", type=int, default=512, help="tokens that systems with a window see at once")
    parser.add_argument(
        "--cells", nargs="*", default=[], metavar="NAME", help="kinds of work and systems, in order; default: all"
    )
    parser.add_argument("--data", nargs="*", default=[], metavar="WORK=PATH", help="files and folders of kinds of work")
    parser.add_argument("--model", default="smollm2-135m", help="packaged name, hub name or folder of a causal LM")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after so many")
    arguments = parser.parse_args()
    data = dict(each.split("=", 1) for each in arguments.data)
    unknown = sorted({*arguments.cells, *data} - {*WORK, *SYSTEMS})
    if unknown:
        parser.error(
            f"--cells and --data must name kinds of work ({', '.join(WORK)}) or systems ({', '.join(SYSTEMS)}), got {unknown}."
        )
    works, systems = ([each for each in arguments.cells if each in own] or list(own) for own in (WORK, SYSTEMS))
    opened = models_by_config(arguments.model, arguments.dtype)
    start, console = time.perf_counter(), Console()
    for name in works:
        if WORK[name].data and name not in data:
            console.print(f"{WORK[name].title}: needs --data {name}={WORK[name].data}")
    works = [name for name in works if not WORK[name].data or name in data]
    plain = opened(SYSTEMS["backbone"].config)
    refused, cases_of = 0, dict[str, Any]()
    for trials, work, name in itertools.product(arguments.trials, works, systems):
        if time.perf_counter() - start > arguments.seconds:
            break
        if work not in cases_of:  # once, so that all systems are asked the same
            task = WORK[work].make(data.get(work, ""), arguments.size, arguments.window)
            task.settings = dataclasses.replace(task.settings, model=arguments.model, dtype=arguments.dtype)
            cases_of = {work: (task, list(task.cases(plain)))}
        task, cases = cases_of[work]
        began, spent = time.perf_counter(), time.process_time()
        try:
            own, model = {"size": arguments.size, "work": work}, opened(SYSTEMS[name].config)
            count = run_cell(task, cases, name, model, arguments.output / work / name, trials, own)
            spent = time.process_time() - spent
            taken = f"{spent:.0f} processor seconds, {time.perf_counter() - began:.0f} s"
            console.print(f"{work}, {name}: {count} asked in {taken}", soft_wrap=True)
        except (ImportError, KeyError, TypeError, RuntimeError, ValueError) as error:
            refused += 1
            console.print(f"{work}, {name}: {type(error).__name__}: {error}", markup=False, soft_wrap=True)
    if refused:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
