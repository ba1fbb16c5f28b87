"""What the storage dtype of a bank costs and saves: loss, bytes, and the time of a gather.

    python benchmarks/bench_storage.py --texts FILE... [--memory-tokens 8192] [--windows 8] [--window 512] [--output FILE.json]

The first tokens of each text are encoded once and written to one bank for each dtype; the windows that follow are scored with
each of them. Losses are in nats a token, intervals (95 %) are over the windows of all texts, paired. Bytes are those of all
memory layers, search keys included. A gather takes 4,096 chunks for each of 3 heads from 65,536 random tokens: first as it is,
then with the cast to float32 of attention on a CPU; the dtypes take turns, and medians over the rounds are printed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longmem import LongMemForCausalLM, MemoryBank
from longmem.cli.common import add_device, use_device
from longmem.cli.texts import read_text
from longmem.data.sample_texts import first_tokens
from longmem.evaluation.perplexity.scoring import Cut, View, WindowScores, loss_difference, score_windows
from longmem.memory.rows.storage import STORAGE_DTYPES
from longmem.model.opening import open_model
from longmem.settings.environment import chosen_device, environment

BASELINE = "float32"


def banks_of(model: LongMemForCausalLM, past: torch.Tensor) -> dict[str, MemoryBank]:
    """Return a bank for each storage dtype, all written from one encoding."""
    capacity = -(-len(past) // model.config.chunk_size) * model.config.chunk_size
    banks = {name: MemoryBank.for_model(model, capacity_tokens=capacity, storage_dtype=name) for name in STORAGE_DTYPES}
    for number, ids in enumerate(past.split(model.config.segment_length)):
        keys, values = model.encode(ids[None])
        for bank in banks.values():
            write = bank.append if number else bank.add
            write("text", [part[0] for part in keys], [part[0] for part in values])
    return banks


def all_windows(results: list[WindowScores]) -> WindowScores:
    """Return the scores of several texts as one, window after window."""
    losses = tuple(window for result in results for window in result.losses)
    return WindowScores(losses, sum(result.seconds for result in results))


def gather_times(rounds: int) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of a gather for each dtype, and of the same with the cast to float32."""
    states = [torch.randn(3, 65_536, 64)]
    banks = {name: MemoryBank(memory_layers=[0], chunk_size=4, storage_dtype=name) for name in STORAGE_DTYPES}
    for bank in banks.values():
        bank.add("text", states, states)
    times = {name: ([], []) for name in banks}
    for _ in track(range(rounds), "gathering"):
        rows = torch.randint(bank.num_chunks, (3, 4096))
        for name, bank in banks.items():
            start = time.perf_counter()
            parts = bank.gather(0, rows, bank.generation)
            times[name][0].append(1e3 * (time.perf_counter() - start))
            parts = [part.float() for part in parts]
            times[name][1].append(1e3 * (time.perf_counter() - start))
    return {
        name: dict(zip(("gather", "cast"), map(statistics.median, both), strict=True)) for name, both in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m", help="backbone, or folder of a saved LongMem model")
    parser.add_argument("--memory-tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512, help="tokens the model sees at once")
    parser.add_argument("--rounds", type=int, default=101, help="of timing")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    add_device(parser)
    given = parser.parse_args()
    use_device(given.device)
    torch.manual_seed(0)
    times = gather_times(given.rounds)
    model = open_model(given.model).to(chosen_device())
    windows = Cut(given.window, given.window).row(0, given.windows)
    scores: dict[str, list[WindowScores]] = {name: [] for name in ("no memory", *STORAGE_DTYPES)}
    for file in track(given.texts, "reading"):
        sizes = given.memory_tokens, given.windows * given.window
        past, rest = first_tokens(model.tokenizer, read_text(file), file.name, *sizes)
        banks = banks_of(model, past)
        for name, results in scores.items():
            results.append(score_windows(View(model, rest, banks.get(name)), windows))
    merged = {name: all_windows(results) for name, results in scores.items()}
    exact, rows = merged[BASELINE], {}
    title = f"{len(given.texts)} texts, {len(exact.losses)} windows of {given.window} tokens"
    heads = "loss", f"above {BASELINE} (95 %)", "mean change of a token's", "bytes/token", "gather ms", "and cast ms"
    table = Table("stored as", *heads, title=title)
    for name, result in merged.items():
        above, low, high = loss_difference(exact, result)
        change = (torch.cat(result.losses) - torch.cat(exact.losses)).abs().double().mean().item()
        rows[name] = {"loss": result.loss, "above": above, "interval": [low, high], "mean_change": change}
        cells = [f"{result.loss:.5f}", f"{above:+.6f} ({low:+.6f}, {high:+.6f})", f"{change:.5f}"]
        if name in banks:
            rows[name] |= {"bytes_per_token": banks[name].nbytes / banks[name].num_tokens, **times[name]}
            cells += [f"{rows[name]['bytes_per_token']:,.0f}", *(f"{taken:.2f}" for taken in times[name].values())]
        table.add_row(name, *cells)
    Console(width=128).print(table)
    if given.output:
        losses = {name: [torch.stack(each.losses).tolist() for each in results] for name, results in scores.items()}
        content = {"settings": vars(given), "environment": environment(), "rows": rows, "losses": losses}
        given.output.write_text(json.dumps(content, default=str) + "\n")


if __name__ == "__main__":
    main()
