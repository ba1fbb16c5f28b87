"""What the records say: lm-eval's metrics by task and system, with intervals where a metric is a mean over items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.metrics import mean

from longmem.evaluation.harness.settings import HarnessSettings
from longmem.evaluation.harness.tasks import Tasks
from longmem.evaluation.results import markdown_table, title_of_system
from longmem.evaluation.runs import accuracy_rows, compare_accuracies

ACCURACIES = ("acc_norm", "acc", "exact_match")  # what is drawn, the first that a task has


def summarize(records: Sequence[Mapping[str, Any]], tasks: Tasks, settings: HarnessSettings) -> dict[str, Any]:
    """Return the metrics of a run: by task, then by metric (`metric,filter` where a task has filters of its own).

    A metric that is a mean of numbers from 0 to 1 is compared with intervals over groups of items (`compare_accuracies`);
    of any other there is lm-eval's value alone. `summary`, for reports, is the first accuracy of the first task that has one.
    """
    found: dict[str, Any] = {"tasks": {}}
    for name, task in tasks.items():
        own = [record for record in records if record["task"] == name]
        found["tasks"][name] = {}
        for kind in dict.fromkeys(record["filter"] for record in own):
            by_system = {
                system: sorted(
                    (each for each in own if (each["system"], each["filter"]) == (system, kind)),
                    key=lambda record: record["doc_id"],
                )
                for system in settings.systems
            }
            for metric, aggregate in task.aggregation().items():
                title = metric if kind == "none" else f"{metric},{kind}"
                found["tasks"][name][title] = compare(by_system, metric, aggregate, settings.seed)
    panels = accuracies_of(found)
    if panels:
        name, panel = next(iter(panels.items()))
        found["summary"] = {"measure": name, "systems": panel["systems"]}
    return found


def compare(
    records: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, aggregate: Any, seed: int
) -> dict[str, Any]:
    """Return the values of a metric by system; with intervals if it is a mean of numbers from 0 to 1."""
    values = {system: [record["metrics"][metric] for record in own] for system, own in records.items()}
    seconds = {system: sum(record["seconds"] for record in own) for system, own in records.items()}
    if aggregate is mean and all(is_share(value) for own in values.values() for value in own):
        groups = [record["group"] for record in next(iter(records.values()))]
        return compare_accuracies(values, groups, seconds=seconds, seed=seed)
    return {
        "systems": {
            system: {
                "title": title_of_system(system),
                "value": float(aggregate(own)),
                "items": len(own),
                "seconds_per_item": seconds[system] / len(own),
            }
            for system, own in values.items()
        }
    }


def is_share(value: Any) -> bool:
    """Return whether a value of one item is a number from 0 to 1."""
    return isinstance(value, (int, float)) and 0 <= value <= 1


def accuracies_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is drawn: of every task that has one, its first accuracy."""
    panels = {}
    for task, found in metrics["tasks"].items():
        names = [name for kind in ACCURACIES for name in found if name.partition(",")[0] == kind]
        names = [name for name in names if "baseline" in found[name]]
        if names:
            panels[f"{task}: {names[0]}"] = found[names[0]]
    return panels


def tables(metrics: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Return a table for each task and metric, by its heading."""
    found = {}
    for task, by_metric in metrics["tasks"].items():
        for metric, comparison in by_metric.items():
            found[f"{task}: {metric}"] = (
                accuracy_rows(comparison, metric) if "baseline" in comparison else rows(comparison)
            )
    return found


def rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of a metric without intervals, its head first."""
    body = [
        [values["title"], f"{values['value']:.4f}", f"{values['seconds_per_item']:.2f}"]
        for values in comparison["systems"].values()
    ]
    return [["", "value", "s per item"], *body]


def markdown(metrics: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    return "\n".join(f"## {heading}\n\n{markdown_table(table)}\n" for heading, table in tables(metrics).items())
