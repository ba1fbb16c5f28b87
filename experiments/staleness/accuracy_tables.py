"""From the records of the learning and the content experiment to tables of accuracies, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from experiments.staleness.grouping import groups_of
from experiments.staleness.policy_tables import as_text, mean_estimate

Record = Mapping[str, Any]

DECOUPLED = "old banks"  # a record of the learning experiment that is no system: `decoupled.FreshnessResult`

# What is in a column of the learning table, by the names of `LearningResult`.
KINDS = {
    "fresh": "right, %",
    "aged": "aged bank",
    "first": "first bank",
    "off": "no memory",
    "windowed": "in window",
}


def summarize_content(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Return for each way to read superseded content the shares of right answers and of older values, in percent."""
    systems = {}
    for name, own in groups_of(records, "system").items():
        right, older = (mean_estimate([percent(record[kind]) for record in own], seed) for kind in ("right", "older"))
        systems[name] = {"title": name, "value": right[0], "interval": right[1:], "right": right, "older": older}
    return {"summary": {"measure": "newest value given, %", "systems": systems}}


def content_sections(metrics: Mapping[str, Any], *, intervals: bool = True) -> list[tuple[str, list[list[str]]]]:
    """Return the heading and the table of the content experiment."""
    rows = [["", "newest value, %", "an older one, %"]]
    for values in metrics["summary"]["systems"].values():
        rows.append([values["title"], *(as_text(values[kind], 1, 1, intervals) for kind in ("right", "older"))])
    return [("Keys that have had several values", rows)]


def summarize_learning(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Return what readers have learned beside still and moving writers, and what their training does to old banks.

    Accuracies are in percent; `curve` is the mean over seeds of the accuracy in each step of training.
    """
    by_system = groups_of(records, "system")
    decoupled = by_system.pop(DECOUPLED, [])
    systems = {}
    for name, own in by_system.items():
        kinds = {kind: mean_estimate([percent(record["answers"][kind]) for record in own], seed) for kind in KINDS}
        systems[name] = {
            "title": name,
            "value": kinds["fresh"][0],
            "interval": kinds["fresh"][1:],
            **kinds,
            "drift": mean_estimate([record["drift"] for record in own], seed),
            "curve": torch.tensor([record["curve"] for record in own]).mean(dim=0).tolist(),
        }
    return {
        "summary": {"measure": "right answers, %", "systems": systems},
        "decoupled": {
            "steps": decoupled[0]["steps"] if decoupled else 0,
            "same_encoder": all(record["same_encoder"] for record in decoupled),
            "changed_numbers": sum(record["changed_numbers"] for record in decoupled),
            "stored_numbers": sum(record["stored_numbers"] for record in decoupled),
            "losses": {
                kind: mean_estimate([record["losses"][kind] for record in decoupled], seed)
                for kind in (decoupled[0]["losses"] if decoupled else ())
            },
        },
    }


def learning_sections(metrics: Mapping[str, Any], *, intervals: bool = True) -> list[tuple[str, list[list[str]]]]:
    """Return headings and tables of the learning experiment."""
    rows = [["", *KINDS.values(), "keys moved"]]
    for values in metrics["summary"]["systems"].values():
        shares = [as_text(values[kind], 1, 1, intervals) for kind in KINDS]
        rows.append([values["title"], *shares, as_text(values["drift"], 1, 3, intervals)])
    found = [("Learning to read a memory whose writer stands still or moves", rows)]
    decoupled = metrics["decoupled"]
    if decoupled["losses"]:
        titles = {
            "before": "before training",
            "after": "after it, the old banks",
            "anew": "after it, banks written anew",
        }
        losses = [[titles[kind], as_text(loss, 1, 4, intervals)] for kind, loss in decoupled["losses"].items()]
        changed, stored = decoupled["changed_numbers"], decoupled["stored_numbers"]
        encoder = "the same" if decoupled["same_encoder"] else "another"
        heading = (
            f"After {decoupled['steps']} steps of the side network: {changed:,} of {stored:,} stored numbers changed, the "
            f"encoder is {encoder}"
        )
        found.append((heading, [["", "loss of held-out questions, nats"], *losses]))
    return found


def percent(right: Sequence[bool]) -> float:
    """Return the share that is true, in percent."""
    return 100 * sum(right) / len(right)
