"""What losses say: perplexities by part, reductions, cost, and what memory saves by the distance of what is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from longmem.evaluation.intervals import (
    as_values,
    bootstrap_interval,
    perplexity_estimate,
    perplexity_reduction,
    ratio_of_means,
)
from longmem.evaluation.perplexity.scores import TextScores
from longmem.evaluation.perplexity.settings import PerplexitySettings
from longmem.evaluation.perplexity.tokens import DISTANCES, bits_per_byte, distance_groups
from longmem.evaluation.perplexity.windows import Cut
from longmem.evaluation.systems.names import title_of_system

# The groups of the paper's table, and documents that are shorter than its shortest; each ends before so many tokens.
LENGTHS = {
    "under 5k tokens": 5_000,
    "5k to 10k": 10_000,
    "10k to 100k": 100_000,
    "100k to 500k": 500_000,
    "500k to 1M": 1_000_000,
    "over 1M": None,
}
ALL = "all documents"
# Each pair: by how much is the perplexity of the first below that of the second.
COMPARISONS = (("on", "backbone"), ("on", "off"), ("on", "wrong"), ("wrong", "off"))

Masked = tuple[TextScores, Bool[Tensor, " _scored"]]  # a document or a window, and some of its tokens


def length_group(num_tokens: int) -> str:
    """Return the group of documents of this length.

    >>> [length_group(count) for count in (4_999, 5_000, 2_000_000)]
    ['under 5k tokens', '5k to 10k', 'over 1M']
    """
    return next(name for name, end in LENGTHS.items() if end is None or num_tokens < end)


def summarize_texts(texts: Sequence[Mapping[Cut, TextScores]], settings: PerplexitySettings) -> dict[str, Any]:
    """Return the metrics of an evaluation.

    `parts` each compare the systems on some windows: of the documents of each group of lengths, and of all; of all books, for
    each cut all windows, and the first ones where only these were scored with longer contexts. A perplexity is e to the mean,
    over texts, of the mean loss of their scored tokens, so that each text counts the same; bits per byte are the mean over
    texts. `distances`, of documents, has the loss saved against memory off (without it, the backbone) by how far back stands
    what a token repeats; there each token counts the same. Intervals hold 95 % and are over texts; those of a single text over
    its windows (`units` 1: of one window, there is none).
    """
    if settings.plan == "books":
        parts, distances = book_parts(texts, settings), None
    else:
        documents = [next(iter(each.values())) for each in texts]
        parts, distances = document_parts(documents, settings), gains_by_distance(documents, settings)
    shown = parts[ALL] if ALL in parts else next(iter(parts.values()))
    systems = {
        name: {"title": title_of_system(name), **values["perplexity"]} for name, values in shown["systems"].items()
    }
    summary = {"measure": "perplexity", "systems": systems}
    about = {"plan": settings.plan, "baseline": settings.baseline}
    return {**about, "parts": parts, "distances": distances, "summary": summary}


def document_parts(documents: Sequence[TextScores], settings: PerplexitySettings) -> dict[str, Any]:
    """Return the comparisons of documents, by group of lengths and of all of them."""
    groups = {name: [each for each in documents if length_group(each.num_tokens) == name] for name in LENGTHS}
    parts = {name: own for name, own in groups.items() if own} | {ALL: documents}
    return {name: compare_texts(own, settings.systems, settings) for name, own in parts.items()}


def book_parts(texts: Sequence[Mapping[Cut, TextScores]], settings: PerplexitySettings) -> dict[str, Any]:
    """Return the comparisons of books, by cut and, where longer contexts have fewer windows, by number of windows."""
    parts, windows = {}, settings.windows_per_document or 0
    without = tuple(name for name in settings.systems if name not in settings.contexts)
    for cut in settings.cuts:
        for count, systems in {windows: without, settings.context_windows or windows: settings.systems}.items():
            part = compare_texts([each[cut].part(slice(count)) for each in texts], systems, settings)
            about = {"cut": str(cut), "windows": count, "memorized_tokens": settings.memorized(cut)}
            parts[str(cut) if count == windows else f"{cut}, first {count} windows"] = about | part
    return parts


def compare_texts(texts: Sequence[TextScores], systems: Sequence[str], settings: PerplexitySettings) -> dict[str, Any]:
    """Return perplexity, reduction against the baseline, bits per byte and seconds per scored token of systems on some texts.

    `reductions_percent` compares pairs of systems. `share_of_gain_percent` of a longer context is what memory saves against
    the backbone (in nats) as a share of what the longer window saves; None where that may be nothing.
    """
    units, seed = texts if len(texts) > 1 else texts[0].by_window(), settings.seed
    scores = {system: [unit.systems[system] for unit in units] for system in systems}
    losses = {system: torch.tensor([each.loss for each in own], dtype=torch.float64) for system, own in scores.items()}
    num_bytes = torch.stack([unit.num_bytes.sum() for unit in units])
    found, pairs, shares = {}, [pair for pair in COMPARISONS if set(pair) <= set(systems)], {}
    for system, own in losses.items():
        nats = own * torch.tensor([each.num_tokens for each in scores[system]])
        bits = bits_per_byte(nats, num_bytes)[num_bytes > 0]
        whole = [each.systems[system] for each in texts]
        count = sum(each.num_tokens for each in whole)
        found[system] = {
            "loss": own.mean().item(),
            "perplexity": as_values(perplexity_estimate(own, seed)),
            "reduction_percent": as_values(perplexity_reduction(own, losses[settings.baseline], seed)),
            "bits_per_byte": as_values((bits.mean().item(), *bootstrap_interval(bits, seed=seed))),
            "seconds_per_token": sum(each.seconds for each in whole) / count,
            "preparing_seconds_per_token": sum(each.preparing_seconds for each in whole) / count,
            "documents": {text.name: math.exp(each.loss) for text, each in zip(texts, whole, strict=True)},
        }
        if system in settings.contexts and ("on", "backbone") in pairs:
            gain, most = (losses["backbone"] - losses[each] for each in ("on", system))
            share = ratio_of_means(100 * gain, most, seed=seed)
            shares[system] = None if share is None else as_values(share)
    reductions = {f"{one}/{two}": perplexity_reduction(losses[one], losses[two], seed) for one, two in pairs}
    return {
        "documents": len(texts),
        "tokens": sum(each.num_tokens for each in texts),
        "scored_tokens": sum(len(window) for each in texts for window in each.distances),
        "scored_bytes": int(num_bytes.sum()),
        "systems": found,
        "reductions_percent": {pair: as_values(values) for pair, values in reductions.items()},
        "share_of_gain_percent": shares,
    }


def gains_by_distance(documents: Sequence[TextScores], settings: PerplexitySettings) -> dict[str, Any] | None:
    """Return what systems save against memory off, in nats per token, by the distance of what is needed.

    None where there is neither "off" nor "backbone" to compare with.
    """
    against = next((system for system in ("off", "backbone") if system in settings.systems), None)
    others = [system for system in settings.systems if system not in ("off", "backbone")]
    if against is None or not others:
        return None
    found: dict[str, Any] = {}
    for number, name in enumerate(DISTANCES):
        own = having(documents, number, settings.ngram)
        if len(own) == 1:
            own = having(own[0][0].by_window(), number, settings.ngram)
        gains = {system: mean_gain(own, against, system, settings.seed) for system in others} if own else {}
        count = sum(int(mask.sum()) for _, mask in own)
        found[name] = {"tokens": count, "units": len(own), "systems": gains}
    return {"against": against, "ngram": settings.ngram, "groups": found}


def having(units: Sequence[TextScores], group: int, ngram: int) -> list[Masked]:
    """Return the documents, or windows of one, that have tokens of a group of distances, and which tokens these are."""
    masks = [distance_groups(torch.cat(each.distances), *each.places, ngram) == group for each in units]
    return [(each, mask) for each, mask in zip(units, masks, strict=True) if mask.any()]


def mean_gain(units: Sequence[Masked], against: str, system: str, seed: int) -> dict[str, Any]:
    """Return the mean over tokens of what a system saves, and its interval over units."""
    losses = [[torch.cat(unit.systems[name].losses) for name in (against, system)] for unit, _ in units]
    masks = [mask for _, mask in units]
    sums = [(worse - better)[mask].double().sum() for (worse, better), mask in zip(losses, masks, strict=True)]
    gain = ratio_of_means(torch.stack(sums), torch.stack([mask.double().sum() for mask in masks]), seed=seed)
    assert gain is not None  # every unit has tokens of the group
    return as_values(gain)
