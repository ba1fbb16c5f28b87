from __future__ import annotations

import numpy as np
import pytest
import torch

from longmem.evaluation.intervals import perplexity_estimate, perplexity_ratio, ratio_of_means, resamples


def losses(shift: float, seed: int, count: int = 10) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) / 10 + shift


def test_a_ratio_of_perplexities_is_paired():
    own, baseline = losses(3.0, 1), losses(3.1, 2)
    picks = torch.cat([*resamples(10, seed=4)]).numpy()
    own_of, baseline_of = own.double().numpy(), baseline.double().numpy()
    ratios = [np.exp(own_of[pick].mean()) / np.exp(baseline_of[pick].mean()) for pick in picks]
    expected = (np.exp(own_of.mean() - baseline_of.mean()), *np.quantile(ratios, [0.025, 0.975]))
    assert perplexity_ratio(own, baseline, seed=4) == pytest.approx(expected, rel=1e-9)
    assert perplexity_ratio(own, own + 0.5) == pytest.approx(
        (np.exp(-0.5),) * 3, rel=1e-6
    )  # what books share drops out
    low, high = perplexity_estimate(own)[1:]
    assert high - low > 0.5


def test_a_share_is_a_ratio_of_means():
    gains, longer_gains = losses(0.2, 1), losses(0.6, 2)
    picks = torch.cat([*resamples(10, seed=0)]).numpy()
    above, below = gains.double().numpy(), longer_gains.double().numpy()
    shares = [above[pick].sum() / below[pick].sum() for pick in picks]
    expected = (above.mean() / below.mean(), *np.quantile(shares, [0.025, 0.975]))
    assert ratio_of_means(gains, longer_gains) == pytest.approx(expected, rel=1e-9)


def test_what_may_be_nothing_has_no_shares():
    gains = losses(0.2, 1)
    assert ratio_of_means(gains, losses(0.0, 2)) is None
    assert ratio_of_means(gains, -losses(0.6, 2)) is None
    assert ratio_of_means(gains, losses(0.6, 2)) is not None
