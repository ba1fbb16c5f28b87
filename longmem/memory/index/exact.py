"""Exact search: which rows of a store have the largest inner product with a query."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import faiss
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn import functional

from longmem.memory.index import gpu
from longmem.memory.index.saved import SavedIndex
from longmem.memory.rows.storage import LayerRows, decode
from longmem.plugins import Setting, register

Ranked = tuple[Float[Tensor, "kv_heads queries chunks"], Int[Tensor, "kv_heads queries chunks"]]

# Scores that one step of exact search holds at a time (64 MiB of float32, 1 GiB on a GPU): a book has too many for all its
# queries.
SCORES_PER_STEP = {"cpu": 2**24, "cuda": 2**28}
# Of many scores, the best of each so many neighbours are looked at first: `topk` over all takes three to six times as long.
NEIGHBOURS, MANY_SCORES = 64, 2**18
# Numbers of keys that one step turns to float32: on a CPU 4 MiB, which stay in its cache.
NUMBERS_PER_STEP = {"cpu": 2**20, "cuda": 2**26}
# Candidates for each chunk that is wanted by its distance, of an index that knows inner products alone; and how many keys are
# gathered at a time to rank candidates again.
CANDIDATES_BY_DISTANCE, CANDIDATES_PER_STEP = 8, 2**18
# So few queries are answered sooner over all rows, without those that are left out, than over a copy of the others
# (65,535 of 65,536 rows, one query: 8 ms against 80 ms).
FEW_QUERIES = 32


def exact_top_chunks(
    queries: Float[Tensor, "kv_heads queries dim"],
    search_keys: Num[Tensor, "kv_heads keys stored_dim"],
    num_chunks: int,
    bonus: Float[Tensor, " all_chunks"] | None = None,
    rows: Int[Tensor, " subset"] | None = None,
    size: int = 1,
    by_distance: bool = False,
) -> Ranked:
    """Return the best scores and the rows of their chunks, best first, by torch on any device: what other searches must find.

    Keys are read as they are stored, and a block of them at a time becomes float32; the whole of a bank never does.

    Args:
        queries: in float32.
        search_keys: `size` for each chunk, one after the other; the best of them counts.
        num_chunks: at most all that are searched.
        bonus: for each chunk, added to its score.
        rows: search only these chunks (sorted).
        by_distance: a score is `query key - key² / 2`, so the best keys are those at the smallest distance.

    >>> exact_top_chunks(torch.ones(1, 1, 2), torch.tensor([[[0.0, 1.0], [2.0, 1.0], [1.0, 1.0]]]), 2)
    (tensor([[[3., 2.]]]), tensor([[[1, 2]]]))
    """
    heads, total, device = len(search_keys), search_keys.shape[1] // size, search_keys.device
    is_left_out = picked = None
    if rows is not None and 2 * len(rows) > total:  # a mask costs less than a copy
        is_left_out = torch.ones(total, dtype=torch.bool, device=device)
        is_left_out[rows] = False
    elif rows is not None:
        picked, total = rows, len(rows)
    is_copied = picked is not None or search_keys.dtype != torch.float32 or by_distance
    kind = "cpu" if device.type == "cpu" else "cuda"
    step = max(1, NUMBERS_PER_STEP[kind] // (heads * queries.shape[2] * size)) if is_copied else max(1, total)
    some = max(1, SCORES_PER_STEP[kind] // (heads * min(step, max(1, total)) * size))
    best: list[list[Ranked]] = [[] for _ in range(0, queries.shape[1], some)]
    for start in range(0, total, step):
        stop = min(start + step, total)
        here = slice(start, stop) if picked is None else picked[start:stop]
        if isinstance(here, slice):
            keys = search_keys[:, start * size : stop * size]
        else:
            keys = search_keys.index_select(1, tokens_of(here, size))
        keys = decode(keys).float().transpose(1, 2)
        halves = torch.linalg.vector_norm(keys, dim=1, keepdim=True).square() / 2 if by_distance else None
        for own, block in zip(best, queries.split(some, dim=1), strict=True):
            products = block @ keys
            if halves is not None:
                products -= halves
            scores = products.unflatten(2, (-1, size))
            if bonus is not None:
                scores += bonus[here].unsqueeze(1)
            if is_left_out is not None:  # filled, not added: whatever a query holds, also NaN, it is never the best
                scores.masked_fill_(is_left_out[here].unsqueeze(1), -torch.inf)
            scores, places = best_of(scores, num_chunks)
            own.append((scores, places + start if start else places))
            if len(own) > 1:
                scores, places = (torch.cat(parts, dim=2) for parts in zip(*own, strict=True))
                scores, slots = scores.topk(min(num_chunks, scores.shape[2]), dim=2)
                own[:] = [(scores, places.gather(2, slots))]
    scores, places = best[0][0]
    if len(best) > 1:
        scores, places = (torch.cat(parts, dim=1) for parts in zip(*(own[0] for own in best), strict=True))
    return scores, places if picked is None else picked[places]


def ranked_again(
    queries: Float[Tensor, "kv_heads queries dim"],
    search_keys: Num[Tensor, "kv_heads keys stored_dim"],
    candidates: Int[Tensor, "kv_heads queries candidates"],
    num_chunks: int,
    size: int = 1,
    by_distance: bool = False,
) -> Ranked:
    """Return the best of each query's candidates by the scores of `exact_top_chunks`; -1 is no candidate."""
    places = torch.arange(size, device=candidates.device)
    heads, step = [], max(1, CANDIDATES_PER_STEP // (candidates.shape[2] * size))
    for query, keys, chunks in zip(queries, search_keys, candidates, strict=True):
        parts = []
        for own, rows in zip(query.split(step), chunks.split(step), strict=True):
            known = decode(keys[(rows.clamp(min=0)[..., None] * size + places).flatten(1)]).float()
            scores = torch.einsum("qcd,qd->qc", known, own)
            if by_distance:
                scores -= known.square().sum(dim=2) / 2
            parts.append(scores.unflatten(1, (-1, size)).amax(dim=2))
        scores, slots = torch.cat(parts).masked_fill(chunks < 0, -torch.inf).topk(num_chunks, dim=1)
        heads.append((scores, chunks.gather(1, slots)))
    return torch.stack([scores for scores, _ in heads]), torch.stack([rows for _, rows in heads])


def best_of(scores: Float[Tensor, "kv_heads queries all_chunks size"], num_chunks: int) -> Ranked:
    """Return the chunks with the best of all scores, best first: of many, those in the groups that have the best ones.

    >>> best_of(torch.tensor([[[[1.0, 5.0], [3.0, 2.0]]]]), 2)
    (tensor([[[5., 3.]]]), tensor([[[0, 1]]]))
    """
    count, size = scores.shape[2:]
    group = max(1, NEIGHBOURS // size)
    if scores.numel() < MANY_SCORES or count < 16 * group * num_chunks:
        best = scores.squeeze(3) if size == 1 else scores.amax(dim=3)
        best, places = best.topk(min(num_chunks, count), dim=2)
        return best, places
    whole = count - count % group
    grouped = scores[:, :, :whole].flatten(2).unflatten(2, (-1, group * size))
    groups = grouped.amax(dim=3).topk(num_chunks, dim=2).indices.unsqueeze(3)
    picked = grouped.gather(2, groups.expand(-1, -1, -1, group * size)).unflatten(3, (group, size)).flatten(2, 3)
    picked = torch.cat([picked, scores[:, :, whole:]], dim=2)
    best, slots = picked.amax(dim=3).topk(num_chunks, dim=2)
    places = (groups * group + torch.arange(group, device=scores.device)).flatten(2)
    rest = torch.arange(whole, count, device=scores.device).expand(*places.shape[:2], -1)
    return best, torch.cat([places, rest], dim=2).gather(2, slots)


def tokens_of(rows: Int[Tensor, " rows"], size: int) -> Int[Tensor, " tokens"]:
    """Return the places of the tokens of chunks of so many.

    >>> tokens_of(torch.tensor([0, 2]), 3)
    tensor([0, 1, 2, 6, 7, 8])
    """
    return (rows.unsqueeze(1) * size + torch.arange(size, device=rows.device)).flatten()


def faiss_top_chunks(
    queries: Float[Tensor, "kv_heads queries dim"], search_keys: Float[Tensor, "kv_heads rows dim"], num_chunks: int
) -> Ranked:
    """Return the `num_chunks` largest inner products and their rows, by FAISS over these very vectors, without a copy.

    On a GPU this needs faiss-gpu; where it is missing, torch does the same search.
    """
    pairs = zip(queries, search_keys, strict=True)
    if search_keys.device.type == "cpu":
        metric = faiss.METRIC_INNER_PRODUCT
        found: list[Iterable[Tensor]] = [
            map(torch.from_numpy, faiss.knn(query.numpy(), keys.numpy(), num_chunks, metric)) for query, keys in pairs
        ]
    elif gpu.searches_on(search_keys.device) and num_chunks <= gpu.MOST_FOUND:
        found = [gpu.knn(query, keys, num_chunks) for query, keys in pairs]
    else:
        return exact_top_chunks(queries, search_keys, num_chunks)
    scores, rows = (torch.stack(part) for part in zip(*found, strict=True))
    return scores, rows


class ChunkIndex:
    """An index over the live rows of one store; subclasses say how `best_rows` finds them.

    The bank tells the index about every change of the rows. A kind that keeps data of its own notes it in the three
    `rows_*` methods, in O(changed rows) and without a look at the store's keys, and carries it out at the next search.
    """

    settings: ClassVar[Mapping[str, Setting]] = {}
    rows_per_chunk = 1  # more where rows are tokens
    size = 1  # search keys of a row

    def __init__(self, store: LayerRows) -> None:
        self.store, self.device = store, store.device

    def best_rows(self, queries: Tensor, num_chunks: int, rows: Tensor | None, bonus: Tensor | None = None) -> Ranked:
        """Return scores and rows of the best chunks, best first; there are at least `num_chunks`, and a query."""
        raise NotImplementedError

    def nearest_rows(self, queries: Tensor, num_chunks: int, rows: Tensor | None) -> Ranked:
        """Return the chunks whose keys are nearest: of all or, where not all are compared, of more than are wanted."""
        if self.is_exact(rows):
            return exact_top_chunks(
                queries, self.store.search_keys, num_chunks, None, rows, self.size, by_distance=True
            )
        num_rows = self.store.num_rows if rows is None else len(rows)
        count = min(CANDIDATES_BY_DISTANCE * num_chunks, num_rows)
        found = self.best_rows(queries - self.mean_keys(), count, rows)[1]
        return ranked_again(queries, self.store.search_keys, found, num_chunks, self.size, by_distance=True)

    def mean_keys(self) -> Float[Tensor, "kv_heads 1 dim"]:
        """Return the mean key of each head: less it, the best inner products are hardly those of the longest keys."""
        return decode(self.store.search_keys).float().mean(dim=1, keepdim=True)

    def is_exact(self, rows: Tensor | None) -> bool:
        """Return whether a search of these rows, None for all, compares every one of them."""
        return True

    def search(
        self,
        queries: Float[Tensor, "kv_heads queries dim"],
        num_chunks: int,
        rows: Int[Tensor, " subset"] | None = None,
        bonus: Float[Tensor, " rows"] | None = None,
        *,
        by_distance: bool = False,
    ) -> Ranked:
        """Return scores (float32, descending) and rows (int64); missing slots have row -1 and score -inf.

        `rows`: search only these live rows (sorted, without duplicates). `bonus`: for every live row, added to its
        scores; the best with it are found. `by_distance`: find the nearest keys, without a bonus. Results are where
        `queries` are.
        """
        device, kept = queries.device, self.device
        num_found = min(num_chunks, self.store.num_rows if rows is None else len(rows))
        if num_found and queries.shape[1]:
            rows = None if rows is None else rows.to(kept)
            bonus = None if bonus is None else bonus.to(kept)
            queries = queries.detach().to(kept, torch.float32).contiguous()
            if by_distance:
                scores, found = self.nearest_rows(queries, num_found, rows)
            else:
                scores, found = self.best_rows(queries, num_found, rows, bonus)
        else:
            scores = torch.empty(*queries.shape[:2], 0, device=device)
            found = torch.empty_like(scores, dtype=torch.int64)
        # FAISS answers -1 where it finds nothing to rank, such as for a query that holds NaN.
        scores = scores.masked_fill(found < 0, -torch.inf)
        if room := num_chunks - found.shape[2]:
            scores, found = (
                functional.pad(part, (0, room), value=fill) for part, fill in ((scores, -torch.inf), (found, -1))
            )
        return scores.to(device), found.to(device)

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
        """Return the best of the store's rows, or of some of them."""
        return exact_top_chunks(queries, self.store.search_keys, num_chunks, bonus, rows)


@register("index", "flat")
class FlatIndex(ExactIndex):
    """Exact search by FAISS straight over the store's rows, where these are float32: nothing to build, nothing stored twice."""

    def best_rows(self, queries: Tensor, num_chunks: int, rows: Tensor | None, bonus: Tensor | None = None) -> Ranked:
        """Return the best rows by FAISS over the store's rows, or over a copy of some, and by torch where FAISS cannot."""
        search_keys = self.store.search_keys
        are_most = rows is not None and queries.shape[1] <= FEW_QUERIES and 2 * len(rows) > search_keys.shape[1]
        if bonus is not None or are_most or search_keys.dtype != torch.float32:
            return super().best_rows(queries, num_chunks, rows, bonus)
        if rows is None:
            return self.top_chunks(queries, search_keys, num_chunks)
        scores, found = self.top_chunks(queries, search_keys.index_select(1, rows), num_chunks)
        return scores, torch.where(found < 0, -1, rows[found.clamp(min=0)])

    def top_chunks(self, queries: Tensor, search_keys: Tensor, num_chunks: int) -> Ranked:
        return faiss_top_chunks(queries, search_keys, num_chunks)
