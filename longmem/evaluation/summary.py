"""From records to figures: means with 95 % intervals over groups, by measure, by axis, by system."""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from longmem.evaluation.intervals import Estimate, as_values, ratio_of_means, stratified_mean
from longmem.evaluation.systems.making import is_longer_window
from longmem.evaluation.task import Axis, Measure, Record, Task


class Row(NamedTuple):
    """A score of one record, and what it is grouped and compared by."""

    system: str
    item: str
    group: str
    value: Any  # a number, unless the measure has an aggregate of its own
    chance: float | None
    seconds: float | None
    axes: Mapping[str, Any]


def summarize(task: Task, records: Sequence[Record]) -> dict[str, Any]:
    """Return the metrics of a finished run.

    `measures` has for each measure its title, unit and `cells`: by the values of axes, such as "passkey, 4096", and "all",
    what `compare` returns. `parity` says what share of the window's gain memory has. `axes` has the values of each axis,
    `tables` what the task adds, `costs` what systems cost.
    `summary` is the main figure, the first with intervals, if there is one. Raises ValueError if systems have not answered the
    same questions.
    """
    scored = scored_records(task, records)
    measures: dict[str, dict[str, Any]] = {}
    for name, measure in task.measures.items():
        counted = [(record, scores[name]) for record, scores in scored if name in scores]
        rows = [row for record, score in counted for row in rows_of(task, measure, record, score)]
        if rows:
            measures[name] = {"title": measure.title, "unit": measure.unit, "cells": cells_of(task, measure, rows)}
    axes = []
    for axis in task.axes:
        values = ordered(axis, (value for record, _ in scored for value in values_of(record, axis)))
        axes.append({"name": axis.name, "kind": axis.kind, "title": axis.title or axis.name, "values": values})
    return {
        "task": task.name,
        **summary_of([each for name, each in measures.items() if task.measures[name].aggregate is None]),
        "systems": {name: task.title_of(name) for name in dict.fromkeys(record["system"] for record, _ in scored)},
        "measures": measures,
        "parity": [
            {"of": cell, "measure": f"{measure['title']}, {measure['unit']}", "system": system, **own}
            for measure in measures.values()
            for cell, values in measure["cells"].items()
            for system, own in values.get("parity", {}).items()
        ],
        "axes": axes,
        "baselines": list(task.baselines),
        "tables": dict(task.tables(records)),
        "costs": costs_of(records),
        "notes": list(task.notes),
    }


