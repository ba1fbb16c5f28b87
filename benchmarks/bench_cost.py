"""What memory costs: bytes of model and bank, encoding, reading stored tokens, and generating with them.

    python benchmarks/bench_cost.py [--model smollm2-135m] [--stored 65536] [--dtype bfloat16] [--neighbours 64] \\
        [--rounds 7] [--clock processor] [--output FILE.json]

Every figure is a ratio, of times taken in turn in the same round; the median over the rounds is printed. The backbone with the
stored tokens in its window reads a cache of random keys and values: what they hold takes no time. On a machine that does other
work, `--clock processor` with OMP_NUM_THREADS=1 counts what this process alone has used.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from longmem import LongMemForCausalLM, MemoryBank
from longmem.backbone.cache_names import as_keyword, cache_of
from longmem.cli.common import add_device, use_device
from longmem.data.sample_texts import python_manual
from longmem.model.opening import open_model
from longmem.settings.environment import chosen_device

GENERATED = 16  # tokens in a row, for the time of one
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
clock = CLOCKS["wall"]


def seconds(call: Callable[[], object]) -> float:
    start = clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def summary(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def resident_bytes(*tensors: Iterator[torch.Tensor]) -> int:
    """Return the bytes of what some tensors hold, each storage once, however many tensors share it."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for own in tensors for each in own}
    return sum(storages.values())


def weights(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def banks_of(model: LongMemForCausalLM, ids: torch.Tensor, settings: dict[str, dict]) -> dict[str, MemoryBank]:
    """Return one bank per setting, all filled by the same encoding run."""
    banks = {name: MemoryBank.for_model(model, capacity_tokens=None, **given) for name, given in settings.items()}
    for number, window in enumerate(track(ids.split(model.config.segment_length), "encoding the stored tokens")):
        keys, values = model.encode(window[None])
        for bank in banks.values():
            write = bank.append if number else bank.add
            write("manual", [each[0] for each in keys], [each[0] for each in values], token_ids=window)
    return banks


def random_cache(backbone: Any, num_tokens: int, device: torch.device) -> DynamicCache:
    """Return a cache as the backbone's after so many tokens, of random numbers."""
    config = backbone.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, num_tokens, size)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, dtype=backbone.dtype, device=device) for _ in range(2)), layer)
    return cache


def generating(run: Callable[..., Any], ids: torch.Tensor, cache: Any) -> Callable[[], None]:
    """Return a call that runs so many single tokens, each after the one before."""

    def call() -> None:
        nonlocal cache
        for token in ids[0, :GENERATED]:
            cache = cache_of(run(token.reshape(1, 1), **as_keyword(cache), use_cache=True))

    return call


@torch.no_grad()
def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="folder or name, as for from_pretrained")
    parser.add_argument("--stored", type=int, default=65_536, help="tokens in memory")
    parser.add_argument("--segment", type=int, default=1024, help="tokens in the window")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--neighbours", type=int, default=0, help="tokens of memory that predict (`num_neighbours`)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall time, or this process's processor time")
    add_device(parser)
    given = parser.parse_args()
    use_device(given.device)
    clock = CLOCKS[given.clock]
    device = chosen_device()
    chosen = {"num_neighbours": given.neighbours} if given.neighbours else {}
    model = open_model(given.model, dtype=given.dtype, **chosen).eval().to(device)
    backbone = model.backbone
    ids = model.tokenizer(python_manual(), verbose=False, return_tensors="pt")["input_ids"][0].to(device)
    ids = ids.repeat(-(-(given.stored + given.segment) // len(ids)))
    segment = ids[given.stored : given.stored + given.segment][None]
    banks = banks_of(model, ids[: given.stored], {name: {"index": name, "device": device} for name in ("auto", "flat")})
    allowed = flops(lambda: backbone(segment)) / flops(lambda: model.encode(segment))
    figures: dict[str, list[float]] = {}

    def note(name: str, ratio: float) -> None:
        figures.setdefault(name, []).append(ratio)

    for round_number in track(range(given.rounds + 1), "timing"):
        if round_number == 1:  # the round before warmed up, and trained approximate indexes
            figures.clear()
        plain = seconds(lambda: backbone(segment, use_cache=False))
        off = seconds(lambda: model(segment))
        note("memory off / backbone, forward", off / plain)
        encode = seconds(lambda: model.encode(segment))
        note("encoding speed / what skipped layers and head allow", plain / encode / allowed)
        step = seconds(generating(backbone, segment, cache_of(backbone(segment, use_cache=True))))
        far = seconds(generating(backbone, segment, random_cache(backbone, given.stored, device)))
        for name, bank in banks.items():
            on = seconds(lambda bank=bank: model(segment, memory=bank))
            note(f"(memory on - off) / backbone, forward; {name} index", (on - off) / plain)

            def reading(*arguments: Any, bank: MemoryBank = bank, **options: Any) -> Any:
                return model(*arguments, memory=bank, **options)

            own = seconds(generating(reading, segment, cache_of(reading(segment, use_cache=True))))
            note(f"speed of generating / backbone's with the window of {given.segment:,}; {name} index", step / own)
            note(f"speed of generating / backbone's with all in its window; {name} index", far / own)
    sizes = {
        "bytes of the model with its side network / backbone": resident_bytes(weights(backbone), weights(model))
        / resident_bytes(weights(backbone)),
        "bytes stored per token": banks["flat"].nbytes / given.stored,
        "bytes per token in the backbone's cache": sum(
            each.nbytes for layer in random_cache(backbone, 1, device).layers for each in (layer.keys, layer.values)
        ),
    }
    result = {name: summary(ratios) for name, ratios in figures.items()}
    title = f"{given.model}, {given.segment:,} tokens read against {given.stored:,} stored, {given.rounds} rounds"
    table = Table("ratio", "median", "min", "max", title=title)
    for name, own in result.items():
        table.add_row(name, *(f"{own[key]:.3f}" for key in ("median", "min", "max")))
    for name, size in sizes.items():
        table.add_row(name, f"{size:,.3f}".rstrip("0").rstrip("."), "", "")
    Console().print(table)
    setup = {
        **vars(given),
        "output": None,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "allowed": allowed,
    }
    if given.output:
        given.output.write_text(json.dumps({"setup": setup, "result": result, "sizes": sizes}, indent=2))


if __name__ == "__main__":
    main()
