"""How one side layer reads memory: its attention, replaced by attention over the local context and what it retrieves."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from longmem.backbone.interception import LocalAttention
from longmem.backbone.positions import CosSin
from longmem.backbone.structure import LayerStructure
from longmem.configuration import LongMemConfig
from longmem.memory.protocols import Memory
from longmem.model.attention import (
    MemoryRead,
    fuse_gated,
    fuse_joint,
    fuse_joint_plain,
    read_memory,
)


class MemoryReader:
    """An attention handler that reads memory beside the local context, for one side layer and one call.

    When the layer is computed again in the backward pass (gradient checkpointing), it reads the chunks that it found the
    first time, weighed as they were then: the search is not repeated.

    Args:
        config: the model's configuration.
        memory_layer: whose stored keys and values are read.
        source: the layer that was copied; it says how queries are turned.
        bias: bias or gate, `heads`.
        memory: one bank for each lane.
        position_embeddings: cosines and sines that the layer is called with, None for models without.
    """

    def __init__(
        self,
        config: LongMemConfig,
        memory_layer: int,
        source: LayerStructure,
        bias: Tensor,
        memory: Sequence[Memory],
        position_embeddings: CosSin | None,
    ) -> None:
        self._config, self._memory_layer, self._source = config, memory_layer, source
        self._bias, self._memory = bias, memory
        self._position_embeddings = position_embeddings
        self.read: MemoryRead | None = None

    def __call__(
        self,
        local: LocalAttention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return the fused output, `lanes tokens heads dim`."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        retrieved = read_memory(
            self._memory_query(query),
            self._memory,
            self._memory_layer,
            num_kv_heads=key.shape[1],
            num_chunks=self._config.num_retrieved_tokens // self._config.chunk_size,
            scaling=scaling,
            softcap=softcap,
            found=() if self.read is None else self.read.found,
        )
        self.read = retrieved.read
        arguments = query, key, value, attention_mask
        if self._config.fusion == "gated":
            capped = {} if softcap is None else {"softcap": softcap}
            output, _ = local(module, *arguments, scaling=scaling, **capped, **kwargs)
            return fuse_gated(output, retrieved, self._bias), None
        if softcap is not None:
            return fuse_joint_plain(*arguments, retrieved, self._bias, scaling, softcap), None
        return fuse_joint(local, module, *arguments, retrieved, self._bias, scaling, **kwargs), None

    def _memory_query(self, query: Tensor) -> Tensor:
        """Return the queries that meet stored keys: turned from their own positions to the memory distance."""
        rotary, rotation = self._source.rotary, self._source.rotation
        if rotary is None or rotation is None or self._position_embeddings is None:
            return query
        there = rotary.at([self._config.memory_distance], query)
        return rotation.move_queries(query, self._position_embeddings, there)
