"""Where a bank keeps its rows: the interface that memory and disk share, and the one in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor

from longmem.memory.rows.chunks import Chunks, ChunkStore, LayerRows, LayerShape


class Storage(Protocol):
    """Keys, values and search keys of all layers, in rows `[0, num_rows)` that hold one chunk each.

    Layers are counted by position. `reserve` allocates whatever the writes up to `num_rows` rows need, so that they cannot
    fail for want of memory; `drop` names rows that are given up, before they are overwritten or moved onto.
    """

    @property
    def shapes(self) -> list[LayerShape]:
        """Return the sizes of each layer; none before the first write has fixed them."""
        ...

    @property
    def nbytes(self) -> int: ...

    def layer(self, position: int) -> LayerRows: ...

    def reserve(self, layers: Sequence[Chunks], num_rows: int) -> None: ...

    def write(self, rows: Int[Tensor, " chunks"], layers: Sequence[Chunks]) -> int:
        """Write one chunk of every layer into each row; return where the first of them is on disk, -1 for nowhere."""
        ...

    def drop(self, rows: Int[Tensor, " rows"]) -> None: ...

    def move(self, sources: Int[Tensor, " rows"], destinations: Int[Tensor, " rows"]) -> None: ...

    def truncate(self, num_rows: int) -> None: ...

    def select(self, rows: Int[Tensor, " chunks"]) -> list[Chunks]: ...

    def gather(
        self, position: int, rows: Int[Tensor, "kv_heads chunks"]
    ) -> tuple[
        Float[Tensor, "kv_heads chunks chunk_size key_dim"],
        Float[Tensor, "kv_heads chunks chunk_size value_dim"],
    ]: ...


class MemoryStorage:
    """Return an empty storage in memory, or on a GPU; it grows by doubling, up to `capacity` rows (None: no limit)."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.stores: list[ChunkStore] = []

    @property
    def shapes(self) -> list[LayerShape]:
        """Return the sizes of each layer."""
        return [store.shape for store in self.stores]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensors, with the room that growth has reserved."""
        return sum(store.nbytes for store in self.stores)

    def layer(self, position: int) -> ChunkStore:
        """Return the store of one layer."""
        return self.stores[position]

    def reserve(self, layers: Sequence[Chunks], num_rows: int) -> None:
        """Make room for `num_rows` rows in all."""
        if not self.stores:
            empty = [Chunks(*(tensor[:, :0].clone() for tensor in layer)) for layer in layers]
            self.stores = [ChunkStore.of(layer, capacity=self.capacity) for layer in empty]
        for store in self.stores:
            store.reserve(num_rows)

    def write(self, rows: Int[Tensor, " chunks"], layers: Sequence[Chunks]) -> int:
        """Write one chunk of every layer into each row; there is no place on disk, -1."""
        for store, layer in zip(self.stores, layers, strict=True):
            store.write(rows, layer)
        return -1

    def drop(self, rows: Int[Tensor, " rows"]) -> None:
        """Give up rows: nothing to do here."""

    def move(self, sources: Int[Tensor, " rows"], destinations: Int[Tensor, " rows"]) -> None:
        """Copy rows onto other rows."""
        for store in self.stores:
            store.move(sources, destinations)

    def truncate(self, num_rows: int) -> None:
        """Forget the rows from `num_rows` on."""
        for store in self.stores:
            store.truncate(num_rows)

    def select(self, rows: Int[Tensor, " chunks"]) -> list[Chunks]:
        """Return copies of these rows, of every layer, in this order."""
        return [store.select(rows) for store in self.stores]

    def gather(
        self, position: int, rows: Int[Tensor, "kv_heads chunks"]
    ) -> tuple[
        Float[Tensor, "kv_heads chunks chunk_size key_dim"],
        Float[Tensor, "kv_heads chunks chunk_size value_dim"],
    ]:
        """Return copies of keys and values of one layer, other rows for each head; row -1 is read as some row."""
        return self.stores[position].gather(rows)
