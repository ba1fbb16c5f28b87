"""What the records of question answering say: accuracies, F1 and likelihoods, with intervals over documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longmem.evaluation.intervals import clustered_mean
from longmem.evaluation.qa.locomo import ADVERSARIAL, CATEGORIES, locomo_exact_match, locomo_f1
from longmem.evaluation.qa.quality import chosen_letter, longest_option
from longmem.evaluation.results import title_of_system
from longmem.evaluation.runs import compare_accuracies, groups_of
from longmem.evaluation.systems import SYSTEM_NAMES

Records = Sequence[Mapping[str, Any]]
LONGEST = "longest"  # the option with the most characters, which needs no document


def summarize_qa(records: Records, task: str, style: str = "text", seed: int = 0) -> dict[str, Any]:
    """Return the metrics of a run."""
    return summarize_locomo(records, seed) if task == "locomo" else summarize_quality(records, style, seed)


# Multiple choice ------------------------------------------------------------------------------------------------------


def summarize_quality(records: Records, style: str = "text", seed: int = 0) -> dict[str, Any]:
    """Return the accuracies of multiple choice.

    The choice is the likeliest option: as text, per token and, beside it, summed; by letter there is one token. Of
    written answers it is the letter with which they begin.

    Args:
        records: of `evaluate_qa` or `answer_documents`.
        style: of the run.
        seed: of the intervals.
    """
    written = any("prediction" in record for record in records)
    rules: dict[str, Callable[[Mapping[str, Any]], int | None]] = {"per token": _best_per_token, "summed": _best_summed}
    if written or style == "letter":
        rules = {"by letter": _choice}
    systems = _aligned(records)
    first = next(iter(systems.values()))
    comparisons = {}
    for name, rule in rules.items():
        scores = {system: [_is_right(record, rule(record)) for record in own] for system, own in systems.items()}
        scores[LONGEST] = [_is_right(record, longest_option(record["options"])) for record in first]
        comparisons[name] = _compare(scores, first, records, seed)
    chance = 100 * sum(1 / len(record["options"]) for record in first) / len(first)
    return {
        "task": "quality",
        "questions": len(first),
        "chance": chance,
        "accuracy": comparisons,
        "costs": _costs(records),
        "summary": _summary("accuracy", next(iter(comparisons.values())), chance=chance),
    }


def _choice(record: Mapping[str, Any]) -> int | None:
    return chosen_letter(record["prediction"]) if "prediction" in record else _best_summed(record)


def _best_summed(record: Mapping[str, Any]) -> int:
    return record["logprobs"].index(max(record["logprobs"]))


def _best_per_token(record: Mapping[str, Any]) -> int:
    means = [total / count for total, count in zip(record["logprobs"], record["tokens"], strict=True)]
    return means.index(max(means))


def _is_right(record: Mapping[str, Any], choice: int | None) -> float:
    options = record["options"]
    return float(choice is not None and choice < len(options) and options[choice] == record["gold"])


# Written answers ------------------------------------------------------------------------------------------------------


def summarize_locomo(records: Records, seed: int = 0) -> dict[str, Any]:
    """Return F1 and exact match, of all questions and of each category, and the likelihood of the right answers.

    The likelihood is that of answerable questions: nats per token of an answer, then the mean over answers. It is missing
    where records have none.
    """
    systems = _aligned(records)
    first = next(iter(systems.values()))
    measures = {"f1": locomo_f1, "exact_match": locomo_exact_match}
    found: dict[str, Any] = {"task": "locomo", "questions": len(first)}
    for name, measure in measures.items():
        found[name] = {}
        for category in ("all", *CATEGORIES.values()):
            places = [place for place, each in enumerate(first) if category in ("all", each["category"])]
            if places:
                scores = {
                    system: [measure(own[i]["prediction"], own[i]["gold"], own[i]["category"]) for i in places]
                    for system, own in systems.items()
                }
                found[name][category] = _compare(scores, [first[place] for place in places], records, seed)
    if all("logprobs" in record for record in records):
        found["likelihood"] = _compare_likelihoods(records, seed)
    return {**found, "costs": _costs(records), "summary": _summary("F1", found["f1"]["all"])}


def _compare_likelihoods(records: Records, seed: int) -> dict[str, Any] | None:
    """Return the nats per answer token of each system and how far they are above the first's, over conversations."""
    answerable = [record for record in records if record["category"] != ADVERSARIAL]
    if not answerable:
        return None
    systems = _aligned(answerable)
    values = {name: [each["logprobs"][0] / each["tokens"][0] for each in own] for name, own in systems.items()}
    baseline = next(iter(values))
    groups = [record["document"] for record in systems[baseline]]
    found = {}
    for name, own in values.items():
        value, *ends = clustered_mean(own, groups, seed=seed)
        above, *above_ends = clustered_mean(
            [a - b for a, b in zip(own, values[baseline], strict=True)], groups, seed=seed
        )
        found[name] = {"title": _title(name), "value": value, "interval": ends}
        found[name] |= {"above_baseline": above, "above_baseline_interval": above_ends, "items": len(own)}
    return {"baseline": baseline, "groups": len(set(groups)), "systems": found}


# Both -----------------------------------------------------------------------------------------------------------------


def _aligned(records: Records) -> dict[str, list[Mapping[str, Any]]]:
    """Return the records of each system, all in the order of the first system's questions."""
    systems = groups_of(records, "system")
    order = [record["item"] for record in next(iter(systems.values()))]
    found = {}
    for name, own in systems.items():
        by_item = {record["item"]: record for record in own}
        if by_item.keys() != set(order):
            raise ValueError(
                f"`records` must have the same questions for all systems, {len(order)}, got {len(own)} for {name}; go on "
                "with the run until it is finished."
            )
        found[name] = [by_item[item] for item in order]
    return found


def _title(system: str) -> str:
    known = system in SYSTEM_NAMES or system.startswith("context-")
    return title_of_system(system) if known else system


def _compare(scores: dict[str, list[float]], first: Records, records: Records, seed: int) -> dict[str, Any]:
    titles = {system: _title(system) for system in scores} | {LONGEST: "longest option"}
    asked = {record["item"] for record in first}
    seconds = {
        system: sum(record["seconds"] for record in own if record["item"] in asked)
        for system, own in groups_of(records, "system").items()
    }
    groups = [record["document"] for record in first]
    return compare_accuracies(scores, groups, seconds=seconds, titles=titles, seed=seed)


def _costs(records: Records) -> dict[str, Any]:
    """Return seconds for each question, and seconds for each token of LongMem's encoding, shared by its systems."""
    found: dict[str, Any] = {}
    for system, own in groups_of(records, "system").items():
        found[system] = {
            "seconds_per_question": sum(record["seconds"] for record in own) / len(own),
            "preparing_seconds": sum(record.get("preparing_seconds", 0.0) for record in own),
            "encoded_tokens": round(sum(record.get("encoded_tokens", 0.0) for record in own)),
        }
    encoding = [costs for costs in found.values() if costs["encoded_tokens"]]
    tokens = sum(costs["encoded_tokens"] for costs in encoding)
    found["seconds_per_encoded_token"] = (
        sum(each["preparing_seconds"] for each in encoding) / tokens if tokens else None
    )
    return found


def _summary(measure: str, comparison: Mapping[str, Any], **others: float) -> dict[str, Any]:
    kept = ("title", "value", "interval")
    systems = {name: {key: each[key] for key in kept} for name, each in comparison["systems"].items()}
    return {"measure": measure, **others, "systems": systems}
