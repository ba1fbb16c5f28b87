"""From the records of the policy table to what each policy recovers and costs, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from experiments.staleness.grouping import groups_of
from experiments.staleness.systems import SYSTEMS
from longmem.evaluation.intervals import Estimate, bootstrap_interval, ratio_of_means

Record = Mapping[str, Any]

TITLES = {
    "swap": "another encoder",
    "fine-tune": "the encoder fine-tuned",
    "shared": "one search over all documents",
    "selected": "the document named",
}


def summarize_policies(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Return for each regime and way of asking what every system gives, means over seeds with 95 % intervals.

    `loss` in nats; `accuracy` and `found` (questions whose last token read the chunk with the answer) from 0 to 1; `recovered`
    is (loss of never - loss) / (loss of never - loss of eager), and `recovered_later` the same over the second half of the
    stream; `cost` is tokens encoded again / those of eager; `seconds` are of the processor. Recovered is None where eager
    gains nothing for sure. `per_seed` has the same for each seed.
    """
    tables = {}
    for regime, inside in groups_of(records, "regime").items():
        for asking, own in groups_of(inside, "asking").items():
            tables[f"{regime}/{asking}"] = {
                "regime": regime,
                "asking": asking,
                "title": f"{TITLES[regime]}; {TITLES[asking]}",
                "seeds": [record["seed"] for record in own if record["system"] == "never"],
                "systems": compare_systems(own, seed),
            }
    return {"tables": tables}


def compare_systems(records: Sequence[Record], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return the numbers of each system of one regime and way of asking.

    Raises:
        ValueError: a system has not the seeds of the others.
    """
    by_system = groups_of(records, "system")
    seeds = [record["seed"] for record in by_system["never"]]
    for system, own in by_system.items():
        if [record["seed"] for record in own] != seeds:
            raise ValueError(
                f"`records` must have seeds {seeds} of every system, got others of {system!r}; finish the run."
            )
    never, eager = by_system["never"], by_system["eager"]
    found = {}
    for system, own in by_system.items():
        ratios = {
            "recovered": shares(never, eager, own, half=None),
            "recovered_later": shares(never, eager, own, half=1),
            "cost": [(tokens_of(record), tokens_of(whole)) for record, whole in zip(own, eager, strict=True)],
        }
        numbers = {
            "loss": [mean_of(record, "losses") for record in own],
            "accuracy": [mean_of(record, "right") for record in own],
            "found": [mean_of(record, "found") for record in own],
            "seconds": [record["seconds"] for record in own],
        }
        found[system] = {
            "title": SYSTEMS[system].title,
            **{name: mean_estimate(values, seed) for name, values in numbers.items()},
            **{name: ratio_estimate(pairs, seed) for name, pairs in ratios.items()},
            "per_seed": {
                **numbers,
                **{
                    name: [above / below if below else None for above, below in pairs] for name, pairs in ratios.items()
                },
            },
            "same_bank_as_eager": all(one["bank"] == other["bank"] for one, other in zip(own, eager, strict=True)),
            "same_answers_as_eager": all(
                one["losses"] == other["losses"] for one, other in zip(own, eager, strict=True)
            ),
            "map_gains": [gain for record in own for gain in record["gains"]],
            "map_neighbours": [kept for record in own for kept in record["neighbours"]],
            "maps_used": sum(bool(record["mapped"]) for record in own),
        }
    return found


def shares(
    never: Sequence[Record], eager: Sequence[Record], own: Sequence[Record], half: int | None
) -> list[tuple[float, float]]:
    """Return for each seed the nats that a system recovers, and those that there are to recover."""
    return [
        (
            mean_of(lost, "losses", half) - mean_of(record, "losses", half),
            mean_of(lost, "losses", half) - mean_of(whole, "losses", half),
        )
        for lost, whole, record in zip(never, eager, own, strict=True)
    ]


def mean_of(record: Record, name: str, half: int | None = None) -> float:
    """Return the mean over the questions of a record, or over the first (0) or second (1) half of them."""
    numbers = record[name]
    middle = len(numbers) // 2
    part = numbers if half is None else numbers[:middle] if half == 0 else numbers[middle:]
    return float(sum(part) / len(part))


def tokens_of(record: Record) -> float:
    """Return the tokens that were encoded again by the end of the stream."""
    return float(record["tokens"][-1])


def mean_estimate(values: Sequence[float], seed: int) -> Estimate:
    """Return the mean of one number per seed, and its interval."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return (numbers.mean().item(), *bootstrap_interval(numbers, seed=seed))


def ratio_estimate(pairs: Sequence[tuple[float, float]], seed: int) -> Estimate | None:
    """Return the ratio of the means of one pair per seed, and its interval; None where the second may be nothing."""
    above, below = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    return ratio_of_means(above, below, seed=seed)


def policy_sections(metrics: Mapping[str, Any], *, intervals: bool = True) -> list[tuple[str, list[list[str]]]]:
    """Return a heading and a table for each regime and way of asking; without intervals they fit a terminal."""
    head = ["", "loss", "right, %", "recovered", "2nd half", "cost", "read, %", "s"]
    found = []
    for table in metrics["tables"].values():
        rows = [head]
        for values in table["systems"].values():
            columns = {
                "loss": (1, 3),
                "accuracy": (100, 1),
                "recovered": (1, 2),
                "recovered_later": (1, 2),
                "cost": (1, 2),
            }
            shown = [as_text(values[name], *form, intervals) for name, form in {**columns, "found": (100, 1)}.items()]
            rows.append([values["title"], *shown, f"{values['seconds'][0]:.1f}"])
        found.append((f"{table['title']} ({len(table['seeds'])} seeds)", rows))
    return found


def as_text(estimate: Sequence[float] | None, factor: float, digits: int, with_interval: bool = True) -> str:
    """Return a number with its interval for people; nothing for None, and no interval where it is a point.

    >>> as_text((0.5, 0.25, 1.0), 100, 0), as_text((1.0, 1.0, 1.0), 1, 2), as_text((-0.001, -0.1, 0.1), 1, 2, False)
    ('50 (25 to 100)', '1.00', '0.00')
    """
    if estimate is None:
        return ""
    value, low, high = (f"{round(factor * each, digits) + 0.0:.{digits}f}" for each in estimate)  # + 0.0: no "-0.00"
    return value if low == high or not with_interval else f"{value} ({low} to {high})"
