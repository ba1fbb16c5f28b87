"""Lanes: which window of which document each batch row reads at each step, as a pure function of the step's number."""

import bisect
import dataclasses
import functools
from typing import Self

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from jaxtyping import Int
from torch import Tensor

from longmem.data.corpus import corpus_fingerprint
from longmem.errors import did_you_mean

COLUMNS = ("document_id", "input_ids")
NO_LABEL = -100  # of what is no target, as in transformers


@dataclasses.dataclass(frozen=True)
class LaneBatch:
    """What some lanes read at one step; the shape is the same at every step.

    The model shifts labels, as Hugging Face's models do, so the first token of a window is not predicted.
    """

    input_ids: Int[Tensor, "lanes tokens"]  # on the left; zeros fill up a document's last window
    labels: Int[Tensor, "lanes tokens"]  # the same tokens; -100 where `input_ids` is filled up
    lengths: tuple[int, ...]  # tokens of each row without what fills it up, at least 2
    document_ids: tuple[str, ...]
    offsets: tuple[int, ...]  # the token of its document at which each row begins
    # Whether a row begins a document, or its part of one: a memory of one document at a time must be cleared before it.
    is_new: tuple[bool, ...]
    # How often the lane has read its share of the corpus before; lanes differ, since documents do.
    epochs: tuple[int, ...]

    def to(self, device: torch.device) -> Self:
        """Return the batch with its tensors on a device."""
        return dataclasses.replace(self, input_ids=self.input_ids.to(device), labels=self.labels.to(device))


class Lanes:
    """Batches of consecutive windows, with one series of documents for each batch row ("lane").

    A lane reads its documents one after the other, each in windows of `window` tokens counted from the document's
    start. A document's last window may be shorter; of a single token, with nothing to predict, it is left out. When a
    lane has read its documents, it goes on to its next epoch. In each epoch, documents are dealt to lanes as
    `datasets.distributed.split_dataset_by_node` does, in an order drawn from seed and epoch if `shuffle`.

    Any step can be asked for at any time: training resumes with a step's number, and old batches can be read again. What
    is kept in memory grows with the number of documents, not of tokens.

    With `lanes_per_document=g`, g neighbouring lanes share a document, as in LongLLaMA (arXiv 2307.03170): each reads
    one of g contiguous parts of whole windows, as a stream of its own that begins with its part.

    Args:
        corpus: columns `document_id` and `input_ids`; see `load_corpus`. Documents of less than two tokens are not read.
        num_lanes: batch rows of all processes together.
        window: tokens of a row.
        seed: draws the order of documents, not negative.
        shuffle: a new order in each epoch; otherwise the corpus's own order in all.
        document_tokens: read so many tokens of a document at most, from its start: a short run then sees many of them.
        lanes_per_document: lanes that share a document; a divisor of `num_lanes`. Every document must have as many
            windows.

    Raises ValueError if an argument is out of its range, or there are fewer documents than `num_lanes / lanes_per_document`,
    so that a lane would have nothing to read.

    >>> corpus = Dataset.from_dict({"document_id": ["a", "b"], "input_ids": [[1, 2, 3, 4, 5], [6, 7]]})
    >>> lanes = Lanes(corpus, num_lanes=2, window=3, shuffle=False)
    >>> lanes.batch(1).input_ids.tolist()
    [[4, 5, 0], [6, 7, 0]]
    >>> lanes.batch(1).offsets, lanes.batch(1).epochs  # the second lane has read its document, and begins again
    ((3, 0), (0, 1))
    """

    def __init__(
        self,
        corpus: Dataset,
        *,
        num_lanes: int,
        window: int,
        seed: int = 0,
        shuffle: bool = True,
        lanes_per_document: int = 1,
        document_tokens: int | None = None,
    ) -> None:
        _validate(corpus, num_lanes, window, seed, lanes_per_document)
        self.num_lanes, self.window, self.seed, self.shuffle = num_lanes, window, seed, shuffle
        self.lanes_per_document = lanes_per_document
        self.fingerprint = corpus_fingerprint(corpus)
        # As Arrow, a document is mapped, not read: a window of a book costs no more than a window of a message.
        self._corpus = corpus.select_columns(list(COLUMNS)).with_format("arrow")
        lengths = (pc.list_value_length(rows["input_ids"]).to_numpy() for rows in self._corpus.iter(batch_size=1_000))
        counts = np.concatenate([np.zeros(0, dtype=np.int64), *lengths]).astype(np.int64)
        counts = counts if document_tokens is None else counts.clip(max=document_tokens)
        self._schedule = Schedule(counts, num_lanes, window, seed, shuffle, lanes_per_document)
        self._validate_documents()

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of windows that the longest lane reads in its first epoch."""
        return self._schedule.num_steps

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens read in one epoch by all lanes together."""
        return self._schedule.num_tokens

    def batch(self, step: int, own: range | None = None) -> LaneBatch:
        """Return what the lanes in `own` (default: all) read at `step`, which counts from 0.

        Raises ValueError if there is no such step or lane.
        """
        own = range(self.num_lanes) if own is None else own
        places = [self._schedule.place(step, lane) for lane in own]
        input_ids = torch.zeros(len(places), self.window, dtype=torch.long)
        labels = torch.full_like(input_ids, NO_LABEL)
        document_ids = []
        for row, place in enumerate(places):
            document = self._corpus[place.document]
            # `flatten` follows a list's offsets into the mapped file, and copies nothing.
            tokens = document["input_ids"].chunk(0).flatten().slice(place.offset, place.length)
            ids = torch.from_numpy(tokens.to_numpy(zero_copy_only=False).astype(np.int64))
            input_ids[row, : place.length] = labels[row, : place.length] = ids
            document_ids.append(document["document_id"][0].as_py())
        return LaneBatch(
            input_ids,
            labels,
            lengths=tuple(place.length for place in places),
            document_ids=tuple(document_ids),
            offsets=tuple(place.offset for place in places),
            is_new=tuple(place.windows_before == 0 for place in places),
            epochs=tuple(place.epoch for place in places),
        )

    def lengths(self, step: int) -> tuple[int, ...]:
        """Return `LaneBatch.lengths` of all lanes at a step, without reading any token."""
        return tuple(self._schedule.place(step, lane).length for lane in range(self.num_lanes))

    def _validate_documents(self) -> None:
        schedule = self._schedule
        shared, readable = self.lanes_per_document, len(schedule.readable)
        if readable * shared < self.num_lanes:
            parts = [parts for parts in range(shared + 1, self.num_lanes + 1) if self.num_lanes % parts == 0]
            fit = next((each for each in parts if readable * each >= self.num_lanes), None)
            sharing = "" if fit is None else f", or `lanes_per_document={fit}`, so that lanes share long documents"
            raise ValueError(
                f"`num_lanes` must be at most the number of documents of two tokens or more times "
                f"`lanes_per_document`, got {self.num_lanes} lanes for {readable} * {shared}; take more documents, "
                f"fewer lanes{sharing}."
            )
        short = schedule.readable[schedule.num_windows[schedule.readable] < shared]
        if len(short):
            name = self._corpus[int(short[0])]["document_id"][0].as_py()
            tokens = (shared - 1) * self.window + 2
            raise ValueError(
                f"`lanes_per_document` must be at most the number of windows of every document, got {shared}, and "
                f"{len(short)} documents with fewer windows of {self.window} tokens, such as {name!r} with "
                f"{schedule.token_counts[short[0]]} tokens; take it lower, or take out what has less than {tokens} tokens: "
                f"`corpus.filter(lambda document: len(document['input_ids']) >= {tokens})`."
            )


