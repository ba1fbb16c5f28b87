"""Who read what: the reads of all layers and heads as one sparse table of positions and chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longmem.backbone.cache_names import as_keyword, cache_of
from longmem.errors import ChangedMemoryError
from longmem.memory.finding import FindableMemory, FoundPassage, span_around, text_of
from longmem.memory.protocols import Memory
from longmem.model.attention import ATTEMPTS_TO_READ, MemoryRead

Result = TypeVar("Result")
DTYPES = np.int64, np.int64, np.float64, np.int64  # of positions, rows, weights, heads


@dataclasses.dataclass(frozen=True)
class Reads:
    """What each position of a text read: entries in the order of positions, one for each chunk that a position read.

    Attributes:
        rows: of the memory, each once; entries name their places here.
        ends: for each position the end of its entries.
        chunks: for each entry the place of its row in `rows`.
        weights: for each entry the part of attention that went to the chunk (0 to 1), the mean over reading layers and heads.
            Those of one position sum to its share of memory.
        strongest: for each entry (layer, head) where the weight was largest.
    """

    rows: Int[np.ndarray, " rows"]
    ends: Int[np.ndarray, " positions"]
    chunks: Int[np.ndarray, " entries"]
    weights: Float[np.ndarray, " entries"]
    strongest: Int[np.ndarray, "entries 2"]

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.ends)

    def of(self, position: int) -> slice:
        """Return which entries are those of a position."""
        return slice(0 if position == 0 else int(self.ends[position - 1]), int(self.ends[position]))

    @property
    def positions(self) -> Int[np.ndarray, " entries"]:
        """Return the position of each entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.ends, prepend=0))

    def surprise(self) -> Float[np.ndarray, " entries"]:
        """Return by how much each chunk stands out: `p log(p / q)` for its weight p and its mean weight q over all positions.

        That is its part of the divergence between the two. By weight alone what every position reads a little would win.
        """
        mean = np.bincount(self.chunks, self.weights, minlength=len(self.rows)) / max(len(self), 1)
        ratio = self.weights / np.maximum(mean[self.chunks], np.finfo(np.float64).tiny)
        return self.weights * np.log(np.maximum(ratio, np.finfo(np.float64).tiny))


def table_of_reads(pieces: Sequence[Sequence[MemoryRead]], num_positions: int) -> Reads:
    """Return the reads of one lane, given as `memory_reads` of consecutive pieces of its text."""
    columns: list[list[np.ndarray]] = [[], [], [], []]
    first, layers, num_heads = 0, np.zeros(0, dtype=np.int64), 1
    for piece in filter(None, pieces):  # of an empty memory there are none
        rows = np.stack([read.rows[0].cpu().numpy() for read in piece])  # layers heads positions chunks
        weights = np.stack([_weights_of(read).double().cpu().numpy() for read in piece])
        layers, num_heads = np.array([read.layer for read in piece]), rows.shape[1]
        position = np.arange(first, first + rows.shape[2])[:, None]
        head = np.arange(len(piece) * num_heads).reshape(len(piece), num_heads, 1, 1)
        parts = np.broadcast_to(position, rows.shape), rows, weights / head.size, np.broadcast_to(head, rows.shape)
        for column, part in zip(columns, parts, strict=True):
            column.append(part[rows >= 0])
        first += rows.shape[2]
    positions, rows, weights, heads = (
        np.concatenate([np.zeros(0, dtype), *column]) for column, dtype in zip(columns, DTYPES, strict=True)
    )
    different, chunk = np.unique(rows, return_inverse=True)
    width = max(len(different), 1)
    keys, key = np.unique(positions * width + chunk.reshape(-1), return_inverse=True)
    key, order, strongest = key.reshape(-1), np.argsort(weights, kind="stable"), np.zeros(len(keys), dtype=np.int64)
    strongest[key[order]] = heads[order]  # the last of several for one entry stays
    return Reads(
        rows=different,
        ends=np.searchsorted(keys // width, np.arange(num_positions), side="right"),
        chunks=keys % width,
        weights=np.bincount(key, weights, minlength=len(keys)).astype(np.float64),
        strongest=np.stack([layers[strongest // num_heads], strongest % num_heads], axis=1),
    )


def in_pieces(
    model: Callable[..., Any], ids: Int[Tensor, "1 tokens"], length: int, memory: Memory | None, **options: Any
) -> Iterator[Any]:
    """Yield the model's outputs for consecutive pieces of a text, each of which sees all before it."""
    cache = None
    for piece in ids.split(length, dim=1):
        output = model(
            piece, memory=memory, output_memory_reads=memory is not None, use_cache=True, **as_keyword(cache), **options
        )
        cache = cache_of(output)
        yield output


def of_one_state(memory: FindableMemory, read: Callable[[], Result]) -> Result:
    """Return what `read` makes of rows that it finds in a memory; where somebody changes the memory meanwhile, it reads again.

    Raises ChangedMemoryError if the memory changes faster than it can be read.
    """
    for _ in range(ATTEMPTS_TO_READ):
        generation = memory.generation
        try:
            result = read()
        except (ValueError, ChangedMemoryError):  # such as for a row, or a document, that is no longer there
            if memory.generation == generation:
                raise
            continue
        if memory.generation == generation:
            return result
    raise ChangedMemoryError


def passages_read(
    reads: Reads, memory: FindableMemory, k: int, tokenizer: PreTrainedTokenizerBase
) -> list[FoundPassage]:
    """Return the `k` passages in which what was read stands out most; their scores are sums of `Reads.surprise`."""
    places = memory.locate(torch.from_numpy(reads.rows))
    read = {place.document_id for place in places if place is not None}
    # Where several banks have a document of one name, the first tells of it.
    homes = {name: bank for bank, names in reversed(memory.parts()) for name in read.intersection(names)}
    sizes = {name: bank.info(name).num_tokens for name, bank in homes.items()}
    scores = np.bincount(reads.chunks, reads.surprise().clip(min=0), minlength=len(reads.rows))
    spans: dict[tuple[str, int, int], float] = {}
    for place, score in zip(places, scores.tolist(), strict=True):
        if place is not None:
            span = place.document_id, *span_around(place.start, sizes.get(place.document_id, place.stop))
            spans[span] = spans.get(span, 0.0) + score
    best = sorted(spans.items(), key=lambda each: -each[1])[:k]
    return [
        FoundPassage(*span, score, text_of(homes.get(span[0]), *span, lambda ids: str(tokenizer.decode(ids))))
        for span, score in best
    ]


def _weights_of(read: MemoryRead) -> Float[Tensor, "heads tokens chunks"]:
    assert read.memory_share is not None
    return read.chunk_weights[0] * read.memory_share[0][..., None]
