"""What an answer counts."""

from __future__ import annotations

import math
from collections.abc import Sequence


def credit(values: Sequence[float]) -> float:
    """Return 1 where the first value, that of the right suffix, is the highest, 1/n where it is one of n highest, else 0.

    So a scorer that cannot tell suffixes apart is right by chance, and not always.

    >>> [credit(values) for values in ([3, 1, 2], [1, 3, 2], [3, 3, 1])]
    [1.0, 0.0, 0.5]

    Raises:
        ValueError: a value is no finite number.
    """
    if not all(map(math.isfinite, values)):
        raise ValueError(
            f"log-likelihoods must be finite, got {list(values)}; score with another `dtype`, such as bfloat16 or float32."
        )
    best = max(values)
    return 1 / values.count(best) if values[0] == best else 0.0


def margin(values: Sequence[float]) -> float:
    """Return by how much the first value, that of the right suffix, is above the mean of the others.

    It moves where no choice changes, and so tells systems apart on fewer examples.

    >>> margin([3.0, 1.0, 2.0])
    1.5
    """
    return values[0] - sum(values[1:]) / (len(values) - 1)
