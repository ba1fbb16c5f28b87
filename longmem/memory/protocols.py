"""What reading and writing ask of each other: a memory, what a search of it found, and the writer behind a bank."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.encoder.history import Encoders
from longmem.encoder.sketch import Sketch
from longmem.encoder.stamp import EncoderStamp
from longmem.memory.rows.documents import DocumentInfo
from longmem.memory.rows.ledger import ChunkPlace
from longmem.memory.rows.segments import Segment

# Keys or values of each memory layer: `lanes kv_heads tokens dim`.
Layers = Sequence[Float[Tensor, "_lanes _kv_heads _tokens _dim"]]


class Found(NamedTuple):
    """What a search found for each query, best first, all of one moment.

    Where there is less than was asked for, rows are -1 and scores -inf. `log_weights`: what the age of each chunk adds to
    its attention scores; None where age does not count. Rows are good while the memory has this `generation`; None: the
    memory holds nothing. `sizes`: how many tokens each chunk has, as the last of a document may be shorter; those behind them
    are copies, to be masked. None: all are whole.
    """

    rows: Int[Tensor, "kv_heads queries chunks"]
    scores: Float[Tensor, "kv_heads queries chunks"]
    log_weights: Float[Tensor, "kv_heads queries chunks"] | None
    generation: Hashable
    sizes: Int[Tensor, "kv_heads queries chunks"] | None = None


@runtime_checkable
class Memory(Protocol):
    """What attention needs of a memory: a bank, a selection of its documents, or several banks."""

    @property
    def memory_layers(self) -> tuple[int, ...]: ...

    @property
    def chunk_size(self) -> int: ...

    @property
    def by_token(self) -> bool:
        """Return whether chunks are found by their best token, and not by their mean key."""
        ...

    @property
    def is_empty(self) -> bool:
        """Return whether a search can find nothing."""
        ...

    def ready_for(self, model: EncodingModel) -> None:
        """Make ready to be read by a model, or refuse; called before every forward pass."""
        ...

    def search(self, layer: int, queries: Tensor, num_chunks: int, *, scaling: float | None = None) -> Found:
        """Return the best chunks of a memory layer; `scaling` is attention's factor on inner products."""
        ...

    def gather(self, layer: int, rows: Int[Tensor, "kv_heads chunks"], generation: Hashable) -> tuple[Tensor, Tensor]:
        """Return keys and values of rows, `kv_heads chunks chunk_size dim`; `Found.sizes` says which of them count.

        Raises:
            ChangedMemoryError: the memory is no longer of the generation in which the rows were found.
        """
        ...

    def locate(self, rows: Int[Tensor, "*shape"]) -> list[ChunkPlace | None]:
        """Return where each row is from, flattened; None for row -1."""
        ...


class NeighbourMemory(Memory, Protocol):
    """A memory that also says which tokens are like others, and what came next: what predicting by neighbours needs."""

    def nearest(self, layer: int, queries: Float[Tensor, "kv_heads queries dim"], num_chunks: int) -> Found:
        """Return the chunks of a memory layer with the keys, or mean keys, at the smallest distance to each query."""
        ...

    def sample(self, num_chunks: int) -> Found:
        """Return so many chunks, or all if there are fewer, spread evenly over what a search can find; one head, one query."""
        ...

    def next_ids(self, rows: Int[Tensor, "*shape"], generation: Hashable) -> Int[Tensor, "*shape chunk_size"]:
        """Return the id of the token that follows each token of rows; -1 where none does, or it is not known.

        Raises:
            ChangedMemoryError: the memory is no longer of the generation in which the rows were found.
        """
        ...


class Attended(NamedTuple):
    """What queries get of a memory: attention over the chunks that were found, its log-sum-exp, each chunk's share."""

    output: Float[Tensor, "kv_heads queries dim"]
    logsumexp: Float[Tensor, "kv_heads queries"]
    chunk_weights: Float[Tensor, "kv_heads queries chunks"]
    found: Found


@runtime_checkable
class AttendingMemory(Protocol):
    """A memory that attends where its keys and values are, so that they need not be fetched to be read."""

    def attend(
        self,
        layer: int,
        queries: Tensor,
        num_chunks: int,
        *,
        scaling: float,
        softcap: float | None,
        dtype: torch.dtype,
        shared: int = 1,
    ) -> Attended | None:
        """Return what the queries get of the best chunks, computed in a dtype; None if nothing is there to be found.

        `shared`: as many queries, side by side, choose together; each has the rows of its choice in what comes back.
        """
        ...


class Writer(Protocol):
    """All that a bank may ask of what writes to it: encode, say which encoder it is, and whether it is about to move."""

    @property
    def is_moving(self) -> bool:
        """Return whether the encoder moves on purpose."""
        ...

    def encode(self, input_ids: Int[Tensor, "lanes tokens"]) -> tuple[Layers, Layers]:
        """Return position-free keys and values of the tokens, of each memory layer, without gradients."""
        ...

    def stamp(self, *, exact: bool = False) -> EncoderStamp:
        """Return which encoder this is; `exact`: by a hash made anew."""
        ...

    def stamp_for_reading(self) -> EncoderStamp:
        """Return which encoder this is; raise StaleMemoryError if it is about to move, and not on purpose."""
        ...

    def sketch(self) -> Sketch:
        """Return a summary of the weights, to measure how far they move."""
        ...


class EncodingModel(Protocol):
    """What a bank and `memorize` need of a model."""

    @property
    def encoder(self) -> Writer: ...

    @property
    def config(self) -> Any:
        """Return a configuration with `memory_layers`, `chunk_size`, `search`, `segment_length` and `get_text_config()`."""
        ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def input_device(self) -> torch.device: ...


class WritableBank(Protocol):
    """What `memorize` needs of a bank; arguments are those of `MemoryBank`."""

    @property
    def chunk_size(self) -> int: ...

    @property
    def encoders(self) -> Encoders: ...

    @property
    def num_evicted_tokens(self) -> int: ...

    def __contains__(self, document_id: object) -> bool: ...

    def transaction(self) -> contextlib.AbstractContextManager[None]: ...

    def info(self, document_id: str) -> DocumentInfo: ...

    def segments(self, document_id: str) -> list[Segment]: ...

    def token_ids(self, document_id: str, start: int | None = None) -> Int[Tensor, " tokens"] | None: ...

    def add(self, *given: Any, **options: Any) -> None: ...

    def append(self, *given: Any, **options: Any) -> None: ...

    def copy_tokens(self, *given: Any, **options: Any) -> None: ...

    def delete(self, document_id: str) -> None: ...
