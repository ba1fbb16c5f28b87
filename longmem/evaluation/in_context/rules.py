"""Which label a system chose: three rules, each a pure function of what was predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence

CONTENT_FREE = ("N/A", "", "[MASK]")


def prefix_rule(likeliest: str, gold_word: str) -> bool:
    """Return whether the likeliest token begins the gold label word, blanks aside (LongMem's released script).

    Nothing is restricted to label words, and a token may be as short as one letter.

    >>> prefix_rule(" pos", "positive"), prefix_rule(" ", "positive"), prefix_rule(" positively", "positive")
    (True, False, False)
    """
    token = likeliest.strip()
    return token != "" and gold_word.startswith(token)


def likeliest_label(logprobs: Sequence[float]) -> int:
    """Return the label whose word is the likeliest continuation, the first of equals."""
    return max(range(len(logprobs)), key=logprobs.__getitem__)


def calibrated_label(logprobs: Sequence[float], content_free: Sequence[Sequence[float]]) -> int:
    """Return the likeliest label after contextual calibration (Zhao et al. 2021, arXiv 2102.09690).

    Probabilities are restricted to the label words, and divided by their mean over inputs without content.

    Args:
        logprobs: of the label words.
        content_free: of the label words after each input without content.
    """
    inputs = [label_probabilities(each) for each in content_free]
    means = [sum(column) / len(inputs) for column in zip(*inputs, strict=True)]
    # In logarithms: a label that was never likely does not divide by 0.
    return likeliest_label([value - math.log(max(mean, 1e-300)) for value, mean in zip(logprobs, means, strict=True)])


def label_probabilities(logprobs: Sequence[float]) -> list[float]:
    """Return the probabilities of the labels, which sum to 1.

    >>> label_probabilities([-7.0, -7.0])
    [0.5, 0.5]
    """
    most = max(logprobs)
    values = [math.exp(value - most) for value in logprobs]
    return [value / sum(values) for value in values]
