"""Tables of what systems get right: accuracies, differences on the same items, seconds, all with intervals over groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longmem.evaluation.intervals import clustered_mean
from longmem.evaluation.results import title_of_system


def compare_accuracies(
    scores: Mapping[str, Sequence[float]],
    groups: Sequence[str],
    *,
    baseline: str | None = None,
    seconds: Mapping[str, float] | None = None,
    titles: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return for each system the mean score in percent, and how far it is above the baseline on the same items.

    Intervals hold 95 % and are over groups, such as works or documents, whose items are not independent.

    Args:
        scores: by system, from 0 to 1, one for each item.
        groups: of each item.
        baseline: a system; default: the first.
        seconds: of each system, for all items.
        titles: what systems that have no title of their own are called (`title_of_system`).
        seed: of the resamples.
    """
    baseline = next(iter(scores)) if baseline is None else baseline
    found: dict[str, Any] = {}
    for system, own in scores.items():
        if len(own) != len(groups):
            raise ValueError(f"`scores` must have one number per item, {len(groups)}, got {len(own)} for {system}.")
        value, low, high = clustered_mean([100 * score for score in own], groups, seed=seed)
        differences = [100 * (score - other) for score, other in zip(own, scores[baseline], strict=True)]
        above, *ends = clustered_mean(differences, groups, seed=seed)
        found[system] = {
            "title": (titles or {}).get(system) or title_of_system(system),
            "value": value,
            "interval": [low, high],
            "above_baseline": above,
            "above_baseline_interval": ends,
            "items": len(own),
        }
        if seconds is not None and system in seconds:
            found[system]["seconds_per_item"] = seconds[system] / len(own)
    return {"baseline": baseline, "groups": len(set(groups)), "systems": found}


def accuracy_rows(comparison: Mapping[str, Any], measure: str = "accuracy") -> list[list[str]]:
    """Return the table of `compare_accuracies`, its head first."""
    with_seconds = any("seconds_per_item" in values for values in comparison["systems"].values())
    baseline = comparison["systems"][comparison["baseline"]]["title"]
    rows = [["", f"{measure}, % (95 %)", f"above {baseline} (95 %)", *(["s per item"] if with_seconds else [])]]
    for system, values in comparison["systems"].items():
        low, high = values["interval"]
        row = [values["title"], f"{values['value']:.1f} ({low:.1f} to {high:.1f})"]
        low, high = values["above_baseline_interval"]
        same = system == comparison["baseline"]
        row.append("" if same else f"{values['above_baseline']:+.1f} ({low:+.1f} to {high:+.1f})")
        if with_seconds:
            row.append(f"{values['seconds_per_item']:.2f}" if "seconds_per_item" in values else "")
        rows.append(row)
    return rows
