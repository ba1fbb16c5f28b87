"""Which windows of a text are read, and which of their tokens are scored."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Window:
    """The tokens from `start` to `end` of a text, of which those from `first_scored` on are scored."""

    start: int
    first_scored: int
    end: int

    @property
    def num_scored(self) -> int:
        """Return the number of tokens that are scored."""
        return self.end - self.first_scored


@dataclasses.dataclass(frozen=True)
class Cut:
    """A way of cutting texts into windows: `window` tokens each, their starts `stride` tokens apart.

    >>> Cut.parse("1024/512")
    Cut(window=1024, stride=512)
    """

    window: int
    stride: int

    def __post_init__(self) -> None:
        if self.window < 2 or not 1 <= self.stride <= self.window:
            raise ValueError(
                f"a cut must have a `window` of at least 2 tokens and a `stride` from 1 to that, got {self}; "
                "`512/512` does not overlap, in `1024/512` every scored token sees 512 others."
            )

    @classmethod
    def parse(cls, text: str) -> Cut:
        """Return the cut written as window/stride."""
        window, _, stride = text.partition("/")
        if not (window.isdecimal() and stride.isdecimal()):
            raise ValueError(f"a cut must be written as window/stride, such as 1024/512, got {text!r}.")
        return cls(int(window), int(stride))

    def __str__(self) -> str:
        """Return it as it is parsed."""
        return f"{self.window}/{self.stride}"

    @property
    def lead(self) -> int:
        """Return the tokens at the start of each window that are context only."""
        return self.window - self.stride

    @property
    def scored(self) -> int:
        """Return the tokens scored in a window of a row; the first token of a window has no prediction."""
        return min(self.stride, self.window - 1)

    def row(self, start: int, count: int) -> list[Window]:
        """Return `count` whole windows, the first of which begins with token `start`; each scores its last tokens.

        >>> Cut(4, 2).row(6, 2)
        [Window(start=6, first_scored=8, end=10), Window(start=8, first_scored=10, end=12)]
        """
        starts = [start + number * self.stride for number in range(count)]
        return [Window(each, each + self.window - self.scored, each + self.window) for each in starts]

    def cover(self, num_tokens: int, limit: int | None = None) -> list[Window]:
        """Return windows of a text that, all together, score each token but the first once; windows must overlap.

        The first window scores all that it has but the first token, the last one ends with the text and may be shorter.
        A text that is shorter than a window is one window.

        Args:
            num_tokens: of the text, at least 2.
            limit: windows at most: the middles of as many equal parts of the text, so that its start, where memory is
                empty, weighs no more than in the whole text.

        >>> Cut(4, 2).cover(9)  # doctest: +NORMALIZE_WHITESPACE
        [Window(start=0, first_scored=1, end=4), Window(start=2, first_scored=4, end=6),
         Window(start=4, first_scored=6, end=8), Window(start=6, first_scored=8, end=9)]
        """
        count = 1 + -(-max(0, num_tokens - self.window) // self.stride)
        parts = min(count, limit or count)
        starts = [(2 * number + 1) * count // (2 * parts) * self.stride for number in range(parts)]
        return [Window(each, each + self.lead if each else 1, min(each + self.window, num_tokens)) for each in starts]
