"""What memory costs: encoding against a plain forward, reading 65,536 stored tokens against memory off.

    python benchmarks/bench_cost.py [--backbone smollm2-135m] [--stored 65536] [--rounds 7] [--output FILE.json]

Every figure is a ratio of times taken in turn in the same round, and the median over the rounds is printed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from longmem import LongMemForCausalLM, MemoryBank
from longmem.data.sample_texts import python_manual


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def banks_of(model: LongMemForCausalLM, ids: torch.Tensor, settings: dict[str, dict]) -> dict[str, MemoryBank]:
    """Return one bank per setting (memory layers, index), all filled by the same encoding run."""
    layers = model.config.memory_layers
    banks = {name: MemoryBank(chunk_size=model.config.chunk_size, **given) for name, given in settings.items()}
    for number, window in enumerate(track(ids.split(model.config.segment_length), "encoding the stored tokens")):
        keys, values = model.encode(window[None])
        for bank in banks.values():
            own = [layers.index(layer) for layer in bank.memory_layers]
            write = bank.append if number else bank.add
            write("manual", [keys[i][0] for i in own], [values[i][0] for i in own])
    return banks


def summary(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--stored", type=int, default=65_536)
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LongMemForCausalLM.from_backbone(given.backbone).eval().to(device)
    layers = model.config.memory_layers
    one = LongMemForCausalLM.from_backbone(model.backbone, memory_layers=[layers[len(layers) // 2]]).eval().to(device)
    ids = model.tokenizer(python_manual(), verbose=False, return_tensors="pt")["input_ids"][0].to(device)
    ids = ids.repeat(-(-(given.stored + given.segment) // len(ids)))
    segment = ids[given.stored : given.stored + given.segment][None]
    many = {"memory_layers": layers, "capacity_tokens": given.stored, "device": device}
    settings = {
        "one reading layer, flat": {**many, "memory_layers": one.config.memory_layers, "index": "flat"},
        "default layers, auto": {**many, "index": "auto"},
        "default layers, flat": {**many, "index": "flat"},
    }
    banks = banks_of(model, ids[: given.stored], settings)
    models = {name: one if name.startswith("one") else model for name in banks}
    allowed = flops(lambda: model.backbone(segment)) / flops(lambda: model.encode(segment))
    encoding, reading = [], {name: [] for name in banks}
    for round_number in track(range(given.rounds + 1), "timing"):
        plain = seconds(lambda: model.backbone(segment, use_cache=False))
        encode = seconds(lambda: model.encode(segment))
        shares = {}
        for name, bank in banks.items():
            off = seconds(lambda name=name: models[name](segment))
            on = seconds(lambda name=name, bank=bank: models[name](segment, memory=bank))
            shares[name] = (on - off) / plain
        if round_number:  # the first round warms up, and trains approximate indexes
            encoding.append(plain / encode / allowed)
            for name, share in shares.items():
                reading[name].append(share)
    result = {
        "encoding speed / what skipped layers and head allow": summary(encoding),
        **{f"(on - off) / backbone forward: {name}": summary(ratios) for name, ratios in reading.items()},
    }
    title = f"{given.backbone}, {given.segment} tokens read against {given.stored} stored, {given.rounds} rounds"
    table = Table("ratio", "median", "min", "max", title=title)
    for name, figures in result.items():
        table.add_row(name, *(f"{figures[key]:.3f}" for key in ("median", "min", "max")))
    Console().print(table)
    setup = {**vars(given), "output": None, "device": device, "threads": torch.get_num_threads(), "allowed": allowed}
    if given.output:
        given.output.write_text(json.dumps({"setup": setup, "result": result}, indent=2))


if __name__ == "__main__":
    main()
