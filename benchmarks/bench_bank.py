"""What a bank costs as it grows: adding at 10^4 and 10^7 stored tokens, opening, reading one larger than memory.

    python benchmarks/bench_bank.py add  [--tokens 10000000] [--folder DIR]
    python benchmarks/bench_bank.py open [--tokens 1000000] [--layers 8] [--heads 3] [--folder DIR]

`add` writes the same tokens in turn to a bank that holds 10^4 and to one that holds `--tokens`, in a folder (each write is
a commit on the disk), in memory, and in memory when the bank is full and forgets as much; the figure is the ratio of the
medians. `open` opens a bank in a folder in new processes, reads random chunks of all its layers, mapped and not, and says
whether what was resident in the end stayed below half of the bank's size. Keys and values are random; those of a model have
the same sizes. Searches are measured on the keys and queries of a model, by `longmem bank tune`.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longmem import MemoryBank

DIM, CHUNK = 64, 4
STEP = 16_384  # tokens written at once while a bank is filled
WRITE = 1_024  # tokens of a measured write
SMALL = 10_000
MEGABYTE = 1 << 20


def tokens(count: int, layers: int, heads: int) -> list[torch.Tensor]:
    return [torch.randn(heads, count, DIM) for _ in range(layers)]


def fill(bank: MemoryBank, count: int, layers: int, heads: int) -> MemoryBank:
    keys = tokens(STEP, layers, heads)
    for start in track(range(0, count, STEP), f"writing {count:,} tokens", transient=True):
        part = [layer[:, : min(STEP, count - start)] for layer in keys]
        bank.add(f"document {start}", part, part)
    return bank


def seconds_of_writes(banks: list[MemoryBank], rounds: int, heads: int, name: str) -> list[list[float]]:
    """Return the seconds of every write, for each bank; they take turns."""
    seconds: list[list[float]] = [[] for _ in banks]
    for number in track(range(rounds), "measuring", transient=True):
        keys = tokens(WRITE, 1, heads)
        for bank, measured in zip(banks, seconds, strict=True):
            begin = time.perf_counter()
            bank.add(f"{name} {number}", keys, keys)
            measured.append(time.perf_counter() - begin)
    return seconds


def measure_adding(given: argparse.Namespace, folder: Path) -> list[dict]:
    sizes = SMALL // CHUNK * CHUNK, given.tokens // CHUNK * CHUNK
    common = {"memory_layers": [0], "chunk_size": CHUNK}
    makers = {
        "in a folder": lambda size: MemoryBank.create(folder / str(size), **common),
        "in memory": lambda size: MemoryBank(**common, capacity_tokens=None),
        "in memory, full": lambda size: MemoryBank(**common, capacity_tokens=size),
    }
    rows = []
    for kind, make in makers.items():
        banks = [fill(make(size), size, 1, given.heads) for size in sizes]
        seconds_of_writes(banks, 3, given.heads, "first")  # they touch new memory
        small, large = (sorted(each) for each in seconds_of_writes(banks, given.rounds, given.heads, "measured"))
        medians = statistics.median(small), statistics.median(large)
        means = statistics.mean(small), statistics.mean(large)
        rows.append({"bank": kind, "ms": [1e3 * each for each in medians], "ratio": medians[1] / medians[0]})
        rows[-1]["ratio_of_means"] = means[1] / means[0]
        for bank in banks:
            bank.close()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    table = Table("bank", f"ms at {sizes[0]:,}", f"ms at {sizes[1]:,}", "ratio", "of means")
    for row in rows:
        ratios = f"{row['ratio']:.2f}", f"{row['ratio_of_means']:.2f}"
        table.add_row(row["bank"], *(f"{each:.2f}" for each in row["ms"]), *ratios)
    Console().print(table)
    return rows


def peak_resident() -> int:
    """Return the most bytes that this process has had in memory."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss starts, on Linux, with what the parent had
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def read_randomly(path: Path, mapped: bool, queries: int) -> None:
    """Open a bank, read from all layers, print what that took; run in a process of its own."""
    before = peak_resident()
    begin = time.perf_counter()
    bank = MemoryBank.open(path, read_only=True, mmap=mapped)
    opened = time.perf_counter() - begin
    heads = bank._shapes[0].kv_heads
    begin = time.perf_counter()
    bank.search(0, torch.randn(heads, 1, DIM), 16)
    first = time.perf_counter() - begin
    read, begin = 0, time.perf_counter()
    for _ in range(queries // 256):
        for layer in bank.memory_layers:
            rows = torch.randint(0, bank.num_chunks, (heads, 256 * 16))
            read += sum(part.nbytes for part in bank.gather(layer, rows, bank.generation))
            bank.search(layer, torch.randn(heads, 4, DIM), 16)
    seconds, peak = time.perf_counter() - begin, peak_resident()
    print(
        json.dumps(
            {"open": opened, "first_search": first, "seconds": seconds, "read": read, "peak": peak, "before": before}
        )
    )


def measure_opening(given: argparse.Namespace, folder: Path) -> list[dict]:
    path = folder / "bank"
    with MemoryBank.create(path, memory_layers=range(given.layers), chunk_size=CHUNK, index="flat") as bank:
        size = fill(bank, given.tokens, given.layers, given.heads).nbytes
    search_keys = given.layers * given.heads * given.tokens // CHUNK * DIM * 4
    limit = size // 2
    rows = []
    for name, options, queries in (
        ("opened, one search", [], 0),
        ("read at random, mapped", [], given.queries),
        ("read at random, `mmap=False`", ["--unmapped"], given.queries),
    ):
        command = [sys.executable, __file__, "read", "--folder", str(path), *options]
        results = [
            json.loads(subprocess.run([*command, "--queries", str(queries)], capture_output=True, check=True).stdout)
            for _ in range(3 if not queries else 1)
        ]
        rows.append({"what": name, **{key: statistics.median(each[key] for each in results) for key in results[0]}})
    print(
        f"A bank of {given.tokens:,} tokens, {given.layers} layers, {given.heads} heads of {DIM}: {size / MEGABYTE:,.0f} MB "
        f"on disk, of which {search_keys / MEGABYTE:,.0f} MB search keys; limit {limit / MEGABYTE:,.0f} MB."
    )
    table = Table("", "open s", "first search s", "MB read", "in s", "peak resident MB", "program alone MB")
    for row in rows:
        read, peak, before = (f"{row[key] / MEGABYTE:,.0f}" for key in ("read", "peak", "before"))
        times = f"{row['open']:.3f}", f"{row['first_search']:.2f}", read, f"{row['seconds']:.1f}"
        table.add_row(row["what"], *times, peak, before)
    Console().print(table)
    print("under the limit" if rows[-1]["peak"] < limit else "OVER THE LIMIT")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["add", "open", "read"], help="`read` is what `open` runs in other processes")
    parser.add_argument("--tokens", type=int, help="default: 10,000,000 for add, 1,000,000 for open")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, help="default: 1 for add, 3 for open")
    parser.add_argument("--rounds", type=int, default=60, help="measured writes")
    parser.add_argument("--queries", type=int, default=20_480, help="queries of 16 chunks to read")
    parser.add_argument("--unmapped", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="for the banks; default: a temporary one")
    given = parser.parse_args()
    if given.what == "read":
        read_randomly(given.folder, not given.unmapped, given.queries)
        return
    given.tokens = given.tokens or (10_000_000 if given.what == "add" else 1_000_000)
    given.heads = given.heads or (1 if given.what == "add" else 3)
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        (measure_adding if given.what == "add" else measure_opening)(given, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
