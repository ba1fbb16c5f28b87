"""Segments: chunks of consecutive slots, in one file that never changes or, before a commit, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from longmem.memory.folder.tensor_file import TensorFile
from longmem.memory.rows.chunks import Chunks


@dataclass
class Segment:
    """Return chunks of consecutive slots: a file or, while they wait, tensors (`waiting`)."""

    first_slot: int
    num_slots: int
    num_live: int
    file: TensorFile | None = None
    waiting: list[Chunks] | None = None

    def tensor(self, position: int, name: str, *, check: bool = False) -> Tensor:
        """Return the keys, values or search keys of one layer."""
        if self.waiting is not None:
            return getattr(self.waiting[position], name)
        assert self.file is not None
        return self.file.tensor(f"{position}.{name}", check=check)

    def empty(self, position: int, name: str, num_pieces: int) -> Shaped[Tensor, "pieces ..."]:
        """Return room for so many chunks, of one head each, of one tensor."""
        if self.file is not None:
            return self.file.empty(f"{position}.{name}", num_pieces)
        tensor = self.tensor(position, name)
        return tensor.new_empty(num_pieces, *tensor.shape[2:])

    def take(
        self, position: int, name: str, places: Int[Tensor, " pieces"], into: Shaped[Tensor, "pieces ..."]
    ) -> None:
        """Copy what the heads and slots of one tensor, counted as one axis, hold at these places."""
        if self.file is not None:
            self.file.take(f"{position}.{name}", places, into)
        else:
            torch.index_select(self.tensor(position, name).flatten(0, 1), 0, places, out=into)


def open_segments(
    folder: Path, rows: Sequence[tuple[int, int, str, int, Mapping[str, str]]], mapped: bool
) -> list[Segment]:
    """Return the segments that the catalogue lists: (first slot, slots, file name, bytes, digests)."""
    return [
        Segment(first_slot, num_slots, 0, file=TensorFile(folder / name, num_bytes, digests, mapped))
        for first_slot, num_slots, name, num_bytes, digests in rows
    ]
