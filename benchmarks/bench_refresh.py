"""What freshness costs: opening a bank, a checked read and training step, stamp and sketch, a shared refresh.

    python benchmarks/bench_refresh.py [--backbone smollm2-135m] [--stored 20480] [--segment 512] [--rounds 7]
        [--shared 8192] [--output FILE.json]

"Checked" is a bank with the default policy "frozen", "unchecked" the same bank without a fingerprint; both are timed in turn
in the same round, the first of them in turn as well, and the median of the ratios is printed. A shared refresh has two workers,
one of which takes four times as long for each token; the ideal is the time in which both would end at once.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_cost import seconds, summary
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longmem import LongMemForCausalLM, MemoryBank
from longmem.cli.common import add_device, use_device
from longmem.data.sample_texts import python_manual
from longmem.settings.environment import chosen_device


class Slowed:
    """Return a worker that takes so many seconds for a token, whatever the machine does: the share of a sleep is exact."""

    def __init__(self, model: LongMemForCausalLM, seconds_per_token: float) -> None:
        self.model, self.seconds_per_token = model, seconds_per_token

    def encode(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        done = time.perf_counter() + self.seconds_per_token * ids.numel()
        found = self.model.encode(ids)
        time.sleep(max(0.0, done - time.perf_counter()))
        return found

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)


def paired(one: Callable[[], object], other: Callable[[], object], rounds: int) -> dict[str, float]:
    """Return the ratio of the times of two calls, less 1, over rounds in which they take turns in going first."""
    ratios = []
    for number in track(range(rounds + 1), "timing"):
        calls = [one, other] if number % 2 else [other, one]
        times = {call: seconds(call) for call in calls}
        if number:  # the first round warms up
            ratios.append(times[one] / times[other] - 1)
    return summary(ratios)


def opening(model: LongMemForCausalLM, bank: MemoryBank, rounds: int) -> dict[str, float]:
    """Return the milliseconds in which a saved bank opens for a model whose encoder is known."""
    with tempfile.TemporaryDirectory() as folder:
        bank.save(folder)
        times = []
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            opened = MemoryBank.open(folder, model)
            times.append(1e3 * (time.perf_counter() - begin))
            opened.close()
    return summary(times[1:])


def shared(model: LongMemForCausalLM, ids: torch.Tensor, segment: int) -> dict[str, float]:
    """Return the time of a refresh by two workers, one four times as slow, relative to the ideal split, three times."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.backbone.get_input_embeddings().weight.mul_(1.001)
    fast = statistics.median(seconds(lambda: other.encode(ids[None, :segment])) for _ in range(5)) / segment
    fast *= 2  # with room for both to compute at once on few cores: what is measured is the queue, not the cores
    workers = [Slowed(other, fast), Slowed(other, 4 * fast)]
    ideal = len(ids) * fast / (1 + 1 / 4)
    ratios = []
    for _ in track(range(3), "sharing"):
        bank = MemoryBank.for_model(model, capacity_tokens=None)
        bank.refresh = "bounded"
        keys, values = model.encode(ids[None, :segment])
        for number, part in enumerate(ids.split(segment)):
            put = bank.append if number else bank.add
            put("d", [each[0] for each in keys], [each[0] for each in values], part, segment="new")
        ratios.append(seconds(lambda bank=bank: bank.freshness.reencode(workers[0], workers=workers[1:])) / ideal)
    return summary(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--stored", type=int, default=20_480)
    parser.add_argument("--segment", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shared", type=int, default=8_192)
    parser.add_argument("--output", type=Path)
    add_device(parser)
    given = parser.parse_args()
    use_device(given.device)
    device = chosen_device()
    model = LongMemForCausalLM.from_backbone(given.backbone, segment_length=given.segment).eval().to(device)
    ids = model.tokenizer(python_manual(), verbose=False, return_tensors="pt")["input_ids"][0].to(device)
    ids = ids.repeat(-(-(given.stored + given.segment) // len(ids)))
    result: dict[str, dict[str, float]] = {
        "stamp, seconds": summary([seconds(lambda: model.encoder_stamp(exact=True)) for _ in range(3)])
    }
    result["sketch, seconds"] = summary([seconds(lambda: sketch_anew(model)) for _ in range(3)])
    result["one look of the tripwire, ms"] = summary([1e3 * seconds(model.encoder_stamp) for _ in range(20)])
    checked = MemoryBank.for_model(model, capacity_tokens=None, device=device)
    sizes = {"memory_layers": checked.memory_layers, "chunk_size": checked.chunk_size}
    unchecked = MemoryBank(**sizes, capacity_tokens=None, device=device)
    for number, window in enumerate(track(ids[: given.stored].split(given.segment), "encoding the stored tokens")):
        keys, values = model.encode(window[None])
        for bank in (checked, unchecked):
            put = bank.append if number else bank.add
            put("manual", [each[0] for each in keys], [each[0] for each in values], window, segment="new")
    result["opening, unchanged encoder, ms"] = opening(model, checked, given.rounds)
    segment = ids[given.stored : given.stored + given.segment][None]
    with torch.no_grad():
        result["a read, checked / unchecked - 1"] = paired(
            lambda: model(segment, memory=checked), lambda: model(segment, memory=unchecked), given.rounds
        )
        one = segment[:, :1]
        result["a read of one token, checked / unchecked - 1"] = paired(
            lambda: model(one, memory=checked), lambda: model(one, memory=unchecked), 4 * given.rounds
        )
    model.train()
    optimizer = torch.optim.AdamW(model.side_network.parameters(), lr=1e-6)

    def step(bank: MemoryBank) -> None:
        model(segment, labels=segment, memory=bank).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    result["a training step, checked / unchecked - 1"] = paired(
        lambda: step(checked), lambda: step(unchecked), given.rounds
    )
    result["two workers, 4x apart / ideal split"] = shared(model.eval(), ids[: given.shared], given.segment // 4)
    title = f"{given.backbone}, {given.stored} tokens stored, windows of {given.segment}, {given.rounds} rounds"
    table = Table("measured", "median", "min", "max", title=title)
    for name, figures in result.items():
        table.add_row(name, *(f"{figures[key]:.4f}" for key in ("median", "min", "max")))
    Console().print(table)
    if given.output:
        load = os.getloadavg() if hasattr(os, "getloadavg") else None
        setup = {**vars(given), "output": None, "device": str(device), "threads": torch.get_num_threads(), "load": load}
        given.output.write_text(json.dumps({"setup": setup, "result": result}, indent=2))


def sketch_anew(model: LongMemForCausalLM) -> None:
    model.encoder._sketch = None
    model.encoder.sketch()


if __name__ == "__main__":
    main()
