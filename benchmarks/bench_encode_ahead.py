"""Encode-ahead: the same training steps with the backbone in the step itself, in a thread that runs ahead, and in a process.

    python benchmarks/bench_encode_ahead.py [--backbone smollm2-135m] [--lanes 2] [--window 256] [--memory-tokens 4096]
        [--ahead 2] [--steps 3] [--rounds 3] [--threads 1]
        [--config longmem/training/configs/smollm2-books.yaml] [--output FILE.json]

Blocks of steps take turns, with and without, on consecutive text of Python's reference manual. A block begins with nothing
encoded, and nothing is encoded for the next one, so all do the same work. Ratios are of blocks of the same round. Each round
is in the file of `--output` once it is there, and the same command goes on behind those that the file has.

The process has a copy of the backbone and gives features as `features.folder` would keep them, in float16. Where it has no
cores of its own, the processor time of the trainer alone says what a machine for each of both would give at best.
"""

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from bench_cost import seconds, summary
from bench_training import own_settings
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longmem.cli.common import add_device, use_device
from longmem.files import write_file
from longmem.settings.environment import environment
from longmem.training import Trainer, load_settings
from longmem.training.encode_ahead import EncodeAhead
from longmem.training.features import Features, FrozenFeatures


class Elsewhere:
    """Features of windows, computed by a process of its own."""

    def __init__(self, frozen: FrozenFeatures, config: str, settings: list[str], threads: int) -> None:
        self.frozen, self.calls = frozen, {}
        self.process = ProcessPoolExecutor(1, get_context("spawn"), begin, (config, settings, threads))

    def of(self, input_ids: torch.Tensor, lengths: Sequence[int]) -> Features:
        """Return the features of a batch of windows."""
        shape = tuple(input_ids.shape)
        if shape not in self.calls:  # what layers are called with beside hidden states: the same for all of a shape
            self.calls[shape] = self.frozen.of(input_ids, lengths).states
        rows = self.process.submit(rows_of, input_ids.numpy(), tuple(lengths)).result()
        rows = [{name: torch.from_numpy(each) for name, each in row.items()} for row in rows]
        return self.frozen._stacked(rows, self.calls[shape], input_ids)


def begin(config: str, settings: list[str], threads: int) -> None:
    """Open the backbone in the process that encodes."""
    torch.set_num_threads(threads)
    globals()["FROZEN"] = Trainer(load_settings(config, settings)).frozen


def rows_of(input_ids: np.ndarray, lengths: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Return what each window of a batch has in a cache of features."""
    frozen = globals()["FROZEN"]
    features = frozen.of(torch.from_numpy(input_ids), lengths)
    rows = (frozen._row(features, number) for number in range(len(lengths)))
    return [{name: each.numpy() for name, each in row.items()} for row in rows]


def block(trainer: Trainer, steps: int, ahead: int, elsewhere: Elsewhere | None = None) -> None:
    """Train so many steps; `ahead` 0: the backbone runs in each of them."""
    if not ahead:
        for _ in range(steps):
            trainer.train_step()
        return
    device, plain = trainer.accelerator.device, trainer.features
    first, last = trainer.step, trainer.step + steps
    source = EncodeAhead(
        elsewhere or trainer.frozen,
        lambda number: trainer.lanes.batch(number).to(device),
        first=first,
        last=last,
        ahead=ahead,
    )
    with source:
        trainer.features = source
        for _ in range(steps):
            trainer.train_step()
    trainer.features = plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--config", default="longmem/training/configs/smollm2-books.yaml")
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--memory-tokens", type=int, default=4096)
    parser.add_argument("--ahead", type=int, default=2, help="batches")
    parser.add_argument("--steps", type=int, default=3, help="of a block")
    parser.add_argument("--rounds", type=int, default=3, help="after one to warm up")
    parser.add_argument("--threads", type=int, help="of torch, for each of both; default: torch's own choice")
    parser.add_argument("--output", type=Path)
    add_device(parser)
    given = parser.parse_args()
    use_device(given.device)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    kinds = ("in the step", "in a thread", "in a process")
    times: dict[str, list[float]] = {name: [] for name in kinds}
    cpu: dict[str, list[float]] = {name: [] for name in kinds}
    setup = {**vars(given), "output": None, "rounds": None, "threads": torch.get_num_threads()}
    if given.output and given.output.exists():
        known = json.loads(given.output.read_text())
        if known["setup"] != setup:
            parser.error(f"`--output` must be a new file or that of the same command, got one of {known['setup']}")
        times, cpu = known["result"]["seconds_per_block"], known["result"]["trainer_cpu_seconds_per_block"]
    if len(times[kinds[0]]) < given.rounds:
        measure(given, times, cpu, setup)
    show(given.backbone, given.steps, times, cpu)


def measure(given: argparse.Namespace, times: dict[str, list[float]], cpu: dict[str, list[float]], setup: dict) -> None:
    """Add the rounds that are not there yet to seconds and processor time of each kind, and keep each in the file."""
    kinds, done = tuple(times), len(times["in the step"])
    with tempfile.TemporaryDirectory() as folder:
        own = ["data.validation=null", "data.max_validation_tokens=null", "optimization.gradient_accumulation=1"]
        settings = own_settings(given, folder) + own
        trainer = Trainer(load_settings(given.config, settings))
        trainer.step = -(-given.memory_tokens // given.window) + 1  # memories are full, as later in a run
        other = [*settings, f"output={folder}/other"]
        elsewhere = Elsewhere(trainer.frozen, given.config, other, torch.get_num_threads())
        for number in track(range(given.rounds - done + 1), "rounds, the first to warm up"):
            new = {}
            for name in kinds:
                steps, ahead = (given.steps if number else 1), (0 if name == kinds[0] else given.ahead)
                source, before = (elsewhere if name == kinds[2] else None), time.process_time()
                run = functools.partial(block, trainer, steps, ahead, source)
                new[name] = seconds(run), time.process_time() - before
            for name, (taken, computed) in new.items() if number else ():
                times[name].append(taken)
                cpu[name].append(computed)
            if given.output and number:
                result = {"seconds_per_block": times, "trainer_cpu_seconds_per_block": cpu}
                content = {"setup": setup, "environment": environment(), "result": result}
                write_file(given.output, json.dumps(content, indent=2))
        elsewhere.process.shutdown()


def show(backbone: str, steps: int, times: dict[str, list[float]], cpu: dict[str, list[float]]) -> None:
    """Print medians, and ratios of blocks of the same round."""
    table = Table("seconds a block", "median", "min", "max", title=f"{backbone}, {steps} steps a block")
    first, *others = times
    for what, kept in (("", times), (", processor time of the trainer", cpu)):
        for name, figures in kept.items():
            table.add_row(name + what, *(f"{each:.2f}" for each in summary(figures).values()))
        for name in others:
            ratio = summary([plain / ahead for plain, ahead in zip(kept[first], kept[name], strict=True)])
            table.add_row(f"in the step / {name}{what}", *(f"{each:.2f}" for each in ratio.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
