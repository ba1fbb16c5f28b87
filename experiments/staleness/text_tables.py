"""From the records of real texts with a stale memory to tables: what each policy loses against a bank written anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.staleness.grouping import groups_of
from longmem.evaluation.intervals import clustered_mean
from longmem.evaluation.tables import markdown_table

Record = Mapping[str, Any]

TITLES = {"off": "memory off", "oracle": "bank written anew", "never": "old bank, read as it is"}


def summarize_stale_texts(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Return for each change of the encoder what every system loses, in nats a token, and what it costs.

    `value`: the mean loss over windows; `against_fresh`: that minus the loss with a bank written anew, and `gain`: the loss
    without memory minus that, both with intervals that resample whole texts (each tuned encoder's reading of a text is one).
    `recall`: share of the chunks that the fresh bank gives, for the same queries; `tokens`: encoded for a text.
    """
    changes = {}
    for rate, own in groups_of(records, "learning_rate").items():
        by_system = groups_of(own, "system")
        references = {name: {unit(each): each for each in by_system[name]} for name in ("off", "oracle")}
        systems = {}
        for name, found in by_system.items():
            units = [unit(each) for each in found for _ in each["losses"]]
            against = [
                loss - other
                for each in found
                for loss, other in zip(each["losses"], references["oracle"][unit(each)]["losses"], strict=True)
            ]
            gains = [
                other - loss
                for each in found
                for loss, other in zip(each["losses"], references["off"][unit(each)]["losses"], strict=True)
            ]
            losses = [loss for each in found for loss in each["losses"]]
            value, *interval = clustered_mean(losses, units, seed=seed)
            systems[name] = {
                "title": TITLES.get(name, name),
                "value": value,
                "interval": interval,
                "against_fresh": clustered_mean(against, units, seed=seed),
                "gain": clustered_mean(gains, units, seed=seed),
                "recall": mean([recall for each in found for recall in each["recalls"] or ()]),
                "tokens": mean([each["tokens"] for each in found]),
                "seconds": mean([each["seconds"] for each in found]),
            }
        gaps = [each["gap"] for each in by_system["never"]]
        changes[f"{float(rate):g}"] = {"gap": mean(gaps), "readings": len(by_system["never"]), "systems": systems}
    return {"changes": changes}


def text_sections(metrics: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Return the heading and the table of each change of the encoder."""
    found = []
    for rate, change in metrics["changes"].items():
        rows = [["", "loss", "gain over memory off", "above a fresh bank", "same chunks, %", "tokens", "s"]]
        for values in change["systems"].values():
            recall = "" if values["recall"] is None else f"{100 * values['recall']:.0f}"
            numbers = (f"{values['value']:.3f}", estimate(values["gain"]), estimate(values["against_fresh"]))
            rows.append([values["title"], *numbers, recall, f"{values['tokens']:,.0f}", f"{values['seconds']:.0f}"])
        heading = f"Tuned at {rate}: gap {change['gap']:.4f}, {change['readings']} readings of a text"
        found.append((heading, rows))
    return found


def text_markdown(metrics: Mapping[str, Any]) -> str:
    """Return all tables for `table.md`."""
    return "\n".join(f"**{heading}**\n\n{markdown_table(rows)}\n" for heading, rows in text_sections(metrics))


def unit(record: Record) -> str:
    """Return what tells one tuned encoder's reading of a text from all others."""
    return f"{record['seed']}/{record['text']}"


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, None of nothing."""
    return sum(values) / len(values) if values else None


def estimate(values: Sequence[float]) -> str:
    """Return a difference with its interval.

    >>> estimate((0.1234, 0.1, 0.15))
    '+0.123 [+0.100, +0.150]'
    """
    value, low, high = values
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
