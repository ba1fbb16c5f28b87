"""From records to accuracies: by task, system, size of the memory and depth of the fact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longmem.evaluation.distance.asking import is_exact, is_right
from longmem.evaluation.results import markdown_table
from longmem.evaluation.runs import compare_accuracies, groups_of

Record = Mapping[str, Any]


def summarize_distance(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Return accuracies in percent, with 95 % intervals over trials, which are drawn independently.

    `summary`: over all tasks. `tasks`: for each the chance of a guess; comparisons of systems for every part (a size, or a
    file of LongEval) and for all parts, by choice and, if answers were written, by exact match; and `grid`, the accuracy of
    every system in each depth of each part.
    """
    ordered = sorted(records, key=lambda record: (record["size"], record["id"]))
    tasks = {}
    for task, own in groups_of(ordered, "task").items():
        by_part = groups_of(own, "part")
        tasks[task] = {
            "chance": chance(own),
            "all": compare(own, seed),
            "parts": {part: compare(inside, seed) for part, inside in by_part.items()},
            "grid": {
                system: {
                    part: {depth: percent_right(cell, system) for depth, cell in groups_of(inside, "depth").items()}
                    for part, inside in by_part.items()
                }
                for system in own[0]["systems"]
            },
        }
    choice = compare(ordered, seed)["choice"]
    return {"summary": {"measure": "accuracy", "chance": chance(ordered), **choice}, "tasks": tasks}


def compare(records: Sequence[Record], seed: int) -> dict[str, Any]:
    """Return the systems on these records: by choice, and by what they wrote if they did."""
    systems = list(records[0]["systems"])
    trials = [record["id"] for record in records]
    seconds = {system: sum(record["systems"][system]["seconds"] for record in records) for system in systems}
    scores = {system: [float(is_right(record, system)) for record in records] for system in systems}
    found = {"choice": compare_accuracies(scores, trials, seconds=seconds, seed=seed)}
    if all("text" in answer for record in records for answer in record["systems"].values()):
        exact = {system: [float(wrote_value(record, system)) for record in records] for system in systems}
        found["exact"] = compare_accuracies(exact, trials, seed=seed)
    return found


def wrote_value(record: Record, system: str) -> bool:
    """Return whether a system wrote the right value of a record."""
    return is_exact(record["systems"][system]["text"], record["values"][record["right"]])


def percent_right(records: Sequence[Record], system: str) -> float:
    """Return the share of records whose right value was a system's choice."""
    return 100 * sum(is_right(record, system) for record in records) / len(records)


def chance(records: Sequence[Record]) -> float:
    """Return the accuracy of a guess, in percent."""
    return 100 * sum(1 / len(record["values"]) for record in records) / len(records)


def sections(metrics: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Return a heading and a table for each task: systems in rows, sizes in columns, averaged over depths."""
    found = []
    for task, values in metrics["tasks"].items():
        parts, everything = values["parts"], values["all"]
        written = ["written exactly, all"] if "exact" in everything else []
        rows = [["", *parts, "all (95 %)", *written, "s per question"]]
        for system, own in everything["choice"]["systems"].items():
            row = [own["title"], *(f"{part['choice']['systems'][system]['value']:.1f}" for part in parts.values())]
            row.append(with_interval(own))
            if written:
                row.append(with_interval(everything["exact"]["systems"][system]))
            rows.append([*row, f"{own['seconds_per_item']:.2f}"])
        count = next(iter(everything["choice"]["systems"].values()))["items"]
        found.append((f"{task}: accuracy, %, of {count} trials (a guess: {values['chance']:.1f})", rows))
    return found


def with_interval(values: Mapping[str, Any]) -> str:
    """Return a percentage and its interval, as people read it."""
    low, high = values["interval"]
    return f"{values['value']:.1f} ({low:.1f} to {high:.1f})"


def markdown(metrics: Mapping[str, Any]) -> str:
    """Return all tables for `table.md`."""
    return "\n".join(f"**{heading}**\n\n{markdown_table(rows)}\n" for heading, rows in sections(metrics))
