"""95 % intervals by resampling: of a mean, of a ratio of two perplexities, of a ratio of two means.

Every quantity is computed from one number per unit, the units being the books of an evaluation, or the windows of a
single text. Two systems that are compared share their units, and a resample takes the same units of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Estimate = tuple[float, float, float]  # value, lower and upper end of its interval

_ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)


def as_values(estimate: Estimate) -> dict[str, Any]:
    """Return a value with its interval, for JSON."""
    return {"value": estimate[0], "interval": list(estimate[1:])}


def resamples(count: int, num_samples: int, seed: int) -> Int[Tensor, "samples units"]:
    """Return, for each resample, which units are in it: `count` of them, drawn with repeats."""
    return torch.randint(count, (num_samples, count), generator=torch.Generator().manual_seed(seed))


def bootstrap_interval(
    differences: Float[Tensor, " windows"], *, num_samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of the mean of per-window differences, by resampling windows.

    Neighbouring windows resemble each other, so the interval of one document is narrower than that over documents.
    """
    picks = resamples(len(differences), num_samples, seed)
    low, high = torch.quantile(differences.double()[picks].mean(dim=1), _ENDS).tolist()
    return low, high


def perplexity_estimate(losses: Float[Tensor, " units"], seed: int = 0) -> Estimate:
    """Return e to the mean loss, and its interval."""
    value, low, high = (losses.double().mean().item(), *bootstrap_interval(losses, seed=seed))
    return math.exp(value), math.exp(low), math.exp(high)


def perplexity_ratio(losses: Float[Tensor, " units"], baseline: Float[Tensor, " units"], seed: int = 0) -> Estimate:
    """Return the perplexity of a system divided by that of a baseline on the same units, and its interval."""
    return perplexity_estimate(losses.double() - baseline.double(), seed)


def perplexity_reduction(losses: Float[Tensor, " units"], baseline: Float[Tensor, " units"], seed: int = 0) -> Estimate:
    """Return by how many percent a perplexity is below that of a baseline on the same units, and the interval."""
    value, low, high = (100 * (1 - ratio) for ratio in perplexity_ratio(losses, baseline, seed))
    return value, high, low  # the highest ratio is the lowest reduction


def ratio_of_means(
    numerators: Float[Tensor, " units"],
    denominators: Float[Tensor, " units"],
    *,
    num_samples: int = 10_000,
    seed: int = 0,
) -> Estimate | None:
    """Return the mean of some numbers divided by the mean of others on the same units, and the interval.

    None where the mean of the denominators is not above 0 in every resample: what may be nothing has no shares.
    """
    above, below = numerators.double(), denominators.double()
    picks = resamples(len(below), num_samples, seed)
    bottoms = below[picks].mean(dim=1)
    if bottoms.min() <= 0 or below.mean() <= 0:
        return None
    low, high = torch.quantile(above[picks].mean(dim=1) / bottoms, _ENDS).tolist()
    return (above.mean() / below.mean()).item(), low, high


def clustered_mean(
    values: Sequence[float], groups: Sequence[str], *, num_samples: int = 10_000, seed: int = 0
) -> Estimate:
    """Return the mean of one number per item, and its interval by resampling whole groups of items.

    Items of a group, such as questions about one book, are not independent; a group counts by how many items it has. With
    a single group its items are resampled.
    """
    if len(set(groups)) == 1:
        groups = [str(number) for number in range(len(values))]
    low, high = torch.quantile(_resampled(values, groups, num_samples, seed), _ENDS).tolist()
    return torch.tensor(values, dtype=torch.float64).mean().item(), low, high


def stratified_mean(
    values: Sequence[float], groups: Sequence[str], strata: Sequence[str], *, num_samples: int = 10_000, seed: int = 0
) -> Estimate:
    """Return the mean over strata of the mean of their items, and its interval by resampling groups of each stratum.

    Strata, such as data sets, count the same, however many items they have; each is resampled by itself.
    """
    means, samples = [], torch.zeros(num_samples, dtype=torch.float64)
    names = list(dict.fromkeys(strata))
    for number, name in enumerate(names):
        own = [place for place, each in enumerate(strata) if each == name]
        drawn = _resampled(
            [values[place] for place in own], [groups[place] for place in own], num_samples, seed + number
        )
        means.append(sum(values[place] for place in own) / len(own))
        samples += drawn / len(names)
    low, high = torch.quantile(samples, _ENDS).tolist()
    return sum(means) / len(means), low, high


def _resampled(
    values: Sequence[float], groups: Sequence[str], num_samples: int, seed: int
) -> Float[Tensor, " samples"]:
    """Return the mean of each resample of groups of items."""
    order = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    place = torch.tensor([order[group] for group in groups])
    numbers = torch.tensor(values, dtype=torch.float64)
    sums = torch.zeros(len(order), dtype=torch.float64).index_add_(0, place, numbers)
    sizes = torch.zeros(len(order), dtype=torch.float64).index_add_(0, place, torch.ones_like(numbers))
    picks = resamples(len(order), num_samples, seed)
    return sums[picks].sum(dim=1) / sizes[picks].sum(dim=1)
