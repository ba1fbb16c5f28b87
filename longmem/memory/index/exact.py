"""Exact search: which rows of a store have the largest inner product with a query."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import faiss
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from longmem.memory.index.saved import SavedIndex
from longmem.memory.rows.storage import LayerRows
from longmem.plugins import Setting, register

Ranked = tuple[Float[Tensor, "kv_heads queries chunks"], Int[Tensor, "kv_heads queries chunks"]]

# Scores that one step of exact search holds at a time (64 MiB of float32): a book has too many for all its queries.
SCORES_PER_STEP = 2**24
# So few queries are answered sooner over all rows, without those that are left out, than over a copy of the others
# (65,535 of 65,536 rows, one query: 8 ms against 80 ms).
FEW_QUERIES = 32


def exact_top_chunks(
    queries: Float[Tensor, "kv_heads queries dim"],
    search_keys: Float[Tensor, "kv_heads rows dim"],
    num_chunks: int,
    bonus: Float[Tensor, " rows"] | None = None,
) -> Ranked:
    """Return the `num_chunks` largest inner products and their rows, largest first, by torch on any device.

    `bonus`: added to the products with each row.

    >>> exact_top_chunks(torch.ones(1, 1, 2), torch.tensor([[[0.0, 1.0], [2.0, 1.0], [1.0, 1.0]]]), 2)
    (tensor([[[3., 2.]]]), tensor([[[1, 2]]]))
    """
    step = max(1, SCORES_PER_STEP // (search_keys.shape[0] * search_keys.shape[1]))
    found = []
    for block in queries.split(step, dim=1):
        scores = block @ search_keys.transpose(1, 2)
        found.append((scores if bonus is None else scores.add_(bonus)).topk(num_chunks, dim=2))
    return torch.cat([scores for scores, _ in found], dim=1), torch.cat([rows for _, rows in found], dim=1)


def top_of_most_rows(
    queries: Float[Tensor, "kv_heads queries dim"],
    search_keys: Float[Tensor, "kv_heads rows dim"],
    num_chunks: int,
    subset: Int[Tensor, " subset"],
    bonus: Float[Tensor, " rows"] | None = None,
) -> Ranked:
    """Return the `num_chunks` largest inner products with a `subset` of the rows, which is not copied and not smaller."""
    scores = queries @ search_keys.transpose(1, 2)
    if bonus is not None:
        scores = scores + bonus
    is_left_out = torch.ones(search_keys.shape[1], dtype=torch.bool, device=search_keys.device)
    is_left_out[subset] = False
    # Filled, not added: whatever a query holds, also NaN, what is left out is never the best.
    scores, rows = scores.masked_fill_(is_left_out, -torch.inf).topk(num_chunks, dim=2)
    return scores, rows


def faiss_top_chunks(
    queries: Float[Tensor, "kv_heads queries dim"], search_keys: Float[Tensor, "kv_heads rows dim"], num_chunks: int
) -> Ranked:
    """Return the `num_chunks` largest inner products and their rows, by FAISS over these very vectors, without a copy.

    On a GPU this needs faiss-gpu; where it is missing, torch does the same search.
    """
    metric = faiss.METRIC_INNER_PRODUCT
    if not search_keys.is_cuda:
        heads = zip(queries.numpy(), search_keys.numpy(), strict=True)
        found: list[Iterable[Tensor]] = [
            map(torch.from_numpy, faiss.knn(query, keys, num_chunks, metric)) for query, keys in heads
        ]
    elif not hasattr(faiss, "StandardGpuResources"):
        return exact_top_chunks(queries, search_keys, num_chunks)
    else:
        from faiss.contrib import torch_utils  # noqa: F401  lets faiss read torch tensors where they are

        resources, pairs = faiss.StandardGpuResources(), zip(queries, search_keys, strict=True)
        found = [faiss.knn_gpu(resources, query, keys, num_chunks, metric=metric) for query, keys in pairs]
    scores, rows = (torch.stack(part) for part in zip(*found, strict=True))
    return scores, rows


class ChunkIndex:
    """An index over the live rows of one store; subclasses say how `best_rows` finds them.

    The bank tells the index about every change of the rows. A kind that keeps data of its own notes it in the three
    `rows_*` methods, in O(changed rows) and without a look at the store's keys, and carries it out at the next search.
    """

    settings: ClassVar[Mapping[str, Setting]] = {}
    rows_per_chunk = 1  # more where rows are tokens

    def __init__(self, store: LayerRows) -> None:
        self.store, self.device = store, store.device

    def best_rows(self, queries: Tensor, num_chunks: int, rows: Tensor | None, bonus: Tensor | None = None) -> Ranked:
        """Return scores and rows of the best chunks, best first; there are at least `num_chunks`, and a query."""
        raise NotImplementedError

    def is_exact(self, rows: Tensor | None) -> bool:
        """Return whether a search of these rows, None for all, compares every one of them."""
        return True

    def search(
        self,
        queries: Float[Tensor, "kv_heads queries dim"],
        num_chunks: int,
        rows: Int[Tensor, " subset"] | None = None,
        bonus: Float[Tensor, " rows"] | None = None,
    ) -> Ranked:
        """Return scores (float32, descending) and rows (int64); missing slots have row -1 and score -inf.

        `rows`: search only these live rows (sorted, without duplicates). `bonus`: for every live row, added to its
        scores; the best with it are found. Results are where `queries` are.
        """
        device, kept = queries.device, self.device
        num_found = min(num_chunks, self.store.num_rows if rows is None else len(rows))
        if num_found and queries.shape[1]:
            rows = None if rows is None else rows.to(kept)
            bonus = None if bonus is None else bonus.to(kept)
            queries = queries.detach().to(kept, torch.float32).contiguous()
            scores, found = self.best_rows(queries, num_found, rows, bonus)
        else:
            scores = torch.empty(*queries.shape[:2], 0, device=device)
            found = torch.empty_like(scores, dtype=torch.int64)
        # FAISS answers -1 where it finds nothing to rank, such as for a query that holds NaN.
        scores = scores.masked_fill(found < 0, -torch.inf)
        room = (0, num_chunks - found.shape[2])
        scores = functional.pad(scores, room, value=-torch.inf)
        return scores.to(device), functional.pad(found, room, value=-1).to(device)

    def rows_written(self, rows: Int[Tensor, " rows"]) -> None:
        """Take in rows that were written; called after the store holds them. None of them is in the index."""

    def rows_moved(self, sources: Int[Tensor, " rows"], destinations: Int[Tensor, " rows"]) -> None:
        """Rename rows; called after the store has moved them. Destinations were dropped, sources cease to live."""

    def note_reencoded(self, count: int) -> None:
        """Hear that so many rows that are dropped and written anew hold the same chunks with other keys."""

    def rows_dropped(self, rows: Int[Tensor, " rows"]) -> None:
        """Let go of rows that are no longer live; called before the store changes."""

    def export(self) -> SavedIndex | None:
        """Return what reopening would otherwise build anew, None if that is nothing; valid until the next change."""
        return None

    def adopt(self, saved: SavedIndex) -> bool:
        """Take over what `export` returned of an index over these rows; return whether it fits and was taken.

        Rows that it does not cover are added at the next search. What does not fit is left, and built at a search.
        """
        return False


@register("index", "exact")
class ExactIndex(ChunkIndex):
    """The reference: a matrix product and `topk`, on whatever device the store is."""

    def best_rows(self, queries: Tensor, num_chunks: int, rows: Tensor | None, bonus: Tensor | None = None) -> Ranked:
        """Return the best rows by `top_chunks` over the store's rows, or over a copy of a subset of them."""
        search_keys = self.store.search_keys
        if rows is not None and queries.shape[1] <= FEW_QUERIES and 2 * len(rows) > search_keys.shape[1]:
            return top_of_most_rows(queries, search_keys, num_chunks, rows, bonus)
        if rows is not None:
            search_keys = search_keys.index_select(1, rows)
        if bonus is None:
            scores, found = self.top_chunks(queries, search_keys, num_chunks)
        else:  # FAISS knows no such thing
            bonus = bonus if rows is None else bonus[rows]
            scores, found = exact_top_chunks(queries, search_keys, num_chunks, bonus)
        if rows is None:
            return scores, found
        return scores, torch.where(found < 0, -1, rows[found.clamp(min=0)])

    def top_chunks(self, queries: Tensor, search_keys: Tensor, num_chunks: int) -> Ranked:
        return exact_top_chunks(queries, search_keys, num_chunks)


@register("index", "flat")
class FlatIndex(ExactIndex):
    """Exact search by FAISS straight over the store's rows: nothing to build, nothing stored twice."""

    def top_chunks(self, queries: Tensor, search_keys: Tensor, num_chunks: int) -> Ranked:
        return faiss_top_chunks(queries, search_keys, num_chunks)
