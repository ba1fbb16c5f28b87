"""Tables of question answering, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longmem.evaluation.results import markdown_table
from longmem.evaluation.runs import accuracy_rows


def sections(metrics: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Return the tables for people: heading and rows, the head first."""
    if metrics["task"] == "quality":
        return [
            (f"Accuracy, {rule}, chance {metrics['chance']:.0f} %", accuracy_rows(comparison))
            for rule, comparison in metrics["accuracy"].items()
        ]
    found = [
        ("F1, all questions", accuracy_rows(metrics["f1"]["all"], "F1")),
        ("Exact match, all questions", accuracy_rows(metrics["exact_match"]["all"], "exact match")),
        ("F1 by category (number of questions)", _category_rows(metrics["f1"])),
    ]
    if metrics.get("likelihood"):
        found.append(("Log-likelihood of right answers", _likelihood_rows(metrics["likelihood"])))
    return found


def _category_rows(panels: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    baseline = panels["all"]["baseline"]
    heads = [f"{name} ({panel['systems'][baseline]['items']})" for name, panel in panels.items()]
    rows = [["", *heads]]
    for system, values in panels["all"]["systems"].items():
        cells = (panel["systems"][system] for panel in panels.values())
        texts = [f"{each['value']:.1f} ({each['interval'][0]:.1f} to {each['interval'][1]:.1f})" for each in cells]
        rows.append([values["title"], *texts])
    return rows


def _likelihood_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    baseline = comparison["systems"][comparison["baseline"]]["title"]
    rows = [["", "nats per answer token (95 %)", f"above {baseline} (95 %)"]]
    for system, values in comparison["systems"].items():
        low, high = values["interval"]
        row = [values["title"], f"{values['value']:.3f} ({low:.3f} to {high:.3f})"]
        low, high = values["above_baseline_interval"]
        same = system == comparison["baseline"]
        rows.append([*row, "" if same else f"{values['above_baseline']:+.3f} ({low:+.3f} to {high:+.3f})"])
    return rows


def markdown(metrics: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    return "\n".join(f"## {heading}\n\n{markdown_table(rows)}\n" for heading, rows in sections(metrics))


def panels_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the figure shows, a panel each."""
    return metrics["accuracy"] if metrics["task"] == "quality" else metrics["f1"]
