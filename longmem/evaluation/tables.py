"""How metrics are printed: one way for all evaluations, on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Rows = list[list[str]]


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


def markdown(metrics: Mapping[str, Any]) -> str:
    """Return all tables and notes of what `summarize` returns."""
    parts = [f"## {heading}\n\n{markdown_table(rows)}" for heading, rows in tables_of(metrics)]
    return "\n\n".join([*parts, *metrics["notes"]]) + "\n"


def tables_of(metrics: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """Return headings and tables, the head of each first: systems in rows, measures or values of an axis in columns."""
    panels: Sequence[Any] = next((axis["values"] for axis in metrics["axes"] if axis["kind"] == "panel"), [])
    column = next((axis for axis in metrics["axes"] if axis["kind"] == "column"), None)
    found = []
    for panel in ["", *map(str, panels)]:
        if column is None:
            found += list(measure_tables(metrics["measures"], panel))
        elif panel or not panels:
            for measure in metrics["measures"].values():
                found += list(column_tables(metrics["systems"], measure, panel, column))
    found += metrics["tables"].items()
    if metrics["costs"]["systems"]:
        found.append(("Costs", cost_rows(metrics)))
    return found


def measure_tables(measures: Mapping[str, Any], panel: str) -> Iterator[tuple[str, Rows]]:
    """Yield the table of a panel, or of all of them: a column for each measure, then what the first is above its baseline."""
    cells = {
        name: each["cells"][panel or "all"] for name, each in measures.items() if (panel or "all") in each["cells"]
    }
    if not cells:
        return
    first = next(iter(cells))
    baseline = cells[first]["baseline"]
    title = cells[first]["systems"][baseline]["title"]
    rows = [["", *(head_of(measures[name]) for name in cells), f"above {title} (95 %)", "s per item"]]
    for system, own in cells[first]["systems"].items():
        row = [own["title"]]
        row += [
            spelled(cell["systems"][system], measures[name]["unit"]) if system in cell["systems"] else ""
            for name, cell in cells.items()
        ]
        row.append("" if system == baseline else spelled_above(own, measures[first]["unit"]))
        row.append(f"{own['seconds_per_item']:.2f}" if "seconds_per_item" in own else "")
        rows.append(row)
    yield heading_of([panel], cells[first]), rows


def column_tables(
    systems: Mapping[str, str], measure: Mapping[str, Any], panel: str, column: Mapping[str, Any]
) -> Iterator[tuple[str, Rows]]:
    """Yield a measure by the values of an axis, and how far it is above the baseline."""
    cells = {"all": measure["cells"].get(panel or "all")}
    cells |= {
        str(value): measure["cells"].get(", ".join(filter(None, (panel, str(value))))) for value in column["values"]
    }
    there = {name: cell for name, cell in cells.items() if cell is not None}
    if not there:
        return
    last = next(iter(there.values()))
    baseline = last["baseline"]
    for is_above in (False, True):
        rows = [["", *(f"{name} ({items_of(cell)})" for name, cell in there.items())]]
        for system, title in systems.items():
            found = [cell["systems"].get(system) for cell in there.values()]
            if any(found) and not (is_above and system == baseline):
                spell = spelled_above if is_above else spelled
                rows.append([title, *("" if own is None else spell(own, measure["unit"]) for own in found)])
        above = f"above {systems[baseline]}" if is_above else ""
        by = f"{head_of(measure)} by {column['title']} (items)"
        if len(rows) > 1:
            yield heading_of([panel, by, above], last, with_items=False), rows


def cost_rows(metrics: Mapping[str, Any]) -> Rows:
    """Return what each system cost."""
    costs = metrics["costs"]
    rows = [["", "s per item", "s of preparing", "tokens encoded"]]
    for name, own in costs["systems"].items():
        numbers = [f"{own['seconds_per_item']:.2f}", f"{own['preparing_seconds']:.1f}", f"{own['encoded_tokens']:,}"]
        rows.append([metrics["systems"][name], *numbers])
    return rows


def head_of(measure: Mapping[str, Any]) -> str:
    """Return the head of a column."""
    return f"{measure['title']}, {measure['unit']} (95 %)"


def items_of(cell: Mapping[str, Any]) -> int:
    """Return the items of a comparison."""
    return next(iter(cell["systems"].values()))["items"]


def heading_of(words: Sequence[str], cell: Mapping[str, Any], *, with_items: bool = True) -> str:
    """Return the heading of a table."""
    parts = [word for word in words if word] or ["All"]
    parts += [f"{items_of(cell):,} items"] if with_items else []
    parts += [f"chance {cell['chance']:.1f} %"] if "chance" in cell else []
    return ", ".join(parts)


def spelled(own: Mapping[str, Any], unit: str) -> str:
    """Return a mean with its interval, and with its deviation where there is one."""
    digits = 1 if unit == "%" else 3
    text = f"{own['value']:.{digits}f}"
    if "deviation" in own:
        text += f" ± {own['deviation']:.{digits}f}"
    return (
        text
        if "interval" not in own
        else f"{text} ({own['interval'][0]:.{digits}f} to {own['interval'][1]:.{digits}f})"
    )


def spelled_above(own: Mapping[str, Any], unit: str) -> str:
    """Return how far a mean is above the baseline, with the interval."""
    digits = 1 if unit == "%" else 3
    low, high = own["above_baseline_interval"]
    return f"{own['above_baseline']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
