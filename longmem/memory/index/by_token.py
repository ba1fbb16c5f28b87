"""Search by token: a chunk is found by the best of its tokens' keys, which are what any kind of index searches."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from longmem.memory.index.exact import ChunkIndex, Ranked, exact_top_chunks, tokens_of
from longmem.memory.index.kinds import make_index
from longmem.memory.index.saved import SavedIndex
from longmem.memory.rows.storage import LayerRows, LayerShape

PAIRS_AT_ONCE = 2**24  # of tokens that one query has found, of which those of one chunk are looked for


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
        self.size = chunk_size
        self.tokens = make_index(index, TokenRows(store, chunk_size))
        self.tokens.rows_per_chunk = chunk_size

    def best_rows(self, queries: Tensor, num_chunks: int, rows: Tensor | None, bonus: Tensor | None = None) -> Ranked:
        """Return the chunks of the best tokens: all are compared or, approximately, so many that there are chunks enough."""
        size = self.size
        tokens = None if rows is None else tokens_of(rows, size)
        if self.tokens.is_exact(tokens):
            return exact_top_chunks(queries, self.store.search_keys, num_chunks, bonus, rows, size)
        added = None if bonus is None else bonus.repeat_interleave(size)
        wanted = (num_chunks - 1) * size + 1
        return self._chunks_of(*self.tokens.best_rows(queries, wanted, tokens, added), num_chunks)

    def nearest_rows(self, queries: Tensor, num_chunks: int, rows: Tensor | None) -> Ranked:
        """Return the chunks of the nearest tokens, as `best_rows` does those of the best."""
        if self.is_exact(rows):
            return super().nearest_rows(queries, num_chunks, rows)
        wanted, tokens = (num_chunks - 1) * self.size + 1, None if rows is None else tokens_of(rows, self.size)
        return self._chunks_of(*self.tokens.nearest_rows(queries, wanted, tokens), num_chunks)

    def _chunks_of(self, scores: Tensor, found: Tensor, num_chunks: int) -> Ranked:
        """Return the chunks of tokens that were found, each once."""
        size = self.size
        if size == 1:
            return scores, found
        found = torch.where(found < 0, -1, found.div(size, rounding_mode="floor"))
        some = max(1, PAIRS_AT_ONCE // (len(found) * found.shape[2] ** 2))
        pairs = ((part.unsqueeze(-1) == part.unsqueeze(-2)).tril(-1).any(dim=-1) for part in found.split(some, dim=1))
        is_repeated = torch.cat(list(pairs), dim=1)
        scores, slots = scores.masked_fill(is_repeated | (found < 0), -torch.inf).topk(num_chunks, dim=2)
        return scores, found.gather(2, slots).masked_fill(scores == -torch.inf, -1)

    def mean_keys(self) -> Float[Tensor, "kv_heads 1 dim"]:
        """Return the mean key of all tokens of each head."""
        return self.tokens.mean_keys()

    def is_exact(self, rows: Tensor | None) -> bool:
        """Return whether the keys of all tokens are compared."""
        return self.tokens.is_exact(None if rows is None else tokens_of(rows, self.size))

    def rows_written(self, rows: Int[Tensor, " rows"]) -> None:
        self.tokens.rows_written(tokens_of(rows, self.size))

    def rows_moved(self, sources: Int[Tensor, " rows"], destinations: Int[Tensor, " rows"]) -> None:
        self.tokens.rows_moved(tokens_of(sources, self.size), tokens_of(destinations, self.size))

    def note_reencoded(self, count: int) -> None:
        self.tokens.note_reencoded(count * self.size)

    def rows_dropped(self, rows: Int[Tensor, " rows"]) -> None:
        self.tokens.rows_dropped(tokens_of(rows, self.size))

    def export(self) -> SavedIndex | None:
        return self.tokens.export()

    def adopt(self, saved: SavedIndex) -> bool:
        return self.tokens.adopt(saved)
