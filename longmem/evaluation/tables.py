"""How metrics are printed: one way for all evaluations, on a terminal and in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Rows = list[list[str]]
# By the head of a column what `summary.compare` returns (None: no column), and its unit.
Cells = Mapping[str, tuple[Mapping[str, Any] | None, str]]
PARITY = "Parity: of what the backbone gains from a text in its window, the share that memory gains from it"


def markdown_table(rows: Rows) -> str:
    """Return rows as a Markdown table; numbers are aligned right.

    >>> print(markdown_table([["", "loss"], ["off", "2.5"]]))
    |  | loss |
    |---|---:|
    | off | 2.5 |
    """
    head, *body = rows
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in body)])


def with_interval(value: float, ends: Sequence[float], form: str) -> str:
    """Return a value with its interval, if it has one.

    >>> with_interval(12.345, [12, 13], ".1f")
    '12.3 (12.0 to 13.0)'
    """
    return f"{value:{form}}" + (f" ({' to '.join(f'{end:{form}}' for end in ends)})" if ends else "")


def markdown(metrics: Mapping[str, Any]) -> str:
    """Return all tables and notes of what `summarize` returns."""
    parts = [f"## {heading}\n\n{markdown_table(rows)}" for heading, rows in tables_of(metrics)]
    return "\n\n".join([*parts, *metrics["notes"]]) + "\n"


def tables_of(metrics: Mapping[str, Any], *, brief: bool = False) -> list[tuple[str, Rows]]:
    """Return headings and tables, the head of each first, with systems in rows.

    Columns are measures or, where results have an axis of kind "column", its values. There is a table of means, then one of
    how far they are above the baseline. Brief ones leave out intervals and differences, so that most fit 80 columns.
    """
    panels: Sequence[Any] = next((axis["values"] for axis in metrics["axes"] if axis["kind"] == "panel"), [])
    column = next((axis for axis in metrics["axes"] if axis["kind"] == "column"), None)
    found: list[tuple[str, Rows]] = []
    for panel in [*([""] if len(panels) != 1 else []), *map(str, panels)]:
        if column is None:
            cells = {
                f"{each['title']}, {each['unit']}": (each["cells"].get(panel or "all"), each["unit"])
                for each in metrics["measures"].values()
            }
            found += tables_of_cells(metrics["systems"], panel or "All", cells, brief=brief)
        elif panel or not panels:
            for each in metrics["measures"].values():
                keys = {"all": panel or "all"}
                keys |= {str(value): ", ".join(filter(None, (panel, str(value)))) for value in column["values"]}
                cells = {head: (each["cells"].get(key), each["unit"]) for head, key in keys.items()}
                heading = f"{each['title']}, {each['unit']}, by {column['title']}"
                heading = f"{panel}: {heading}" if panel else heading
                found += tables_of_cells(metrics["systems"], heading, cells, brief=brief)
    found += metrics["tables"].items()
    if metrics.get("parity"):
        found.append((PARITY, parity_rows(metrics)))
    rows = [["", "s per item", "s of preparing", "tokens encoded"]]
    for name, own in metrics["costs"]["systems"].items():
        numbers = [f"{own['seconds_per_item']:.2f}", f"{own['preparing_seconds']:.1f}", f"{own['encoded_tokens']:,}"]
        rows.append([metrics["systems"][name], *numbers])
    return [*found, ("Costs; a memory is encoded for the first system that reads it", rows)]


def parity_rows(metrics: Mapping[str, Any]) -> Rows:
    """Return the table of what share memory has of what the backbone gains by the same text in its window, its head first."""
    rows = [["", "window", "the window gains", "memory gains", "share, %"]]
    for each in metrics["parity"]:
        said = "the window may gain nothing"
        if (share := each["share_percent"]) is not None:
            said = with_interval(share["value"], share["interval"], ".0f")
        gains = (f"{each[name]:+.3g}" for name in ("window_gain", "memory_gain"))
        size = f"{int(each['system'].partition('-')[2]):,}"
        rows.append([f"{each['of']}: {each['measure']}", size, *gains, said])
    return rows


def tables_of_cells(
    systems: Mapping[str, str], heading: str, cells: Cells, *, brief: bool = False
) -> Iterator[tuple[str, Rows]]:
    """Yield the table of means with 95 % intervals and that of differences; `systems` has their titles."""
    there = {head: (cell, unit) for head, (cell, unit) in cells.items() if cell is not None}
    if not there:
        return
    first = next(cell for cell, _ in there.values())
    chance = f", chance {first['chance']:.1f} %" if "chance" in first else ""
    for end in (chance,) if brief else (chance, f", above {systems[first['baseline']]}"):
        is_above = end != chance
        counts = [next(iter(cell["systems"].values()))["items"] for cell, _ in there.values()]
        heads = (f"{head} ({count:,} items)" for head, count in zip(there, counts, strict=True))
        rows = [["", *(there if brief else heads)]]
        for name, title in systems.items():
            found = [(cell["systems"].get(name), unit) for cell, unit in there.values()]
            if any(own for own, _ in found) and not (is_above and name == first["baseline"]):
                texts = ("" if own is None else spelled(own, unit, is_above) for own, unit in found)
                rows.append([title, *(text.partition(" (")[0] if brief else text for text in texts)])
        if len(rows) > 1:
            yield f"{heading}{end}", rows


def spelled(own: Mapping[str, Any], unit: str, is_above: bool = False) -> str:
    """Return a mean with its deviation and interval, as far as it has them, or how far it is above the baseline."""
    name, ends, sign = ("above_baseline", "above_baseline_interval", "+") if is_above else ("value", "interval", "")
    form = f"{sign}.{1 if unit == '%' else 3}f"
    deviation = f" ± {own['deviation']:{form}}" if "deviation" in own and not is_above else ""
    value, *interval = with_interval(own[name], own.get(ends, ()), form).partition(" (")
    return value + deviation + "".join(interval)