def process_lanes(num_lanes: int, process_index: int, num_processes: int) -> range:
    """Return the lanes of one process: neighbours, as many as every other process has.

    Raises ValueError if processes cannot have equal numbers of lanes, or there is no such process.

    >>> process_lanes(8, process_index=1, num_processes=4)
    range(2, 4)
    """
    if not 0 <= process_index < num_processes:
        raise ValueError(f"`process_index` must be from 0 to {num_processes - 1}, got {process_index}.")
    if num_lanes % num_processes:
        raise ValueError(
            f"`num_lanes` must be a multiple of the number of processes, got {num_lanes} and {num_processes}; "
            f"the next above is {num_lanes + -num_lanes % num_processes}."
        )
    share = num_lanes // num_processes
    return range(process_index * share, (process_index + 1) * share)


def _validate(corpus: Dataset, num_lanes: int, window: int, seed: int, lanes_per_document: int) -> None:
    for column in COLUMNS:
        if column not in corpus.column_names:
            raise ValueError(
                f"`corpus` must have the columns {' and '.join(COLUMNS)}, got {', '.join(corpus.column_names)}; "
                "`load_corpus` makes them." + did_you_mean(column, corpus.column_names)
            )
    limits = (("num_lanes", num_lanes, 1), ("window", window, 2), ("seed", seed, 0))
    for name, value, least in (*limits, ("lanes_per_document", lanes_per_document, 1)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    if num_lanes % lanes_per_document:
        raise ValueError(
            f"`num_lanes` must be a multiple of `lanes_per_document`, got {num_lanes} and {lanes_per_document}; "
            f"the next above is {num_lanes + -num_lanes % lanes_per_document}."
        )


@dataclasses.dataclass(frozen=True)
class Place:
    """A window of a document."""

    document: int  # its row in the corpus
    offset: int  # first token there
    length: int  # in tokens
    windows_before: int  # of the same document, or part of it, that the lane read before it
    epoch: int


@dataclasses.dataclass(frozen=True)
class Share:
    """What one lane reads in one epoch, a document after the other."""

    documents: Int[np.ndarray, " documents"]
    first_windows: Int[np.ndarray, " documents"]  # where the lane's part begins, in windows of the document
    ends: Int[np.ndarray, " documents"]  # windows from the start of the epoch up to the end of each part


class Schedule:
    """The place of every step and lane, from the tokens of each document; `Lanes` explains and checks the arguments."""

    def __init__(
        self,
        token_counts: Int[np.ndarray, " documents"],
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
