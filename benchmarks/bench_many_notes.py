"""What many small documents cost: opening a bank on disk, its memory, and one more document, one less, and the list of all.

    python benchmarks/bench_many_notes.py [--notes 1000 100000] [--tokens 5] [--folder FOLDER] [--output FILE.json]

For each number of notes a bank is written, in transactions of a thousand. Then a process of its own opens it: memory is what
the process holds above what it held with all modules imported, and at its end the bank has been opened, listed and searched.
Notes are added and deleted one by one, each a commit of its own that waits for the disk; medians are printed. Times are those
of the clock and, in brackets, of the processor: on a busy machine only the second can be compared.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longmem import MemoryBank
from longmem.settings.environment import environment

HEADS, DIM = 3, 64
AT_ONCE = 1000


def write(bank: MemoryBank, number: int, tokens: int) -> None:
    """Add one note, with its text."""
    states = torch.randn(HEADS, tokens, DIM)
    ends = [4 * (place + 1) for place in range(tokens)]
    bank.add(f"note {number}", [states], [states], range(tokens), text="abc " * tokens, char_ends=ends, tags=["note"])


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that a call takes, by the clock and of the processor."""
    start = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def resident() -> int:
    """Return the bytes that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


def measure_opening(folder: Path) -> dict[str, object]:
    """Return what it costs a process of its own to open a bank, list it and search it."""
    before, banks = resident(), []
    found: dict[str, object] = {"imported_bytes": before}
    found["open"] = seconds(lambda: banks.append(MemoryBank.open(folder, read_only=True)))
    found["opened_bytes"] = resident() - before
    found["list"] = seconds(banks[0].documents)
    found["info"] = seconds(lambda: banks[0].info("note 7"))
    found["search"] = seconds(lambda: banks[0].search(0, torch.ones(HEADS, 1, DIM), 4))
    found["used_bytes"] = resident() - before
    return found


def measure(folder: Path, notes: int, tokens: int, rounds: int) -> dict[str, object]:
    """Return all figures of a bank of so many notes."""
    with MemoryBank.create(folder, memory_layers=[0], chunk_size=4) as bank:
        for start in track(range(0, notes, AT_ONCE), f"writing {notes:,} notes"):
            with bank.transaction():
                for number in range(start, min(notes, start + AT_ONCE)):
                    write(bank, number, tokens)
    command = [sys.executable, __file__, "--measure-opening", str(folder)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    found["file_bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with MemoryBank.open(folder) as bank:
        added = [seconds(lambda number=number: write(bank, number, tokens)) for number in range(notes, notes + rounds)]
        deleted = [seconds(lambda number=number: bank.delete(f"note {number}")) for number in range(rounds)]
    for name, times in (("add", added), ("delete", deleted)):
        found[name] = [statistics.median(each) for each in zip(*times, strict=True)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", nargs="+", type=int, default=[1000, 100_000])
    parser.add_argument("--tokens", type=int, default=5, help="of each note")
    parser.add_argument("--rounds", type=int, default=64, help="notes that are added, and deleted, one by one")
    parser.add_argument("--folder", type=Path, help="where the banks are written, on the disk to be measured")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    parser.add_argument("--measure-opening", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure_opening:
        print(json.dumps(measure_opening(given.measure_opening)))
        return
    torch.manual_seed(0)
    place = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        rows = {count: measure(place / f"{count}", count, given.tokens, given.rounds) for count in given.notes}
    finally:
        shutil.rmtree(place)
    table = Table(
        "notes", "open s", "MB opened", "MB used", "list ms", "search ms", "add ms", "delete ms", "MB on disk"
    )
    for count, row in rows.items():
        table.add_row(
            f"{count:,}",
            "{:.2f} ({:.2f})".format(*row["open"]),
            *(f"{row[name] / 1e6:.0f}" for name in ("opened_bytes", "used_bytes")),
            *(
                "{:.1f} ({:.1f})".format(*(1e3 * each for each in row[name]))
                for name in ("list", "search", "add", "delete")
            ),
            f"{row['file_bytes'] / 1e6:.0f}",
        )
    Console(width=140).print(table)
    if given.output:
        content = {"settings": vars(given), "environment": environment(), "rows": rows}
        given.output.write_text(json.dumps(content, default=str) + "\n")


if __name__ == "__main__":
    main()
