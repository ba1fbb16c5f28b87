"""95 % intervals by resampling: of a mean, of a ratio of two perplexities, of a ratio of two means.

Every quantity is computed from one number per unit, such as a book or a window; a resample of two systems that are compared
takes the same units of both.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

LARGEST_LOSS = 709.0  # nats; e to a little more is beyond double precision
SAMPLES = 10_000
DRAWN_AT_ONCE = 2**20  # units, so that memory does not grow with the number of resamples
Estimate = tuple[float, float, float]  # value, lower and upper end of its interval


def as_values(estimate: Estimate) -> dict[str, Any]:
    """Return a value with its interval, for JSON."""
    return {"value": estimate[0], "interval": list(estimate[1:])}


def interval_of(samples: Float[Tensor, " samples"]) -> tuple[float, float]:
    """Return between which ends 95 % of some resampled values lie."""
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def resamples(count: int, seed: int) -> Iterator[Int[Tensor, "samples units"]]:
    """Yield which of `count` units are in each of `SAMPLES`, drawn with repeats; about `DRAWN_AT_ONCE` units at once."""
    generator, at_once = torch.Generator().manual_seed(seed), max(1, DRAWN_AT_ONCE // max(count, 1))
    for start in range(0, SAMPLES, at_once):
        yield torch.randint(count, (min(at_once, SAMPLES - start), count), generator=generator)


def resampled(statistic: Callable[[Tensor], Tensor], count: int, seed: int) -> Float[Tensor, " samples"]:
    """Return a statistic of each resample, from `statistic` of some resamples at once, `samples units`."""
    found, start = torch.empty(SAMPLES, dtype=torch.float64), 0  # small results kept one by one would hold freed memory
    for picks in resamples(count, seed):
        found[start : start + len(picks)] = statistic(picks)
        start += len(picks)
    return found


def bootstrap_interval(differences: Float[Tensor, " windows"], *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of per-window differences, by resampling windows.

    Neighbouring windows resemble each other, so the interval of one document is narrower than that over documents.
    """
    numbers = differences.double()
    return interval_of(resampled(lambda picks: numbers[picks].mean(dim=1), len(numbers), seed))


def perplexity_of(loss: float) -> float:
    """Return e to a mean loss in nats, infinity where no number is so large.

    >>> perplexity_of(0.0), perplexity_of(1000.0)
    (1.0, inf)
    """
    return math.inf if loss > LARGEST_LOSS else math.exp(loss)


def perplexity_estimate(losses: Float[Tensor, " units"], seed: int = 0) -> Estimate:
    """Return e to the mean loss, and its interval."""
    value, low, high = (losses.double().mean().item(), *bootstrap_interval(losses, seed=seed))
    return perplexity_of(value), perplexity_of(low), perplexity_of(high)


def perplexity_ratio(losses: Float[Tensor, " units"], baseline: Float[Tensor, " units"], seed: int = 0) -> Estimate:
    """Return the perplexity of a system divided by that of a baseline on the same units, and its interval."""
    return perplexity_estimate(losses.double() - baseline.double(), seed)


def perplexity_reduction(losses: Float[Tensor, " units"], baseline: Float[Tensor, " units"], seed: int = 0) -> Estimate:
    """Return by how many percent a perplexity is below that of a baseline on the same units, and the interval."""
    value, low, high = (100 * (1 - ratio) for ratio in perplexity_ratio(losses, baseline, seed))
    return value, high, low  # the highest ratio is the lowest reduction


def ratio_of_means(
    numerators: Float[Tensor, " units"], denominators: Float[Tensor, " units"], *, seed: int = 0
) -> Estimate | None:
    """Return the mean of some numbers divided by the mean of others on the same units, and the interval.

    None where the mean of the denominators is not above 0 in every resample: what may be nothing has no shares.
    """
    above, below = numerators.double(), denominators.double()

    def means(numbers: Tensor) -> Tensor:
        return resampled(lambda picks: numbers[picks].mean(dim=1), len(numbers), seed)

    tops, bottoms = means(above), means(below)
    if bottoms.min() <= 0 or below.mean() <= 0:
        return None
    return (above.mean() / below.mean()).item(), *interval_of(tops / bottoms)


def clustered_mean(values: Sequence[float], groups: Sequence[str], *, seed: int = 0) -> Estimate:
    """Return the mean of one number per item, and its interval by resampling whole groups of items.

    Items of a group, such as questions about one book, are not independent; a group counts by how many items it has. With
    a single group its items are resampled.
    """
    units = groups if len(set(groups)) > 1 else list(map(str, range(len(values))))
    return stratified_mean(values, units, [""] * len(values), seed=seed)


def stratified_mean(
    values: Sequence[float], groups: Sequence[str], strata: Sequence[str], *, seed: int = 0
) -> Estimate:
    """Return the mean over strata, such as data sets, of the mean of their items; its interval is by groups of each stratum."""
    names = list(dict.fromkeys(strata))
    mean, samples = 0.0, torch.zeros(SAMPLES, dtype=torch.float64)
    for number, name in enumerate(names):
        own = [(value, group) for value, group, stratum in zip(values, groups, strata, strict=True) if stratum == name]
        numbers = torch.tensor([value for value, _ in own], dtype=torch.float64)
        order = {group: place for place, group in enumerate(dict.fromkeys(group for _, group in own))}
        place = torch.tensor([order[group] for _, group in own])
        sums, sizes = torch.bincount(place, numbers), torch.bincount(place)

        def mean_of(picks: Tensor, sums: Tensor = sums, sizes: Tensor = sizes) -> Tensor:
            return sums[picks].sum(dim=1) / sizes[picks].sum(dim=1)

        samples += resampled(mean_of, len(order), seed + number) / len(names)
        mean += numbers.mean().item() / len(names)
    return mean, *interval_of(samples)
