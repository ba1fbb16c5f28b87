"""Accuracies of a run, from its records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longmem.evaluation.chapterbreak.baselines import BASELINES
from longmem.evaluation.chapterbreak.scoring import credit, margin
from longmem.evaluation.chapterbreak.settings import ChapterBreakSettings
from longmem.evaluation.intervals import clustered_mean
from longmem.evaluation.results import title_of_system
from longmem.evaluation.runs import compare_accuracies, groups_of

SCORINGS = {"per_token": "per token", "sum": "summed"}


def values_of(record: Mapping[str, Any], scoring: str) -> list[float]:
    """Return what a record ranks its suffixes by: log-likelihoods per token or summed, or the values of a baseline."""
    if "values" in record:
        return record["values"]
    if scoring == "sum":
        return record["sums"]
    return [total / count for total, count in zip(record["sums"], record["tokens"], strict=True)]


def summarize_chapterbreak(settings: ChapterBreakSettings, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return accuracies in percent for every length of context and both scorings, with intervals over works.

    `margins` has, for each length and system, by how many nats per token the right suffix is above the mean of the others,
    and how far that is above the margin of memory off (or of the first system, where `off` was left out).
    """
    contexts, margins = {}, {}
    for length in sorted(settings.contexts):
        here = groups_of([record for record in records if length in record["contexts"]], "system")
        # In the same order of examples for all, whatever the order in which a stopped run wrote them.
        ordered = {
            name: sorted(here[name], key=lambda record: (record["work"], record["number"]))
            for name in (*settings.systems, *BASELINES)
            if name in here
        }
        works = [record["work"] for record in next(iter(ordered.values()))]
        seconds = {
            name: sum(record["seconds"] for record in own) for name, own in ordered.items() if name not in BASELINES
        }
        contexts[str(length)] = {
            scoring: compare_accuracies(
                {name: [credit(values_of(record, scoring)) for record in own] for name, own in ordered.items()},
                works,
                baseline="backbone" if "backbone" in ordered else None,
                seconds=seconds,
                titles=BASELINES,
                seed=settings.seed,
            )
            for scoring in SCORINGS
        }
        margins[str(length)] = compare_margins(ordered, works, settings.seed)
    asked = groups_of(records, "system")["longest"]
    chance = 100 * sum(1 / len(record["values"]) for record in asked) / len(asked)
    longest = contexts[str(max(settings.contexts))][settings.scoring]
    summary = {
        name: {key: values[key] for key in ("title", "value", "interval")}
        for name, values in longest["systems"].items()
    }
    return {
        "examples": len(asked),
        "works": len({record["work"] for record in asked}),
        "chance": chance,
        "scoring": settings.scoring,
        "contexts": contexts,
        "margins": margins,
        "summary": {"measure": "accuracy", "chance": chance, "systems": summary},
    }


def compare_margins(
    records: Mapping[str, Sequence[Mapping[str, Any]]], works: Sequence[str], seed: int
) -> dict[str, Any]:
    """Return the mean margin of each system, and how far it is above that of the baseline on the same examples."""
    margins = {
        name: [margin(values_of(record, "per_token")) for record in own]
        for name, own in records.items()
        if name not in BASELINES
    }
    baseline = "off" if "off" in margins else next(iter(margins))
    systems = {}
    for name, own in margins.items():
        differences = [value - other for value, other in zip(own, margins[baseline], strict=True)]
        systems[name] = {"margin": clustered_mean(own, works, seed=seed)}
        systems[name]["above_baseline"] = clustered_mean(differences, works, seed=seed)
    return {"baseline": baseline, "systems": systems}


def margin_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of margins, its head first: of the right suffix above the mean of the wrong ones."""
    baseline = next(iter(metrics["margins"].values()))["baseline"]
    rows = [["", "context", "margin, nats per token", f"above {baseline} (95 %)"]]
    for length, found in metrics["margins"].items():
        for name, values in found["systems"].items():
            own, above = (
                f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
                for value, low, high in (values["margin"], values["above_baseline"])
            )
            rows.append([title_of_system(name), f"{int(length):,}", own, "" if name == found["baseline"] else above])
    return rows


def chapterbreak_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Return the table, its head first: a row for each system and length of context, then the baselines without a model."""
    scoring = metrics["scoring"]
    contexts = metrics["contexts"]
    baseline = next(iter(contexts.values()))[scoring]["baseline"]
    measures = [f"{title}, % (95 %)" for title in SCORINGS.values()]
    rows = [["", "context", *measures, f"{SCORINGS[scoring]}, above {baseline} (95 %)", "s per item"]]
    for length, comparisons in contexts.items():
        systems = [name for name in comparisons[scoring]["systems"] if name not in BASELINES]
        rows += [_row(name, f"{int(length):,}", comparisons, scoring) for name in systems]
    longest = list(contexts.values())[-1]
    return [*rows, *(_row(name, "", longest, scoring) for name in BASELINES)]


def _row(name: str, length: str, comparisons: Mapping[str, Any], scoring: str) -> list[str]:
    found = {each: comparisons[each]["systems"][name] for each in SCORINGS}
    own = found[scoring]
    cells = [f"{each['value']:.1f} ({each['interval'][0]:.1f} to {each['interval'][1]:.1f})" for each in found.values()]
    if name in BASELINES:
        return [own["title"], length, cells[0], "", "", ""]
    low, high = own["above_baseline_interval"]
    is_baseline = name == comparisons[scoring]["baseline"]
    above = "" if is_baseline else f"{own['above_baseline']:+.1f} ({low:+.1f} to {high:+.1f})"
    return [own["title"], length, *cells, above, f"{own['seconds_per_item']:.2f}"]
