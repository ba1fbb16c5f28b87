"""Search keys of a bank on disk: what of it is in memory, one layer after the other, from its first search on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.memory.rows.chunks import LayerShape, with_rows

if TYPE_CHECKING:  # a layer is made by its storage, so the storage's module imports this one
    from longmem.memory.folder.disk_storage import DiskStorage


class ResidentKeys:
    """Return the search keys of one layer, in memory: `num_rows` rows for each head, dense."""

    def __init__(self, keys: Float[Tensor, "kv_heads rows key_dim"]) -> None:
        self._keys = keys
        self.num_rows = keys.shape[1]

    @property
    def search_keys(self) -> Float[Tensor, "kv_heads rows key_dim"]:
        """Return a view of the live rows."""
        return self._keys[:, : self.num_rows]

    @property
    def device(self) -> torch.device:
        """Return where they are."""
        return self._keys.device

    @property
    def nbytes(self) -> int:
        """Return their bytes, with the room that growth has reserved."""
        return self._keys.nbytes

    def write(self, rows: Int[Tensor, " chunks"], keys: Float[Tensor, "kv_heads chunks key_dim"]) -> None:
        """Write the search keys of new rows."""
        num_rows = max(self.num_rows, int(rows.max()) + 1)
        if num_rows > self._keys.shape[1]:
            self._keys = with_rows(self._keys, max(num_rows, 2 * self._keys.shape[1]), self.num_rows)
        self._keys.index_copy_(1, rows.to(self.device), keys.to(self.device))
        self.num_rows = num_rows

    def move(self, sources: Int[Tensor, " rows"], destinations: Int[Tensor, " rows"]) -> None:
        """Copy rows onto other rows."""
        self._keys.index_copy_(1, destinations.to(self.device), self._keys.index_select(1, sources.to(self.device)))


class LazyLayer:
    """What an index sees of one layer: search keys that are read from the segments when they are first asked for."""

    def __init__(self, storage: DiskStorage, position: int) -> None:
        self._storage, self._position = storage, position

    @property
    def shape(self) -> LayerShape:
        """Return the sizes of its chunks."""
        return self._storage.shapes[self._position]

    @property
    def num_rows(self) -> int:
        """Return the number of live rows."""
        return self._storage.num_rows

    @property
    def search_keys(self) -> Float[Tensor, "kv_heads rows key_dim"]:
        """Return the search keys of the live rows, dense for each head."""
        return self._storage.resident_keys(self._position).search_keys

    @property
    def device(self) -> torch.device:
        """Return where they are."""
        return self._storage.device
