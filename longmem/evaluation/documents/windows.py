"""Which windows of a document are read, and which of their tokens are scored."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Window:
    """The tokens from `start` to `end` of a document, of which those from `first_scored` on are scored."""

    start: int
    first_scored: int
    end: int

    @property
    def num_scored(self) -> int:
        """Return the number of tokens that are scored."""
        return self.end - self.first_scored


def plan_windows(num_tokens: int, *, window: int, stride: int, limit: int | None = None) -> list[Window]:
    """Return the windows of a document, their starts `stride` tokens apart; all of them score each token but the first once.

    The first window scores all that it has but the first token, the last one ends with the document and may be shorter.
    A document that is shorter than a window is one window.

    Args:
        num_tokens: of the document, at least 2.
        window: tokens of a window.
        stride: tokens from one window to the next, fewer than `window`.
        limit: windows at most: the middles of as many equal parts of the document, so that its start, where memory is
            empty, weighs no more than in the whole document.

    >>> plan_windows(9, window=4, stride=2)  # doctest: +NORMALIZE_WHITESPACE
    [Window(start=0, first_scored=1, end=4), Window(start=2, first_scored=4, end=6),
     Window(start=4, first_scored=6, end=8), Window(start=6, first_scored=8, end=9)]
    """
    count = 1 + -(-max(0, num_tokens - window) // stride)
    numbers = range(count) if limit is None or limit >= count else middles(count, limit)
    return [
        Window(
            start=number * stride,
            first_scored=number * stride + window - stride if number else 1,
            end=min(number * stride + window, num_tokens),
        )
        for number in numbers
    ]


def middles(count: int, limit: int) -> list[int]:
    """Return the numbers in the middle of `limit` equal parts of `count` things.

    >>> middles(9, 3)
    [1, 4, 7]
    """
    return [(2 * number + 1) * count // (2 * limit) for number in range(limit)]
