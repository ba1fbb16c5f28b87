"""What a comparison shows: one line per family of tensors, what was skipped, and the worst figure."""

from pathlib import Path

from rich.console import Console

from longmem.console import plain_table
from longmem.official.comparison import FED, FLOAT32, ROUNDED, TOLERANCE, Comparison, compare
from longmem.official.recording import Recording
from longmem.official.replay import COUNTED, FAMILIES, UNKNOWN


def show_comparison(path: Path, console: Console) -> bool:
    """Compare with a recording and print the result; return whether this package agrees with it.

    Raises:
        ValueError: the recording can't be read or lacks a setting.
    """
    result = compare(Recording(path))
    print_comparison(result, console)
    return result.agrees


def print_comparison(result: Comparison, console: Console) -> None:
    """Print the table, the notes and, last, `worst <figure> over <n> runs`."""
    columns = (FLOAT32, ROUNDED, FED)
    rows = [["largest difference", *columns]]
    for family in (*FAMILIES, UNKNOWN):
        found = [result.largest.get((family, column)) for column in columns]
        if any(value is not None for value in found):
            rows.append([family, *("" if value is None else figure(family, value) for value in found)])
    console.print(plain_table(rows))
    console.print(f"\nReplayed: {', '.join(result.replayed) or 'nothing'}.")
    for run, reason in result.skipped.items():
        console.print(f"Skipped {run}: {reason}.", markup=False)
    console.print(
        "Differences are absolute; of scores relative to the largest one, of the loss per token. The last lines of the table "
        "are counts. Where there is padding, outputs are compared at tokens: the released memory layer lets padding see "
        "padding, this package does not. For the last column the runs with float16 rows are replayed again while the "
        "recorded float32 keys and values are written, so that no rounding of a row can fall another way. That column and "
        f"the first must be within {TOLERANCE:g}, and make the figure below."
    )
    console.print(f"worst {result.worst:.3g} over {len(result.replayed)} runs")


def figure(family: str, value: float) -> str:
    """Return a count or a difference as text."""
    return f"{value:.0f}" if family in (*COUNTED, UNKNOWN) else f"{value:.1e}"
