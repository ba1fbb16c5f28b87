"""Tables and figure panels of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longmem.evaluation.in_context.sets import SETS
from longmem.evaluation.results import markdown_table

NOTE = """\
Each number is the mean over seeds, ± its standard deviation over seeds (divided by their number, as numpy's std), with the
95 % interval over items in brackets (over articles for squad). The last column is without the seconds for reading
demonstrations into memory; those in the window are run again for every 256 items (32 for squad)."""
RULES_NOTE = """\
Prefix rule: the likeliest token, blanks aside, begins the label word (LongMem's released script). Label words: the
likeliest of the label words. Calibrated: the same after contextual calibration (Zhao et al. 2021)."""


def table_of(
    measures: Mapping[str, Mapping[str, Any]], majority: float | None = None, *, brief: bool = False
) -> list[list[str]]:
    """Return a row for each system, its head first, and one for the most frequent label.

    Args:
        measures: of one set, by name, or their averages.
        majority: percentage of the most frequent label, None for none.
        brief: leave out intervals and differences, so that a terminal of 80 columns holds the table.
    """
    first = next(iter(measures.values()))
    baseline = first["systems"][first["baseline"]]["title"]
    names = list(measures)
    above = [] if brief else [f"{names[0]} above {baseline}"]
    rows = [["", *(f"{name}, %" for name in names), *above, "s per item"]]
    for system, values in first["systems"].items():
        row = [values["title"]]
        for comparison in measures.values():
            own = comparison["systems"][system]
            low, high = own["interval"]
            row.append(
                f"{own['value']:.1f} ± {own['deviation']:.1f}" + ("" if brief else f" ({low:.1f} to {high:.1f})")
            )
        if not brief:
            low, high = values["above_baseline_interval"]
            same = system == first["baseline"]
            row.append("" if same else f"{values['above_baseline']:+.1f} ({low:+.1f} to {high:+.1f})")
        row.append(f"{values['seconds_per_item']:.2f}")
        rows.append(row)
    if majority is not None:
        rows.append(["most frequent label", *[f"{majority:.1f}"] * len(names), *[""] * (len(above) + 1)])
    return rows


def all_tables(metrics: Mapping[str, Any], *, brief: bool = False) -> dict[str, list[list[str]]]:
    """Return the tables of a run by their titles: the average over classification sets where there are several, each set."""
    tables = {}
    labelled = {name: values for name, values in metrics["sets"].items() if name in SETS}
    if len(labelled) > 1:
        majority = sum(values["majority"] for values in labelled.values()) / len(labelled)
        tables[f"mean of {', '.join(labelled)}"] = table_of(metrics["average"], majority, brief=brief)
    for name, values in metrics["sets"].items():
        title = f"{name}, {values['items']:,} items"
        if any("wrong" in each["systems"] for each in values["measures"].values()):
            title += f"; the wrong memory holds {values['wrong_memory']}"
        tables[title] = table_of(values["measures"], values.get("majority"), brief=brief)
    return tables


def demonstration_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Return what each system had before a question, its head first; means over seeds."""
    rows = [["set, system", "in the window", "read", "tokens read", "s to read"]]
    for name, values in metrics["sets"].items():
        titles = {system: own["title"] for system, own in next(iter(values["measures"].values()))["systems"].items()}
        for system, own in values["demonstrations"].items():
            numbers = [f"{own['window']:.1f}", f"{own['read']:,.0f}", f"{own['read_tokens']:,.0f}"]
            rows.append([f"{name}, {titles[system]}", *numbers, f"{own['preparing_seconds']:.1f}"])
    return rows


def markdown_of(metrics: Mapping[str, Any]) -> str:
    """Return all tables in Markdown, with notes."""
    notes = [NOTE, *([RULES_NOTE] if metrics["average"] else [])]
    parts = [f"**{title}**\n\n{markdown_table(rows)}" for title, rows in all_tables(metrics).items()]
    shown = f"**Demonstrations before a question**\n\n{markdown_table(demonstration_rows(metrics))}"
    return "\n\n".join([*parts, shown, *notes]) + "\n"


def panels_of(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the panels of the figure: for each set its first measure."""
    panels = {}
    for name, values in metrics["sets"].items():
        measure = next(iter(values["measures"]))
        chance = f", most frequent label {values['majority']:.1f}" if "majority" in values else ""
        panels[f"{name}: {measure}{chance}"] = values["measures"][measure]
    return panels
