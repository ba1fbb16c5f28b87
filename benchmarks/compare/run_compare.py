"""Ask many systems the same questions of many kinds of work, with one meter, in pieces that go on after a stop.

python benchmarks/compare/run_compare.py docs/results/comparison --trials 4
python benchmarks/compare/run_compare.py docs/results/comparison --trials 10 --data books=BOOKS locomo=locomo10.json
python benchmarks/compare/write_comparison.py docs/results/comparison docs/comparison.md

Each cell, a kind of work and a system, is a folder with settings and a record for every question; without texts. Seconds are
those of processors, so that a busy machine does not count.
Questions come in an order that a seed decides, so that more trials go on from fewer. Systems take turns after each round.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from systems import SYSTEMS, TOKEN_BYTES, make, models_by_config
from work import WORK

from longmem.evaluation.folder import RunFolder, as_json, describe
from longmem.evaluation.runner import ask, record_id
from longmem.evaluation.systems import System
from longmem.evaluation.task import Case, Task
from longmem.files import write_file
from longmem.settings.environment import environment


class Meter:
    """What a system costs: processor seconds, tokens run through the backbone, highest memory above the start, bytes kept.

    The highest memory is that of the process where the system tells it (Linux), else 0.
    """

    def __init__(self, model: Any, system: System) -> None:
        self.system, self.tokens, self.kept, self.preparing, self.scoring = system, 0, 0, 0.0, 0.0
        self._handle = model.backbone.get_input_embeddings().register_forward_pre_hook(self._count)
        self._context, self._score = system.context, system.score
        system.context, system.score = self._noted, self._timed  # type: ignore[method-assign]
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._start, self._began = psutil.Process().memory_info().rss, time.process_time()

    def _count(self, module: Any, inputs: Any) -> None:
        self.tokens += inputs[0].numel()

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        start, before = time.process_time(), self.preparing
        found = self._score(*args, **kwargs)
        self.scoring += time.process_time() - start - (self.preparing - before)
        return found

    def _noted(self, *args: Any) -> Any:
        start = time.process_time()
        found = self._context(*args)
        self.preparing += time.process_time() - start
        memory = getattr(found[0], "memory", None)
        if memory is not None:
            self.kept = sum({id(bank): bank.nbytes for bank, _ in memory.parts()}.values())
        elif self.system.name == "off" or type(self.system).__name__ == "FullWindow":
            self.kept = TOKEN_BYTES * min(len(self.system.stream), self.system.window)
        else:
            own = getattr(self.system, "kept_bytes", None)
            self.kept = TOKEN_BYTES * len(self.system.stream) if own is None else own
        return found

    def stop(self, questions: int) -> dict[str, float]:
        """Return what was counted, of answering for each question, and count no more."""
        feeding = time.process_time() - self._began - self.scoring
        self._handle.remove()
        self.system.context, self.system.score = self._context, self._score  # type: ignore[method-assign]
        costs = {"seconds": self.scoring / questions, "feeding_seconds": feeding, "peak_bytes": 0}
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
            costs["peak_bytes"] = max(0, peak - self._start)
        return {**costs, "tokens_run": self.tokens, "kept_bytes": self.kept}


def in_turn(cases: list[Case], items_of_case: int, trials: int, seed: int) -> Iterator[Case]:
    """Yield cases with the first `trials` questions of an order that a seed decides, at most `items_of_case` of each."""
    draw = random.Random(seed)
    left = trials
    for case in draw.sample(cases, len(cases)):
        items = draw.sample(list(case.items), min(items_of_case, len(case.items)))
        if items and left > 0:
            yield dataclasses.replace(case, items=items[:left], max_new_tokens=0, axes={**case.axes})
            left -= len(items)


def run_cell(
    task: Task,
    cases: list[Case],
    name: str,
    model: Any,
    folder: Path,
    trials: int,
    items: int,
    settings: dict[str, Any],
) -> int:
    """Ask what is missing of a cell; return how many questions were asked now."""
    asked, measured = 0, task.settings.window
    with RunFolder(folder, {**settings, **described(task, cases, name, model)}) as run:
        banks = task.banks(model)
        system = make(name, model, banks, window=measured, retrieval=task.retrieval)
        for case in in_turn(cases, items, trials, task.settings.seed):
            left = [item for item in case.items if record_id(case, item, name) not in run]
            if not left:
                continue
            meter = Meter(model, system)
            found = [each for records in ask(task, system, case, left, None, banks) for each in records]
            costs = {**meter.stop(len(left)), "asked_together": len(left), "fed_tokens": len(system.stream)}
            prepared = next((each for each in found if "item" not in each), {})
            for item, record in zip(left, (each for each in found if "item" in each), strict=True):
                names = {"id": record_id(case, item, name), "item": record["item"], "group": record["group"]}
                run.write([{**names, **task.score({**prepared, **record}), **costs}])
            asked += len(left)
        task.close()
        write_file(folder / "environment.json", as_json(environment()))
    return asked


def described(task: Task, cases: list[Case], name: str, model: Any) -> dict[str, Any]:
    """Return what a cell is: task, system, settings but for paths, model, and hashes of what is asked."""
    paths = (*task.may_change, "data", "haystack")
    return {
        "task": task.name,
        "system": name,
        **describe(task.settings, model, task.identity(cases), may_change=paths),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the cells")
    parser.add_argument("--trials", type=int, nargs="+", default=[4], help="questions of each cell; several: rounds")
    parser.add_argument("--size", type=int, default=2048, help="tokens of a text, where the work leaves it open")
    parser.add_argument("--window", type=int, default=512, help="tokens that systems with a window see at once")
    parser.add_argument(
        "--cells", nargs="*", default=[], metavar="NAME", help="kinds of work and systems; default: all"
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
    chosen = {
        name: [each for each in own if each in arguments.cells] or list(own)
        for name, own in (("w", WORK), ("s", SYSTEMS))
    }
    opened = models_by_config(arguments.model, arguments.dtype)
    start, console = time.perf_counter(), Console()
    for name in chosen["w"]:
        if WORK[name].data and name not in data:
            console.print(f"{WORK[name].title}: needs --data {name}={WORK[name].data}")
    ready = [name for name in chosen["w"] if not WORK[name].data or name in data]
    for trials, work_name, name in itertools.product(arguments.trials, ready, chosen["s"]):
        if time.perf_counter() - start > arguments.seconds:
            return
        work, model, began = WORK[work_name], opened(SYSTEMS[name].config), time.perf_counter()
        task = work.make(data.get(work_name, ""), arguments.size, arguments.window)
        task.settings = dataclasses.replace(task.settings, model=arguments.model, dtype=arguments.dtype)
        task.placed = lambda *_: {}  # what was read is not measured here
        try:
            folder, settings = arguments.output / work_name / name, {"size": arguments.size, "work": work_name}
            count = run_cell(task, list(task.cases(model)), name, model, folder, trials, work.items_of_case, settings)
            console.print(f"{work_name}, {name}: {count} asked in {time.perf_counter() - began:.0f} s")
        except (ImportError, KeyError, TypeError, RuntimeError) as error:
            console.print(f"{work_name}, {name}: {type(error).__name__}: {error}", markup=False)


if __name__ == "__main__":
    main()
