"""Which window of which document each lane reads at each step: numbers of documents and tokens, and no text."""

from __future__ import annotations

import bisect
import dataclasses
import functools

import numpy as np
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Place:
    """A window: the row of its document in the corpus, its first token there, and its length in tokens.

    `windows_before` counts those of the same document, or part of it, that the lane read before it.
    """

    document: int
    offset: int
    length: int
    windows_before: int
    epoch: int


@dataclasses.dataclass(frozen=True)
class Share:
    """What one lane reads in one epoch, a document after the other: where its part begins, in windows of the document.

    `ends` counts windows from the start of the epoch up to the end of each part.
    """

    documents: Int[np.ndarray, " documents"]
    first_windows: Int[np.ndarray, " documents"]
    ends: Int[np.ndarray, " documents"]


class Schedule:
    """The place of every step and lane, from the tokens of each document; `Lanes` explains and checks the arguments."""

    def __init__(
        self,
        token_counts: Int[np.ndarray, " documents"],
        *,
        num_lanes: int,
        window: int,
        seed: int,
        shuffle: bool,
        lanes_per_document: int,
    ) -> None:
        self.token_counts, self.num_lanes, self.window = token_counts, num_lanes, window
        self.seed, self.shuffle, self.lanes_per_document = seed, shuffle, lanes_per_document
        self.num_windows = (token_counts + window - 2) // window  # a rest of one token is no window
        self.readable = np.flatnonzero(self.num_windows)
        # Steps of each lane up to the end of each epoch; grows with the steps asked for.
        self._epoch_ends: list[Int[np.ndarray, " lanes"]] = []
        # The last answers of `_order` and, for each lane, of `_share`: most steps are near the last one.
        self._last_order: tuple[int, Int[np.ndarray, " documents"]] = (-1, self.readable)
        self._shares: dict[int, tuple[int, Share]] = {}

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all windows of an epoch."""
        return int(np.minimum(self.token_counts, self.num_windows * self.window).sum())

    @property
    def num_steps(self) -> int:
        """Return the windows of the longest lane in its first epoch."""
        return int(self._ends_of(0).max())

    def place(self, step: int, lane: int) -> Place:
        """Return what a lane reads at a step. Raises ValueError if there is no such step or lane."""
        if step < 0:
            raise ValueError(f"`step` must be 0 or more, got {step}.")
        if not 0 <= lane < self.num_lanes:
            raise ValueError(f"lanes must be from 0 to {self.num_lanes - 1} (`num_lanes` - 1), got {lane}.")
        epoch = bisect.bisect_right(self._epoch_ends, step, key=lambda ends: ends[lane])
        while self._ends_of(epoch)[lane] <= step:
            epoch += 1
        share = self._share(lane, epoch)
        step_of_epoch = step - (int(self._ends_of(epoch - 1)[lane]) if epoch else 0)
        row = int(np.searchsorted(share.ends, step_of_epoch, side="right"))
        windows_before = step_of_epoch - (int(share.ends[row - 1]) if row else 0)
        document = int(share.documents[row])
        offset = (int(share.first_windows[row]) + windows_before) * self.window
        length = min(self.window, int(self.token_counts[document]) - offset)
        return Place(document, offset, length, windows_before, epoch)

    def _ends_of(self, epoch: int) -> Int[np.ndarray, " lanes"]:
        while len(self._epoch_ends) <= epoch:
            new = len(self._epoch_ends)
            counts = np.array([self._divide(lane, new).ends[-1] for lane in range(self.num_lanes)])
            self._epoch_ends.append(counts + (self._epoch_ends[-1] if new else 0))
        return self._epoch_ends[epoch]

    def _share(self, lane: int, epoch: int) -> Share:
        if lane not in self._shares or self._shares[lane][0] != epoch:
            self._shares[lane] = (epoch, self._divide(lane, epoch))
        return self._shares[lane][1]

    def _divide(self, lane: int, epoch: int) -> Share:
        """Return the lane's part of each document that its group of lanes reads in this epoch."""
        group, part = divmod(lane, self.lanes_per_document)
        documents = self._order(epoch)[self._dealt[group]]
        starts, ends = (self.num_windows[documents] * each // self.lanes_per_document for each in (part, part + 1))
        return Share(documents, starts, np.cumsum(ends - starts))

    @functools.cached_property
    def _dealt(self) -> list[Int[np.ndarray, " documents"]]:
        """The places in an epoch's order that each group of lanes gets; the same in every epoch."""
        numbers = Dataset.from_dict({"place": np.arange(len(self.readable))}).with_format("numpy")
        num_groups = self.num_lanes // self.lanes_per_document
        shares = (split_dataset_by_node(numbers, rank=group, world_size=num_groups) for group in range(num_groups))
        return [share["place"][:] for share in shares]

    def _order(self, epoch: int) -> Int[np.ndarray, " documents"]:
        if not self.shuffle:
            return self.readable
        if self._last_order[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._last_order = (epoch, generator.permutation(self.readable))
        return self._last_order[1]
