"""What an endless stream costs: resident memory and tokens per second while a stream takes in 100,000 tokens.

    python benchmarks/bench_stream.py [--tokens 100000] [--backbone NAME] [--output FOLDER]

Without `--backbone` the model is a tiny twin of SmolLM2-135M: its 30 Llama layers and 9 and 3 heads, 72 hidden numbers,
random weights. Writes results.json and, where matplotlib is installed, memory.png.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from longmem import LongMemForCausalLM, MemoryBank
from longmem.cli.common import add_device, use_device
from longmem.settings.environment import chosen_device

STEP = 2_000
MEGABYTE = 1 << 20


def tiny_twin() -> LlamaForCausalLM:
    """Return a random Llama with SmolLM2-135M's depth and heads."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=72, intermediate_size=192, num_hidden_layers=30, vocab_size=512)
    heads = dict(num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None))


def draw(path: Path, rows: list[dict[str, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(title="A stream on a full bank", xlabel="tokens taken in", ylabel="MB")
    for name, label in (("resident", "resident memory"), ("bank", "of it the bank")):
        axes.plot([row["tokens"] for row in rows], [row[name] for row in rows], label=label)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--backbone", help="name or folder; default: the tiny twin")
    parser.add_argument("--capacity", type=int, default=16_384, help="tokens that the bank holds")
    parser.add_argument("--output", type=Path, default=Path("stream-results"))
    add_device(parser)
    given = parser.parse_args()
    use_device(given.device)
    model = LongMemForCausalLM.from_backbone(given.backbone or tiny_twin()).eval().to(chosen_device())
    bank = MemoryBank.for_model(model, capacity_tokens=given.capacity)
    stream = model.stream(bank)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (given.tokens,), generator=torch.Generator().manual_seed(0))
    process, rows = psutil.Process(), []
    for part in track(tokens.split(STEP), "taking in"):
        start = time.perf_counter()
        stream.read(part)
        speed = len(part) / (time.perf_counter() - start)
        resident = process.memory_info().rss / MEGABYTE
        rows.append(
            {
                "tokens": stream.num_tokens,
                "resident": resident,
                "bank": bank.nbytes / MEGABYTE,
                "tokens_per_second": speed,
            }
        )
    given.output.mkdir(parents=True, exist_ok=True)
    settings = {
        "backbone": given.backbone or "tiny twin",
        "capacity": given.capacity,
        "window": model.config.segment_length,
    }
    (given.output / "results.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))
    table = Table("tokens", "resident MB", "bank MB", "tokens/s", title=f"A stream of {given.tokens:,} tokens")
    for row in rows[:: max(len(rows) // 10, 1)] + rows[-1:]:
        cells = f"{row['tokens']:,}", f"{row['resident']:.0f}", f"{row['bank']:.1f}", f"{row['tokens_per_second']:.0f}"
        table.add_row(*cells)
    Console().print(table)
    full = [row["resident"] for row in rows if row["tokens"] > 2 * given.capacity]
    if len(full) >= 10:  # single samples jump by what the allocator has not given back yet
        early, late = statistics.median(full[: len(full) // 3]), statistics.median(full[-(len(full) // 3) :])
        print(
            f"With the bank full, the median of resident memory went from {early:.0f} MB in the first third to {late:.0f} MB "
            f"in the last ({late - early:+.1f}); samples from {min(full):.0f} to {max(full):.0f} MB."
        )
    try:
        draw(given.output / "memory.png", rows)
    except ImportError:
        print("No figure: matplotlib is not installed.")


if __name__ == "__main__":
    main()
