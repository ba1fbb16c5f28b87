"""Metrics from the records of a run: a score for each item, seed, system and measure, then means with intervals."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from longmem.evaluation.in_context.rules import calibrated_label, likeliest_label, prefix_rule
from longmem.evaluation.in_context.running import wrong_memory_of
from longmem.evaluation.in_context.sets import SETS
from longmem.evaluation.in_context.settings import InContextSettings
from longmem.evaluation.intervals import resamples
from longmem.evaluation.runs import compare_accuracies
from longmem.evaluation.squad import exact_match, f1

Record = Mapping[str, Any]
Score = Callable[[Record, Record], float]  # an answer, the preparation it was asked after -> 0 to 1

# By the names that tables give them, the one of the paper first.
RULES: dict[str, Score] = {
    "prefix rule": lambda record, _: prefix_rule(record["likeliest"], _words(record)[record["gold"]]),
    "label words": lambda record, _: likeliest_label(record["logprobs"]) == record["gold"],
    "calibrated": lambda record, prepared: (
        calibrated_label(record["logprobs"], prepared["content_free"]) == record["gold"]
    ),
}
ANSWERS: dict[str, Score] = {
    "F1": lambda record, _: f1(record["prediction"], record["golds"]),
    "exact match": lambda record, _: exact_match(record["prediction"], record["golds"]),
}


def measures_of(name: str) -> dict[str, Score]:
    """Return the measures of a set."""
    return RULES if name in SETS else ANSWERS


def compute_metrics(settings: InContextSettings, records: Sequence[Record]) -> dict[str, Any]:
    """Return the metrics of a finished run.

    `sets` has for each set and measure what `compare_accuracies` returns, with `seeds`, the percentage of each seed, and
    `deviation`, their standard deviation as numpy's `std` computes it (divided by the number of seeds). The scores
    that are compared are means over seeds, one for each item: intervals are over items, deviations over seeds. `average`
    is the mean over the classification sets, each counting the same.
    """
    sets: dict[str, dict[str, Any]] = {name: _set_metrics(settings, name, records) for name in settings.sets}
    labelled = {name: sets[name] for name in settings.labelled}
    average = {rule: _average(settings, labelled, records, rule) for rule in RULES} if labelled else {}
    if labelled:
        measure, main = "accuracy by the prefix rule", average["prefix rule"]
        chance = statistics.fmean(values["majority"] for values in labelled.values())
    else:
        measure, main, chance = "F1", sets["squad"]["measures"]["F1"], None
    found = {
        system: {name: values[name] for name in ("title", "value", "interval")}
        for system, values in main["systems"].items()
    }
    summary = {"measure": measure, "chance": chance, "systems": found}
    return {"summary": summary, "average": average, "sets": sets}


def _set_metrics(settings: InContextSettings, name: str, records: Sequence[Record]) -> dict[str, Any]:
    own = [record for record in records if record["set"] == name]
    answers = [record for record in own if "item" in record]
    prepared = [record for record in own if "item" not in record]
    items = {record["item"]: record for record in answers}
    found: dict[str, Any] = {
        "items": len(items),
        "wrong_memory": wrong_memory_of(name, settings.sets),
        "demonstrations": {
            system: {
                "window": _mean(own, system, "window_demonstrations"),
                "read": _mean(prepared, system, "read_demonstrations"),
                "read_tokens": _mean(prepared, system, "read_tokens"),
                "preparing_seconds": _mean(prepared, system, "preparing_seconds"),
            }
            for system in settings.systems
        },
        "measures": {
            measure: _comparison(settings, own, measure, score) for measure, score in measures_of(name).items()
        },
    }
    if name in SETS:
        found["majority"] = 100 * max(Counter(record["gold"] for record in items.values()).values()) / len(items)
    return found


def _comparison(settings: InContextSettings, own: Sequence[Record], measure: str, score: Score) -> dict[str, Any]:
    by_seed = _scores(settings, own, score)
    answers = {record["item"]: record for record in own if "item" in record}
    groups = [str(answers[item]["group"]) for item in sorted(answers)]
    means = {system: torch.tensor(seeds, dtype=torch.float64).mean(dim=0).tolist() for system, seeds in by_seed.items()}
    seconds = {
        system: sum(record.get("seconds", 0.0) for record in own if record["system"] == system) / len(settings.seeds)
        for system in settings.systems
    }
    comparison = compare_accuracies(means, groups, seconds=seconds, seed=settings.seed)
    for system, seeds in by_seed.items():
        comparison["systems"][system] |= _over_seeds([100 * statistics.fmean(values) for values in seeds])
    return comparison


def _scores(settings: InContextSettings, own: Sequence[Record], score: Score) -> dict[str, list[list[float]]]:
    """Return by system, for each seed, the scores of the items in their order."""
    prepared = {(record["system"], record["seed"]): record for record in own if "item" not in record}
    found: dict[tuple[str, int], dict[int, float]] = {key: {} for key in prepared}
    for record in own:
        if "item" in record:
            key = record["system"], record["seed"]
            found[key][record["item"]] = float(score(record, prepared[key]))
    return {
        system: [[found[system, seed][item] for item in sorted(found[system, seed])] for seed in settings.seeds]
        for system in settings.systems
    }


def _average(
    settings: InContextSettings, labelled: Mapping[str, Any], records: Sequence[Record], rule: str
) -> dict[str, Any]:
    """Return the means over sets, and intervals from resampling the items of each set on their own."""
    sums = dict.fromkeys(settings.systems, torch.zeros(10_000, dtype=torch.float64))
    for place, name in enumerate(labelled):
        own = [record for record in records if record["set"] == name]
        groups = {record["item"]: record["group"] for record in own if "item" in record}
        units = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
        at = torch.tensor([units[groups[item]] for item in sorted(groups)])
        sizes = torch.zeros(len(units), dtype=torch.float64).index_add_(0, at, torch.ones(len(at), dtype=torch.float64))
        picks = resamples(len(units), 10_000, settings.seed + place)
        for system, seeds in _scores(settings, own, RULES[rule]).items():
            means = 100 * torch.tensor(seeds, dtype=torch.float64).mean(dim=0)
            totals = torch.zeros(len(units), dtype=torch.float64).index_add_(0, at, means)
            sums[system] = sums[system] + totals[picks].sum(dim=1) / sizes[picks].sum(dim=1)
    baseline = settings.systems[0]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    found: dict[str, Any] = {}
    for system in settings.systems:
        parts = [values["measures"][rule]["systems"][system] for values in labelled.values()]
        found[system] = {
            "title": parts[0]["title"],
            "value": statistics.fmean(part["value"] for part in parts),
            "interval": torch.quantile(sums[system] / len(labelled), ends).tolist(),
            "above_baseline": statistics.fmean(part["above_baseline"] for part in parts),
            "above_baseline_interval": torch.quantile((sums[system] - sums[baseline]) / len(labelled), ends).tolist(),
            "seconds_per_item": statistics.fmean(part["seconds_per_item"] for part in parts),
            **_over_seeds([statistics.fmean(seed) for seed in zip(*(part["seeds"] for part in parts), strict=True)]),
        }
    return {"baseline": baseline, "sets": len(labelled), "systems": found}


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    return {"seeds": list(values), "deviation": statistics.pstdev(values)}


def _mean(records: Sequence[Record], system: str, name: str) -> float:
    return statistics.fmean(record[name] for record in records if record["system"] == system and name in record)


def _words(record: Record) -> tuple[str, ...]:
    return SETS[record["set"]].words
