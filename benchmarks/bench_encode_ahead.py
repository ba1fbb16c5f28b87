"""Encode-ahead: the same training steps with the backbone in the step itself, and in a thread that runs ahead of it.

    python benchmarks/bench_encode_ahead.py [--backbone smollm2-135m] [--lanes 2] [--window 256] [--memory-tokens 4096]
        [--ahead 2] [--steps 3] [--rounds 3] [--threads 1]
        [--config longmem/training/configs/smollm2-books.yaml] [--output FILE.json]

Blocks of steps take turns, with and without, on consecutive text of Python's reference manual. A block begins with nothing
encoded, and the thread encodes nothing for the next one, so both do the same work. Ratios are of blocks of the same round.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from bench_cost import seconds, summary
from bench_training import own_settings
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longmem.cli.common import add_device, use_device
from longmem.settings.environment import environment
from longmem.training import Trainer, load_settings
from longmem.training.encode_ahead import EncodeAhead


def block(trainer: Trainer, steps: int, ahead: int) -> None:
    """Train so many steps; `ahead` 0: the backbone runs in each of them."""
    if not ahead:
        for _ in range(steps):
            trainer.train_step()
        return
    device, plain = trainer.accelerator.device, trainer.features
    first, last = trainer.step, trainer.step + steps
    source = EncodeAhead(
        trainer.frozen, lambda number: trainer.lanes.batch(number).to(device), first=first, last=last, ahead=ahead
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
    times: dict[str, list[float]] = {"in the step": [], "ahead": []}
    with tempfile.TemporaryDirectory() as folder:
        own = ["data.validation=null", "data.max_validation_tokens=null", "optimization.gradient_accumulation=1"]
        trainer = Trainer(load_settings(given.config, own_settings(given, folder) + own))
        trainer.step = -(-given.memory_tokens // given.window) + 1  # memories are full, as later in a run
        for number in track(range(given.rounds + 1), "rounds, the first to warm up"):
            for name, ahead in (("in the step", 0), ("ahead", given.ahead)):
                taken = seconds(lambda ahead=ahead: block(trainer, given.steps, ahead))
                times[name].extend([taken] if number else [])
    ratios = summary([plain / ahead for plain, ahead in zip(*times.values(), strict=True)])
    table = Table("seconds a block", "median", "min", "max", title=f"{given.backbone}, {given.steps} steps a block")
    for name, figures in {name: summary(each) for name, each in times.items()}.items():
        table.add_row(name, *(f"{each:.2f}" for each in figures.values()))
    table.add_row("speed, ahead / in the step", *(f"{each:.2f}" for each in ratios.values()))
    Console().print(table)
    if given.output:
        setup = {**vars(given), "output": None, "threads": torch.get_num_threads()}
        result = {"seconds_per_block": times, "speed_ratio": ratios}
        given.output.write_text(json.dumps({"setup": setup, "environment": environment(), "result": result}, indent=2))


if __name__ == "__main__":
    main()