def summary_of(measures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the main figure of the first measure under "summary"; nothing where there is no measure."""
    if not measures:
        return {}
    cells = measures[0]["cells"]
    cell = cells.get("all") or list(cells.values())[-1]
    shown = {name: {key: own[key] for key in ("title", "value", "interval")} for name, own in cell["systems"].items()}
    chance = {"chance": cell["chance"]} if "chance" in cell else {}
    return {"summary": {"measure": f"{measures[0]['title']}, {measures[0]['unit']}", **chance, "systems": shown}}


def scored_records(task: Task, records: Sequence[Record]) -> list[tuple[Record, Mapping[str, float]]]:
    """Return every answer with its scores, by systems in the order of tables and then by `sort_by`."""
    prepared = {(each["case"], each["system"]): each for each in records if "item" not in each}
    found = []
    for record in records:
        if "item" in record:
            whole = {**prepared.get((record.get("case"), record["system"]), {}), **record}
            found.append((whole, task.score(whole)))
    known = [*task.settings.systems, *dict.fromkeys(record["system"] for record, _ in found), *task.baselines]
    places = {name: place for place, name in enumerate(dict.fromkeys(known))}
    return sorted(found, key=lambda each: (places[each[0]["system"]], *(each[0][name] for name in task.sort_by)))


def rows_of(task: Task, measure: Measure, record: Record, score: float) -> Iterable[Row]:
    """Yield a row for each combination of axis values that a record stands for."""
    scale = 100 if measure.unit == "%" else 1
    is_guess = record["system"] in task.baselines
    chance = 100 * task.chance(record) if measure.has_chance and not is_guess else None
    value = scale * score if measure.aggregate is None else score
    common = (record["system"], record["item"], record["group"], value, chance, record.get("seconds"))
    for values in itertools.product(*(values_of(record, axis) for axis in task.axes)):
        yield Row(*common, {axis.name: value for axis, value in zip(task.axes, values, strict=True)})


def values_of(record: Record, axis: Axis) -> Sequence[Any]:
    """Return the values of an axis that a record stands for."""
    return value if isinstance(value := record[axis.name], list | tuple) else [value]


def ordered(axis: Axis, values: Iterable[Any]) -> list[Any]:
    """Return the different values of an axis in its order."""
    found = list(dict.fromkeys(values))
    if axis.values:
        return [value for value in axis.values if value in found]
    return sorted(found) if all(isinstance(value, int | float) for value in found) else found


def cells_of(task: Task, measure: Measure, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the comparison of all rows, of each value of the first axis, of each pair of values of the first two ..."""
    axes = [axis for axis in task.axes if axis.kind != "repeat"]
    repeat = next((axis for axis in task.axes if axis.kind == "repeat"), None)
    cells = {}
    for depth in range(1 if task.pool == "none" else 0, len(axes) + 1):
        used = axes[:depth]
        strata = axes[0].name if depth == 0 and task.pool == "panels" else None
        with_intervals = not used or used[-1].kind != "detail"
        values = [ordered(axis, (row.axes[axis.name] for row in rows)) for axis in used]
        for chosen in itertools.product(*values):
            own = [row for row in rows if tuple(row.axes[axis.name] for axis in used) == chosen]
            if own:
                key = ", ".join(map(str, chosen)) or "all"
                cells[key] = compare(task, measure, own, strata=strata, repeat=repeat, with_intervals=with_intervals)
    return cells


def compare(
    task: Task,
    measure: Measure,
    rows: Sequence[Row],
    *,
    strata: str | None = None,
    repeat: Axis | None = None,
    with_intervals: bool = True,
) -> dict[str, Any]:
    """Return for each system the mean, or what the measure makes of all scores, and how far it is above the baseline.

    Intervals hold 95 % and are over groups, whose items are not independent; where there is one group, over its items. Of
    `strata`, an axis, all values count the same, however many items they have. Of `repeat`, an axis of draws, there are the
    values of each draw, and their standard deviation as numpy's `std` computes it. Where the backbone was also run with the
    text in its window, `parity` has for each such window `share_of_window`.
    """
    with_intervals = with_intervals and measure.aggregate is None
    systems = aligned(rows)
    first = next(iter(systems.values()))
    baseline = measure.baseline if measure.baseline in systems else next(iter(systems))
    groups = [row.group for row in first]
    groups = groups if len(set(groups)) > 1 else [row.item for row in first]
    parts = ["" if strata is None else str(row.axes[strata]) for row in first]

    def estimate(values: Sequence[float]) -> Estimate:
        if not with_intervals:
            return (statistics.fmean(values),) * 3
        return stratified_mean(values, groups, parts, seed=task.settings.seed)

    found: dict[str, Any] = {}
    for name, own in systems.items():
        values, others = ([row.value for row in each] for each in (own, systems[baseline]))
        if measure.aggregate is None:
            value, *ends = estimate(values)
            above, *above_ends = estimate([one - other for one, other in zip(values, others, strict=True)])
        else:
            value, ends, above_ends = float(measure.aggregate(values)), [], []
            above = value - float(measure.aggregate(others))
        found[name] = {"title": task.title_of(name), "value": value, "interval": ends}
        found[name] |= {"above_baseline": above, "above_baseline_interval": above_ends}
        if not with_intervals:
            del found[name]["interval"], found[name]["above_baseline_interval"]
        if repeat is not None:
            found[name]["repeats"] = repeats = means_of_repeats(own, repeat, strata)
            found[name]["deviation"] = statistics.pstdev(repeats.values())
        found[name]["items"] = len({row.item for row in own})
        seconds = [row.seconds for row in own if row.seconds is not None]
        if seconds:
            found[name]["seconds_per_item"] = statistics.fmean(seconds)
    chances = [row.chance for row in first if row.chance is not None]
    chance = {"chance": statistics.fmean(chances)} if chances else {}
    parity = {}
    if measure.aggregate is None and with_intervals and {"backbone", "off", "on"} <= systems.keys():
        sums = {name: torch.tensor(totals(own, groups, parts), dtype=torch.float64) for name, own in systems.items()}
        gain = sums["on"] - sums["off"]
        for name in filter(is_longer_window, systems):
            parity[name] = share_of_window(gain, sums[name] - sums["backbone"], seed=task.settings.seed)
    about = {"baseline": baseline, "groups": len({row.group for row in first}), **chance}
    return about | {"systems": found} | ({"parity": parity} if parity else {})


def totals(rows: Sequence[Row], groups: Sequence[str], parts: Sequence[str]) -> list[float]:
    """Return the sum of each group's scores, scaled so that the sum of all is the mean over parts of their means."""
    sizes = Counter(parts)
    found: dict[tuple[str, str], float] = {}
    for row, group, part in zip(rows, groups, parts, strict=True):
        found[part, group] = found.get((part, group), 0.0) + row.value / sizes[part] / len(sizes)
    return list(found.values())


def share_of_window(memory: Float[Tensor, " units"], window: Float[Tensor, " units"], *, seed: int) -> dict[str, Any]:
    """Return what share memory's gain has of the window's, with the interval, in percent; None: the window may gain nothing.

    `memory`: memory on less memory off; `window`: the backbone with the text in its window less without. Both are parts of
    the whole gains, one for each group.
    """
    share = ratio_of_means(100 * memory, window, seed=seed)
    gains = {"memory_gain": memory.sum().item(), "window_gain": window.sum().item()}
    return {"share_percent": None if share is None else as_values(share), **gains}


def aligned(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each system, all in the order of the first one's questions."""
    found: dict[str, dict[Any, Row]] = {}
    for row in rows:
        found.setdefault(row.system, {})[row.item, *row.axes.values()] = row
    order = list(next(iter(found.values())))
    for name, own in found.items():
        if own.keys() != set(order):
            raise ValueError(
                f"`records` must have the same questions for all systems, {len(order)}, got {len(own)} for {name}; finish it."
            )
    return {name: [own[key] for key in order] for name, own in found.items()}


def means_of_repeats(rows: Sequence[Row], repeat: Axis, strata: str | None) -> dict[str, float]:
    """Return the mean of each draw; with strata, the mean of their means."""
    found: dict[str, dict[Any, list[float]]] = {}
    for row in rows:
        parts = found.setdefault(str(row.axes[repeat.name]), {})
        parts.setdefault(None if strata is None else row.axes[strata], []).append(row.value)
    return {draw: statistics.fmean(map(statistics.fmean, parts.values())) for draw, parts in found.items()}


def costs_of(records: Sequence[Record]) -> dict[str, Any]:
    """Return what each system cost: seconds for each question, seconds of preparing in all, tokens encoded.

    A system has no more to encode than others have left: `seconds_per_encoded_token` is what memory costs all of them.
    """
    found: dict[str, Any] = {}
    for name in dict.fromkeys(record["system"] for record in records if "seconds" in record):
        own = [record for record in records if record["system"] == name]
        found[name] = {
            "seconds_per_item": statistics.fmean(record["seconds"] for record in own if "item" in record),
            "preparing_seconds": sum(record.get("preparing_seconds", 0.0) for record in own),
            "encoded_tokens": round(sum(record.get("encoded_tokens", 0.0) for record in own)),
        }
    encoding = [costs for costs in found.values() if costs["encoded_tokens"]]
    tokens = sum(costs["encoded_tokens"] for costs in encoding)
    seconds = sum(costs["preparing_seconds"] for costs in encoding)
    return {"systems": found, "seconds_per_encoded_token": seconds / tokens if tokens else None}
