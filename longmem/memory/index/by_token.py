"""Search by token: a chunk is found by the best of its tokens' keys, which are what any kind of index searches."""

from __future__ import annotations

import torch
from jaxtyping import Int, Num
from torch import Tensor

from longmem.memory.index.exact import ChunkIndex, Ranked, exact_top_chunks, tokens_of
from longmem.memory.index.kinds import make_index
from longmem.memory.index.saved import SavedIndex
from longmem.memory.rows.storage import LayerRows, LayerShape


class TokenRows:
    """The tokens of a store as rows of their own: token t of row r is row `r * chunk_size + t`."""

    def __init__(self, store: LayerRows, chunk_size: int) -> None:
        self.store, self.chunk_size = store, chunk_size

    @property
    def shape(self) -> LayerShape:
        return self.store.shape

    @property
    def num_rows(self) -> int:
        return self.store.num_rows * self.chunk_size

    @property
    def search_keys(self) -> Num[Tensor, "kv_heads rows stored_key_dim"]:
        return self.store.search_keys

    @property
    def device(self) -> torch.device:
        return self.store.device


class TokenIndex(ChunkIndex):
    """An index over chunks that asks another one, over their tokens.

    Args:
        index: kind of the other index, and its settings.
        store: rows of chunks, whose search keys are those of all tokens.
        chunk_size: tokens of a row.
    """

    def __init__(self, index: str, store: LayerRows, chunk_size: int) -> None:
        super().__init__(store)
        self.chunk_size = chunk_size
        self.tokens = make_index(index, TokenRows(store, chunk_size))
        self.tokens.rows_per_chunk = chunk_size

    def best_rows(self, queries: Tensor, num_chunks: int, rows: Tensor | None, bonus: Tensor | None = None) -> Ranked:
        """Return the chunks of the best tokens: all are compared or, approximately, so many that there are chunks enough."""
        size = self.chunk_size
        tokens = None if rows is None else tokens_of(rows, size)
        if self.tokens.is_exact(tokens):
            return exact_top_chunks(queries, self.store.search_keys, num_chunks, bonus, rows, size)
        added = None if bonus is None else bonus.repeat_interleave(size)
        wanted = (num_chunks - 1) * size + 1
        scores, found = self.tokens.best_rows(queries, wanted, tokens, added)
        if size == 1:
            return scores, found
        found = torch.where(found < 0, -1, found.div(size, rounding_mode="floor"))
        is_repeated = (found.unsqueeze(-1) == found.unsqueeze(-2)).tril(-1).any(dim=-1)
        scores, slots = scores.masked_fill(is_repeated | (found < 0), -torch.inf).topk(num_chunks, dim=2)
        return scores, found.gather(2, slots).masked_fill(scores == -torch.inf, -1)

    def rows_written(self, rows: Int[Tensor, " rows"]) -> None:
        self.tokens.rows_written(tokens_of(rows, self.chunk_size))

    def rows_moved(self, sources: Int[Tensor, " rows"], destinations: Int[Tensor, " rows"]) -> None:
        self.tokens.rows_moved(tokens_of(sources, self.chunk_size), tokens_of(destinations, self.chunk_size))

    def note_reencoded(self, count: int) -> None:
        self.tokens.note_reencoded(count * self.chunk_size)

    def rows_dropped(self, rows: Int[Tensor, " rows"]) -> None:
        self.tokens.rows_dropped(tokens_of(rows, self.chunk_size))

    def export(self) -> SavedIndex | None:
        return self.tokens.export()

    def adopt(self, saved: SavedIndex) -> bool:
        return self.tokens.adopt(saved)
