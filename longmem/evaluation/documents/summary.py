"""What the losses of documents say: perplexities by length, and what memory saves by the distance of what is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from longmem.evaluation.book_tables import estimate, reduction
from longmem.evaluation.documents.distances import DISTANCES, distance_groups
from longmem.evaluation.documents.scores import DocumentScores
from longmem.evaluation.documents.settings import PerplexitySettings
from longmem.evaluation.documents.text_bytes import bits_per_byte
from longmem.evaluation.documents.texts import LENGTHS, length_group
from longmem.evaluation.intervals import bootstrap_interval, perplexity_estimate, ratio_of_means
from longmem.evaluation.results import title_of_system

ALL = "all documents"


def summarize_documents(documents: Sequence[DocumentScores], settings: PerplexitySettings) -> dict[str, Any]:
    """Return the metrics of an evaluation on documents.

    `lengths` compares the systems on the documents of each group of lengths, and on all: a perplexity is e to the mean, over
    documents, of the mean loss of their scored tokens, so that each document counts the same; bits per byte are the mean
    over documents. `distances` has the loss saved against memory off (without it, the backbone) by how far back stands what
    a token repeats; there each token counts the same. Intervals hold 95 % and are over documents; those of a single document
    over its windows (`units` 1: of one window, there is none).
    """
    groups = {name: [each for each in documents if length_group(each.num_tokens) == name] for name in LENGTHS}
    parts = {name: own for name, own in groups.items() if own} | {ALL: list(documents)}
    lengths = {name: compare_documents(own, settings) for name, own in parts.items()}
    return {
        "baseline": baseline_of(settings),
        "lengths": lengths,
        "distances": gains_by_distance(documents, settings),
        "summary": {
            "measure": "perplexity",
            "systems": {
                system: {"title": title_of_system(system), **values["perplexity"]}
                for system, values in lengths[ALL]["systems"].items()
            },
        },
    }


def baseline_of(settings: PerplexitySettings) -> str:
    """Return the system that the others are compared with: the backbone or, where it was left out, the first."""
    return "backbone" if "backbone" in settings.systems else settings.systems[0]


def units_of(documents: Sequence[DocumentScores]) -> list[DocumentScores]:
    """Return what intervals are over: documents; of a single one, its windows."""
    return list(documents) if len(documents) > 1 else documents[0].by_window()


def mean_losses(units: Sequence[DocumentScores], system: str) -> Float[Tensor, " units"]:
    """Return the mean loss of each unit, in nats per token."""
    return torch.stack([unit.losses[system].double().mean() for unit in units])


def compare_documents(documents: Sequence[DocumentScores], settings: PerplexitySettings) -> dict[str, Any]:
    """Return perplexity, reduction against the baseline, bits per byte and cost of each system on some documents."""
    units, seed = units_of(documents), settings.seed
    scored = sum(each.num_scored for each in documents)
    baseline = mean_losses(units, baseline_of(settings))
    found = {}
    for system in settings.systems:
        losses = mean_losses(units, system)
        totals = [(unit.losses[system].double().sum().item(), int(unit.num_bytes.sum())) for unit in units]
        bits = torch.tensor([bits_per_byte(nats, count) for nats, count in totals if count], dtype=torch.float64)
        seconds, preparing = (
            sum(getattr(each, name)[system] for each in documents) / scored for name in ("seconds", "preparing_seconds")
        )
        found[system] = {
            "loss": losses.mean().item(),
            "perplexity": estimate(perplexity_estimate(losses, seed)),
            "reduction_percent": estimate(reduction(losses, baseline, seed)),
            "bits_per_byte": estimate((bits.mean().item(), *bootstrap_interval(bits, seed=seed))),
            "seconds_per_token": seconds,
            "preparing_seconds_per_token": preparing,
            "documents": {each.document_id: math.exp(each.losses[system].double().mean()) for each in documents},
        }
    return {
        "documents": len(documents),
        "tokens": sum(each.num_tokens for each in documents),
        "scored_tokens": scored,
        "scored_bytes": sum(int(each.num_bytes.sum()) for each in documents),
        "systems": found,
    }


def gains_by_distance(documents: Sequence[DocumentScores], settings: PerplexitySettings) -> dict[str, Any] | None:
    """Return what systems save against memory off, in nats per token, by the distance of what is needed.

    None where there is neither "off" nor "backbone" to compare with.
    """
    against = next((system for system in ("off", "backbone") if system in settings.systems), None)
    others = [system for system in settings.systems if system not in ("off", "backbone")]
    if against is None or not others:
        return None
    found: dict[str, Any] = {}
    for number, name in enumerate(DISTANCES):
        own = masked(documents, number, settings.ngram)
        if len(own) == 1:
            own = masked(own[0][0].by_window(), number, settings.ngram)
        gains = {system: mean_gain(own, against, system, settings.seed) for system in others} if own else {}
        count = sum(int(mask.sum()) for _, mask in own)
        found[name] = {"tokens": count, "units": len(own), "systems": gains}
    return {"against": against, "ngram": settings.ngram, "groups": found}


def masked(
    units: Sequence[DocumentScores], group: int, ngram: int
) -> list[tuple[DocumentScores, Bool[Tensor, " _scored"]]]:
    """Return the units that have tokens of a group of distances, and which tokens these are."""
    masks = [distance_groups(unit.distances, unit.positions, unit.starts, ngram) == group for unit in units]
    return [(unit, mask) for unit, mask in zip(units, masks, strict=True) if mask.any()]


def mean_gain(
    units: Sequence[tuple[DocumentScores, Bool[Tensor, " _scored"]]], against: str, system: str, seed: int
) -> dict[str, Any]:
    """Return the mean over tokens of what a system saves, and its interval over units."""
    sums = [(unit.losses[against] - unit.losses[system])[mask].double().sum() for unit, mask in units]
    counts = [mask.double().sum() for _, mask in units]
    gain = ratio_of_means(torch.stack(sums), torch.stack(counts), seed=seed)
    assert gain is not None  # every unit has tokens of the group
    return estimate(gain)
