"""How a document was encoded: its segments, each a stretch of tokens that the encoder saw together.

Keys and values are contextual, so a segment is the smallest thing that can be encoded again and come out the same.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from longmem.encoder.history import UNKNOWN

# How tokens join a document: they begin a segment, go on with its last one, or nobody knows what was before them.
Joins = Literal["new", "same"] | None


@dataclass
class Segment:
    """One segment: tokens `start` to `stop` of the document, encoded together by encoder `version`."""

    start: int
    stop: int
    version: int
    is_known: bool = True  # the encoder saw these tokens and no others, so the segment can be encoded again
    mapped_to: int = -1  # the version of the encoder for which a map (of a plug-in) has moved the vectors since


class Segments:
    """The segments of a document, none at first.

    >>> segments = Segments()
    >>> segments.push(8, "new", version=0); segments.push(3, "new", version=1); segments.push(5, "same", version=1)
    >>> [(each.start, each.stop, each.version) for each in segments]
    [(0, 8, 0), (8, 16, 1)]
    >>> segments.of_chunks(1, 3, chunk_size=4).tolist()  # versions, and versions that they were mapped to
    [[0, 1, 1], [-1, -1, -1]]
    """

    __slots__ = ("_described", "_listed")

    def __init__(self, segments: Iterable[Segment] = ()) -> None:
        self._listed: deque[Segment] | None = deque(segments)
        self._described: Sequence[Sequence[int]] = ()  # what `from_json` was given, until somebody looks

    @property
    def _segments(self) -> deque[Segment]:
        if self._listed is None:
            self._listed = deque(
                Segment(start + number * length, start + (number + 1) * length, version, bool(is_known), mapped_to)
                for start, length, count, version, is_known, mapped_to in self._described
                for number in range(count)
            )
        return self._listed

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def __len__(self) -> int:
        return len(self._segments)

    def push(self, num_tokens: int, joins: Joins, version: int) -> None:
        """Add tokens at the end."""
        last = self._segments[-1] if self._segments else None
        start = 0 if last is None else last.stop
        if joins == "same" and last is not None and last.is_known:
            last.stop += num_tokens
            if last.version != version:  # of two encoders: of none, on any clock, until it is encoded again
                last.version, last.mapped_to = UNKNOWN, -1
        elif joins is None and last is not None and not last.is_known and last.version == version:
            last.stop += num_tokens  # of what is not known, one segment is as good as many
        else:
            self._segments.append(Segment(start, start + num_tokens, version, is_known=joins == "new"))

    def drop(self, first_resident: int) -> None:
        """Forget the segments before a token; one that has lost its beginning can't be encoded again."""
        while self._segments and self._segments[0].stop <= first_resident:
            self._segments.popleft()
        if self._segments and self._segments[0].start < first_resident:
            self._segments[0].is_known = False

    def forget_encoder(self, start: int, stop: int) -> None:
        """Say that nobody knows the encoder of these tokens, as far as they are of segments that can't be encoded again.

        >>> segments = Segments([Segment(0, 6, 1, is_known=False), Segment(6, 12, 1)])
        >>> segments.forget_encoder(4, 8)
        >>> [(each.start, each.stop, each.version) for each in segments]
        [(0, 4, 1), (4, 6, -1), (6, 12, 1)]
        """
        kept: deque[Segment] = deque()
        for each in self._segments:
            low, high = max(each.start, start), min(each.stop, stop)
            if each.is_known or low >= high:
                kept.append(each)
                continue
            lost = Segment(low, high, UNKNOWN, False)
            parts = replace(each, stop=low), lost, replace(each, start=high)
            kept.extend(part for part in parts if part.start < part.stop)
        self._listed = kept

    def of_chunks(self, first: int, count: int, chunk_size: int) -> Int[Tensor, "2 count"]:
        """Return for each of `count` chunks, from the `first` on, its version and the version that it was mapped to.

        A chunk over segments of several versions has none of them: no clock says which of two is further behind. A chunk
        that reaches over a border is not mapped, because a map moves whole chunks of one segment.
        """
        unset = torch.iinfo(torch.int64).max
        found = torch.full((2, count), UNKNOWN)
        found[0] = unset
        for segment in reversed(self._segments):  # what was just written is at the end
            low = max(segment.start // chunk_size, first)
            high = min(-(-segment.stop // chunk_size), first + count)
            if high > low:
                places = slice(low - first, high - first)
                known = found[0, places].clone()
                found[0, places] = torch.where((known == unset) | (known == segment.version), segment.version, UNKNOWN)
                found[1, places] = torch.where(known == unset, segment.mapped_to, -1)
            if segment.start <= first * chunk_size:
                break
        found[0, found[0] == unset] = UNKNOWN
        return found

    def of_all_chunks(self) -> tuple[int, int] | None:
        """Return the version of every chunk and the one that it was mapped to, where the description says that they are one."""
        if self._listed is not None or not self._described:
            return None
        kind = self._described[0][3], self._described[0][5]
        is_one = len(self._described) == self._described[0][2] == 1
        return kind if is_one or (kind[1] < 0 and all((run[3], run[5]) == kind for run in self._described)) else None

    def copy(self) -> "Segments":
        """Return the same segments, to go on by themselves."""
        return Segments(map(replace, self._segments))

    def to_json(self) -> list[list[int]]:
        """Return plain values: [start, length, how many such segments, version, is known, mapped to], in runs."""
        runs: list[list[int]] = []
        for each in self._segments:
            length, rest = each.stop - each.start, [each.version, int(each.is_known), each.mapped_to]
            if runs and runs[-1][1] == length and runs[-1][3:] == rest:
                runs[-1][2] += 1
            else:
                runs.append([each.start, length, 1, *rest])
        return runs

    @classmethod
    def from_json(cls, runs: Sequence[Sequence[int]]) -> "Segments":
        """Return the segments that `to_json` described."""
        segments = cls.__new__(cls)
        segments._listed, segments._described = None, runs
        return segments
