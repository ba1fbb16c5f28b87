"""Search by token: a chunk is found by the best of its tokens' keys, which are what any kind of index searches."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.memory.index.exact import SCORES_PER_STEP, ChunkIndex, Ranked
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
    def search_keys(self) -> Float[Tensor, "kv_heads rows key_dim"]:
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
        tokens = None if rows is None else self._tokens_of(rows)
        if self.tokens.is_exact(tokens):
            return self._best_of_all(queries, num_chunks, rows, bonus)
        added = None if bonus is None else bonus.repeat_interleave(size)
        wanted = (num_chunks - 1) * size + 1
        scores, found = self.tokens.best_rows(queries, wanted, tokens, added)
        if size == 1:
            return scores, found
        found = torch.where(found < 0, -1, found.div(size, rounding_mode="floor"))
        is_repeated = (found.unsqueeze(-1) == found.unsqueeze(-2)).tril(-1).any(dim=-1)
        scores, slots = scores.masked_fill(is_repeated | (found < 0), -torch.inf).topk(num_chunks, dim=2)
        return scores, found.gather(2, slots).masked_fill(scores == -torch.inf, -1)

    def _best_of_all(self, queries: Tensor, num_chunks: int, rows: Tensor | None, bonus: Tensor | None) -> Ranked:
        keys = self.store.search_keys
        is_left_out = None
        if rows is not None and 2 * len(rows) > self.store.num_rows:  # a mask costs less than a copy
            is_left_out = torch.ones(self.store.num_rows, dtype=torch.bool, device=keys.device)
            is_left_out[rows] = False
        elif rows is not None:
            keys = keys.index_select(1, self._tokens_of(rows))
            bonus = None if bonus is None else bonus[rows]
        keys = keys.transpose(1, 2)
        found = []
        for block in queries.split(max(1, SCORES_PER_STEP // (keys.shape[0] * keys.shape[2])), dim=1):
            scores = (block @ keys).unflatten(2, (-1, self.chunk_size)).amax(dim=3)
            if bonus is not None:
                scores += bonus
            if is_left_out is not None:
                scores.masked_fill_(is_left_out, -torch.inf)
            found.append(scores.topk(num_chunks, dim=2))
        best, places = (torch.cat(part, dim=1) for part in zip(*found, strict=True))
        return best, places if rows is None or is_left_out is not None else rows[places]

    def rows_written(self, rows: Int[Tensor, " rows"]) -> None:
        self.tokens.rows_written(self._tokens_of(rows))

    def rows_moved(self, sources: Int[Tensor, " rows"], destinations: Int[Tensor, " rows"]) -> None:
        self.tokens.rows_moved(self._tokens_of(sources), self._tokens_of(destinations))

    def note_reencoded(self, count: int) -> None:
        self.tokens.note_reencoded(count * self.chunk_size)

    def rows_dropped(self, rows: Int[Tensor, " rows"]) -> None:
        self.tokens.rows_dropped(self._tokens_of(rows))

    def export(self) -> SavedIndex | None:
        return self.tokens.export()

    def adopt(self, saved: SavedIndex) -> bool:
        return self.tokens.adopt(saved)

    def _tokens_of(self, rows: Int[Tensor, " rows"]) -> Int[Tensor, " tokens"]:
        return (rows.unsqueeze(1) * self.chunk_size + torch.arange(self.chunk_size, device=rows.device)).flatten()
