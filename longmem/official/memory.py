"""The memory of the released code, rule for rule, so that its runs can be replayed.

Source: `fairseq/modules/dynamic_memory_with_chunk.py` of the released code. What differs from `MemoryBank`: one memory for
all rows of a batch, chunks that straddle rows, padding stored, tails dropped, eviction of two segments' worth at once,
a last slot that is never filled, and missing slots that are read as zeros. Where that code would crash or go wrong in
silence, this raises `ReleasedCodeError`.
"""

from collections.abc import Hashable, Sequence

import faiss
import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.errors import ChangedMemoryError
from longmem.memory.checks import validate_storage_dtype
from longmem.memory.protocols import EncodingModel, Found
from longmem.memory.rows.storage import FLOATING_DTYPES


class ReleasedCodeError(ValueError):
    """The released code has no answer here: it crashes, or corrupts its memory; the message says which and why."""


class OfficialMemory:
    """One store of chunks for one memory layer; `LongMemForCausalLM` reads it as it reads a `MemoryBank`.

    `memory_layer`: backbone layer whose keys and values are stored. `memory_size`: capacity in tokens; a rest shorter than a
    chunk is not used. The released code stores keys and values in float16. Search keys are float32.

    >>> memory = OfficialMemory(memory_layer=3, chunk_size=2, memory_size=16)
    >>> states = [torch.ones(1, 4, 5, 8)]  # a batch of one, 4 heads, 5 tokens
    >>> memory.write(states, states)
    >>> memory.num_chunks
    2
    """

    by_token = False
    fingerprint = None  # nothing of the encoder is kept, so nothing can be checked

    def __init__(
        self, *, memory_layer: int, chunk_size: int, memory_size: int, storage_dtype: torch.dtype | str = "float16"
    ) -> None:
        self.memory_layers = (memory_layer,)
        self.chunk_size = chunk_size
        self.capacity = memory_size // chunk_size
        self.storage_dtype = validate_storage_dtype(storage_dtype, FLOATING_DTYPES)
        if self.capacity < 1:
            raise ValueError(f"`memory_size` must hold a chunk of `chunk_size` {chunk_size}, got {memory_size}.")
        self.num_chunks = 0
        self.generation = 0
        self.keys = self.values = torch.empty(0)
        self.search_keys = torch.empty(0)

    @property
    def is_empty(self) -> bool:
        """Return whether nothing is stored."""
        return self.num_chunks == 0

    @property
    def zero_row(self) -> int:
        """The last row: always zero, and what a missing slot is read from."""
        return self.capacity - 1

    def clear(self) -> None:
        """Forget everything (`reset` of the released code)."""
        self.num_chunks = 0
        self.generation += 1
        for store in (self.keys, self.values):
            store.zero_()
        self.search_keys = self.search_keys[:, :0]

    def ready_for(self, model: EncodingModel) -> None:
        """Be read by any model: nothing of the encoder is known."""

    def locate(self, rows: Int[Tensor, "..."]) -> list[None]:
        """Return None for every row: nothing is known of documents."""
        return [None] * rows.numel()

    def search(
        self, layer: int, queries: Float[Tensor, "heads queries dim"], num_chunks: int, *, scaling: float | None = None
    ) -> Found:
        """Return scores and rows of the chunks with the largest inner products, best first; missing: `zero_row`, score 0.

        The search is FAISS's exact one, as in the released code, so that ties fall the same way.
        """
        found = []
        for head, head_queries in enumerate(queries.detach().float().cpu()):
            index = faiss.IndexFlatIP(queries.shape[-1])
            index.add(self.search_keys[head].numpy())
            found.append([torch.from_numpy(part) for part in index.search(head_queries.numpy(), num_chunks)])
        scores, rows = (torch.stack(part) for part in zip(*found, strict=True))
        missing = rows < 0
        rows = rows.masked_fill(missing, self.zero_row)
        return Found(rows, scores.masked_fill(missing, 0.0), None, self.generation)

    def gather(
        self, layer: int, rows: Int[Tensor, "heads chunks"], generation: Hashable
    ) -> tuple[Float[Tensor, "heads chunks chunk_size dim"], Float[Tensor, "heads chunks chunk_size dim"]]:
        """Return keys and values of these rows, in the storage dtype."""
        if generation != self.generation:
            raise ChangedMemoryError
        heads = torch.arange(len(rows))[:, None]
        return self.keys[heads, rows.cpu()], self.values[heads, rows.cpu()]

    def write(
        self,
        keys: Sequence[Float[Tensor, "lanes heads tokens dim"]],
        values: Sequence[Float[Tensor, "lanes heads tokens dim"]],
    ) -> None:
        """Store a batch, all rows one after the other; the tail shorter than a chunk is dropped.

        Arguments as `LongMemForCausalLM.forward` returns them: one tensor each, for the one memory layer.

        Raises ReleasedCodeError if the batch is more than the released eviction can make room for (nothing is written), or a
        number does not fit the storage dtype.
        """
        (batch_keys,), (batch_values,) = keys, values
        num_tokens = batch_keys.shape[0] * batch_keys.shape[2]
        num_new = num_tokens // self.chunk_size
        evicted = 2 * num_tokens // self.chunk_size if self.num_chunks + num_new >= self.capacity else 0
        if evicted > self.num_chunks:
            raise ReleasedCodeError(
                f"a batch of {num_tokens} tokens ({num_new} chunks) makes the released code evict {evicted} chunks where "
                f"{self.num_chunks} of {self.capacity} are stored: it crashes (memory of at most two batches) or writes "
                "rows that its index no longer matches (a long batch after a short one)."
            )
        chunked = [self._chunks(part, num_new) for part in (batch_keys, batch_values)]
        rows = [part.to(self.storage_dtype) for part in chunked]
        if not all(part.isfinite().all() for part in rows):
            raise ReleasedCodeError(
                f"keys or values do not fit {self.storage_dtype}: the released code stores inf; use float32."
            )
        if not self.keys.numel():
            heads, _, _, dim = chunked[0].shape
            self.keys = torch.zeros(heads, self.capacity, self.chunk_size, dim, dtype=self.storage_dtype)
            self.values, self.search_keys = torch.zeros_like(self.keys), torch.zeros(heads, 0, dim)
        if evicted:  # the oldest; all others move down, and what is freed is zero
            self.generation += 1
            for store in (self.keys, self.values):
                store.copy_(torch.cat([store[:, evicted:], torch.zeros_like(store[:, :evicted])], dim=1))
            self.search_keys = self.search_keys[:, evicted:].contiguous()
            self.num_chunks -= evicted
        new = slice(self.num_chunks, self.num_chunks + num_new)
        self.keys[:, new], self.values[:, new] = rows
        self.search_keys = torch.cat([self.search_keys, chunked[0].mean(dim=2)], dim=1)
        self.num_chunks += num_new

    def _chunks(self, states: Tensor, num_chunks: int) -> Float[Tensor, "heads chunks chunk_size dim"]:
        """Return a batch, row after row, cut into chunks: float32, on the CPU."""
        tokens = states.detach().float().cpu().transpose(0, 1).flatten(1, 2)
        return tokens[:, : num_chunks * self.chunk_size].unflatten(1, (num_chunks, self.chunk_size))
