"""Samples of a bank: stored vectors beside what the current encoder makes of the same tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longmem.memory.rows.codec import decode
from longmem.memory.rows.documents import Document
from longmem.memory.rows.segments import Segment
from longmem.memory.rows.storage import Chunks
from longmem.memory.rows.table import Table

# Documents with some of their segments.
Targets = list[tuple[Document, list[Segment]]]


class Stored(NamedTuple):
    """The whole chunks of a segment: the first of them, counted in the document, and their numbers of each layer."""

    first: int
    chunks: list[Chunks]


def stored_chunks(table: Table, document: Document, segment: Segment) -> Stored:
    """Return what is stored of a segment, without chunks that it only begins or ends."""
    size = table.chunk_size
    resident = document.first_chunk(size)
    first = max(-(-segment.start // size), resident)
    last = min(segment.stop // size, document.num_whole_chunks(size))
    rows = document.rows.values[first - resident : max(first, last) - resident]
    return Stored(first, table.storage.select(rows))


def vectors(chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Return keys and values as floats, (kv_heads, tokens, dim)."""
    return decode(chunks.keys).float().flatten(1, 2), decode(chunks.values).float().flatten(1, 2)


def draw_segments(targets: Targets, num_tokens: float, seed: int = 0) -> Targets:
    """Return segments drawn at random, at least one, with about so many tokens in all."""
    flat = [(document, each) for document, segments in targets for each in segments]
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: dict[int, tuple[Document, list[Segment]]] = {}
    left = num_tokens
    for number in order:
        document, segment = flat[number]
        if chosen and left < (segment.stop - segment.start) / 2:
            break
        chosen.setdefault(document.serial, (document, []))[1].append(segment)
        left -= segment.stop - segment.start
    return list(chosen.values())
