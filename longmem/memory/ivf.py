"""Approximate chunk search: an inverted file of FAISS that follows the store row by row."""

from __future__ import annotations

import faiss
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.memory.index import ChunkIndex, FlatIndex, Found
from longmem.memory.store import ChunkStore

# Below this many chunks exact search is faster than an inverted file, and there are too few to train one.
MIN_ROWS = 8_192
CLUSTERS_PER_ROOT = 4  # clusters = 4 sqrt(rows), the middle of the range that FAISS's guide gives for fewer than 10^6
PROBED_SHARE = 1 / 32  # share of the clusters that a query looks into (recall and price: `docs/experiments.md`)
GROWTH_BEFORE_RETRAINING = 4
TRAINING_POINTS_PER_CLUSTER = 64


class InvertedFileIndex(ChunkIndex):
    """Return approximate search by clusters (FAISS IVF-Flat), and exact search while the store is small.

    Each key-value head has an inverted file with row numbers as ids. Changes are noted as they come and carried out at the
    next search, so a long write trains and adds once. A search restricted to some rows is exact, and so is one on a GPU.
    """

    def __init__(self, store: ChunkStore) -> None:
        super().__init__(store)
        self._exact = FlatIndex(store)
        self._files: list[faiss.IndexIVFFlat] = []
        self._trained_rows = 0
        self._is_indexed = np.zeros(store.capacity, dtype=bool)

    def search(
        self,
        queries: Float[Tensor, "kv_heads queries dim"],
        num_chunks: int,
        rows: Int[Tensor, " subset"] | None = None,
    ) -> Found:
        """Return scores and rows as every index does; a chunk outside the probed clusters is missed."""
        if rows is not None or self.store.num_rows < MIN_ROWS or self.store.device.type != "cpu":
            return self._exact.search(queries, num_chunks, rows)
        self._catch_up()
        return super().search(queries, num_chunks)

    def top_chunks(self, queries: Tensor, search_keys: Tensor, num_chunks: int) -> Found:
        """Return the best rows of the probed clusters, -1 where these hold too few."""
        found = [file.search(query, num_chunks) for file, query in zip(self._files, queries.numpy(), strict=True)]
        scores, rows = (torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True))
        return scores, rows

    def rows_dropped(self, rows: Int[Tensor, " rows"]) -> None:
        """Take out rows that are indexed."""
        indexed = rows.numpy()[self._is_indexed[rows.numpy()]]
        if self._files and len(indexed):
            for file in self._files:
                file.remove_ids(faiss.IDSelectorArray(indexed))
        self._is_indexed[indexed] = False

    def rows_moved(self, sources: Int[Tensor, " rows"], destinations: Int[Tensor, " rows"]) -> None:
        """Take out the rows under their old numbers; the next search adds them under the new ones."""
        self.rows_dropped(sources)

    def _catch_up(self) -> None:
        """Train if the store has outgrown the clusters, and add every live row that is not indexed yet."""
        num_rows, search_keys = self.store.num_rows, self.store.search_keys.numpy()
        if num_rows >= GROWTH_BEFORE_RETRAINING * max(self._trained_rows, 1):
            self._files = [self._train(keys) for keys in search_keys]
            self._trained_rows = num_rows
            self._is_indexed[:] = False
        missing = np.flatnonzero(~self._is_indexed[:num_rows])
        if len(missing):
            for file, keys in zip(self._files, search_keys, strict=True):
                file.add_with_ids(keys[missing], missing)
            self._is_indexed[missing] = True

    def _train(self, keys: np.ndarray) -> faiss.IndexIVFFlat:
        clusters = int(CLUSTERS_PER_ROOT * len(keys) ** 0.5)
        metric = faiss.METRIC_INNER_PRODUCT
        file = faiss.IndexIVFFlat(faiss.IndexFlatIP(keys.shape[1]), keys.shape[1], clusters, metric)
        file.cp.max_points_per_centroid = TRAINING_POINTS_PER_CLUSTER
        file.cp.min_points_per_centroid = 1
        file.nprobe = max(1, round(clusters * PROBED_SHARE))
        file.train(keys)
        file.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]  # removal by id without a walk through all lists
        return file
