"""Segments written anew: small ones merged into one, so that files stay few, and dead chunks left out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from longmem.memory.folder.disk_storage import SEGMENT_BYTES, DiskStorage
from longmem.memory.folder.segments import Segment
from longmem.memory.rows.chunks import bytes_of_chunk
from longmem.memory.rows.documents import Run
from longmem.memory.rows.table import BankContents

# So many segments of about one size are merged into one: a bank that grows by small steps keeps few files.
SEGMENTS_TO_MERGE = 8


def segments_to_merge(storage: DiskStorage) -> list[Segment]:
    """Return segments that are better written anew: many of about one size, or one that is mostly dead.

    So a chunk is rewritten about once for every factor of `SEGMENTS_TO_MERGE` between a commit and a whole segment.
    """
    sizes = defaultdict(list)
    for segment in storage.segments:
        if segment.num_live * 2 < segment.num_slots:
            return [segment]
        if segment.file is not None and segment.file.num_bytes < SEGMENT_BYTES // 2:
            sizes[int(math.log(segment.file.num_bytes, SEGMENTS_TO_MERGE))].append(segment)
    return next((group for group in sizes.values() if len(group) >= SEGMENTS_TO_MERGE), [])


def rewrite(contents: BankContents, storage: DiskStorage, victims: Sequence[Segment]) -> None:
    """Write the live chunks of these segments to new ones; what nothing points to any longer ends with the next commit.

    As many runs as make a segment are written at once: one by one, a segment of many small ones would take a time that
    grows with the square of their number.
    """
    chunks_at_once = SEGMENT_BYTES // bytes_of_chunk(storage.shapes, contents.chunk_size, contents.storage_dtype)
    batch: list[tuple[Run, Int[Tensor, " _rows"]]] = []
    num_chunks = 0
    for document in contents.ledger.documents.values():
        done = 0
        for run in document.runs:
            if any(0 <= run.slot - segment.first_slot < segment.num_slots for segment in victims):
                batch.append((run, document.rows.values[done : done + run.num_chunks]))
                contents.ledger.changed.add(document.serial)
                num_chunks += run.num_chunks
                if num_chunks >= chunks_at_once:
                    _rewrite_runs(storage, batch)
                    batch, num_chunks = [], 0
            done += run.num_chunks
    _rewrite_runs(storage, batch)


def _rewrite_runs(storage: DiskStorage, batch: list[tuple[Run, Int[Tensor, " _rows"]]]) -> None:
    if batch:
        slot = storage.rewrite(torch.cat([rows for _, rows in batch]))
        for run, _ in batch:
            run.slot = slot
            slot += run.num_chunks
