"""What a memory bank holds: ledger, stores and indexes, which change together here and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.memory.index import ChunkIndex, Found, make_index
from longmem.memory.ledger import Document, Ledger
from longmem.memory.store import Chunks, ChunkStore, LayerShape, cut_into_chunks


class BankContents:
    """Return the empty contents of a bank with room for `capacity` chunks; layers are counted by position here.

    Arguments have been checked by the bank. A write allocates all it needs before it changes anything.
    """

    def __init__(
        self, *, chunk_size: int, capacity: int, index: str, storage_dtype: torch.dtype, device: torch.device
    ) -> None:
        self.chunk_size = chunk_size
        self.capacity = capacity
        self.index = index
        self.storage_dtype = storage_dtype
        self.device = device
        self.ledger = Ledger(chunk_size)
        self.stores: list[ChunkStore] = []
        self.indexes: list[ChunkIndex] = []

    @property
    def shapes(self) -> list[LayerShape] | None:
        """Return the sizes of each layer, None before the first write has fixed them."""
        return [store.shape for store in self.stores] or None

    @property
    def nbytes(self) -> int:
        """Return the bytes of all keys, values and search keys, with the room that growth has reserved."""
        tails = (tensor for document in self.ledger.documents.values() for pair in document.waiting for tensor in pair)
        return sum(store.nbytes for store in self.stores) + sum(tensor.nbytes for tensor in tails)

    def extend(
        self,
        document: Document,
        keys: Sequence[Float[Tensor, "_kv_heads _tokens _dim"]],
        values: Sequence[Float[Tensor, "_kv_heads _tokens _dim"]],
        token_ids: Int[Tensor, " tokens"] | None,
    ) -> None:
        """Write tokens to the end of a document, new or known, together with the tail that waited there."""
        new_tokens = keys[0].shape[1]
        tokens = [
            (key.detach().to(self.device), value.detach().to(self.device))
            for key, value in zip(keys, values, strict=True)
        ]
        if document.waiting:
            tokens = [
                (torch.cat([old_key, key], dim=1), torch.cat([old_value, value], dim=1))
                for (old_key, old_value), (key, value) in zip(document.waiting, tokens, strict=True)
            ]
        num_chunks = tokens[0][0].shape[1] // self.chunk_size
        skipped = max(0, num_chunks - self.capacity)
        if skipped:
            warnings.warn(
                f"document {document.document_id!r}: {num_chunks} chunks were written at once to a bank of "
                f"{self.capacity}, so its first {skipped * self.chunk_size} tokens are dropped; raise "
                f"`capacity_tokens` to {num_chunks * self.chunk_size} to keep them.",
                stacklevel=4,
            )
        start, stop = skipped * self.chunk_size, num_chunks * self.chunk_size
        chunks = [
            cut_into_chunks(key[:, start:stop], value[:, start:stop], self.chunk_size, self.storage_dtype)
            for key, value in tokens
        ]
        # Tails stay in float32, so that a chunk is the same however its tokens arrive; `copy` lets go of the rest.
        tails = [
            (key[:, stop:].to(torch.float32, copy=True), value[:, stop:].to(torch.float32, copy=True))
            for key, value in tokens
        ]
        self._reserve(chunks)

        document.num_tokens += new_tokens
        document.waiting = tails if tails[0][0].shape[1] else []
        if token_ids is not None:
            document.push_token_ids(token_ids)
        self._write(document, chunks)
        if document.token_ids is not None:
            document.token_ids.pop(skipped * self.chunk_size)

    def replace(self, old: Document, new: Document, chunks: list[Chunks]) -> None:
        """Write `new`, whose record is complete but for its rows, in place of `old`."""
        self._reserve(chunks)
        self.drop(old)
        self._write(new, chunks)

    def drop(self, document: Document) -> None:
        """Forget a document, and move the last live rows into the holes it leaves."""
        dropped, sources, destinations = self.ledger.close(document)
        for store, index in zip(self.stores, self.indexes, strict=True):
            index.rows_dropped(dropped)
            store.move(sources, destinations)
            store.truncate(self.ledger.num_rows)
            index.rows_moved(sources, destinations)

    def search(self, position: int, queries: Tensor, num_chunks: int, rows: Tensor | None) -> Found:
        """Return scores and rows of the best chunks of one layer; only missing slots, if nothing was ever written."""
        if self.stores:
            return self.indexes[position].search(queries, num_chunks, rows)
        missing = torch.full((*queries.shape[:2], num_chunks), -1, device=queries.device)
        return torch.full_like(missing, -torch.inf, dtype=torch.float32), missing

    def restore(self, documents: Iterable[Document], runs: Iterable[tuple[str, int]], layers: list[Chunks]) -> None:
        """Take over what was saved; `self` is empty."""
        self.ledger.restore(documents, runs)
        self._open([ChunkStore.of(chunks, capacity=self.capacity) for chunks in layers])
        for index in self.indexes:
            index.rows_written(torch.arange(self.ledger.num_rows))

    def _open(self, stores: list[ChunkStore]) -> None:
        self.stores = stores
        self.indexes = [make_index(self.index, store) for store in stores]

    def _reserve(self, chunks: list[Chunks]) -> None:
        if not self.stores:
            empty = [Chunks(*(tensor[:, :0].clone() for tensor in layer)) for layer in chunks]
            self._open([ChunkStore.of(layer, capacity=self.capacity) for layer in empty])
        for store, layer in zip(self.stores, chunks, strict=True):
            store.reserve(min(self.capacity, store.num_rows + layer.keys.shape[1]))

    def _write(self, document: Document, chunks: list[Chunks]) -> None:
        """Write chunks, at most as many as there is capacity, over the oldest ones where the bank is full."""
        num_rows = self.ledger.num_rows
        num_new = chunks[0].keys.shape[1]
        if document.serial < 0:
            self.ledger.open(document)
        evicted = self.ledger.evict(max(0, num_rows + num_new - self.capacity), keep=document)
        rows = torch.cat([evicted, torch.arange(num_rows, num_rows + num_new - len(evicted))])
        for store, index, layer in zip(self.stores, self.indexes, chunks, strict=True):
            index.rows_dropped(evicted)
            store.write(rows, layer)
            index.rows_written(rows)
        self.ledger.record(document, rows)
