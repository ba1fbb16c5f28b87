"""How one side layer reads memory: its attention, replaced by attention over the local context and what it retrieves."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from longmem.backbone.interception import LocalAttention
from longmem.backbone.positions import CosSin
from longmem.backbone.structure import LayerStructure
from longmem.configuration import LongMemConfig
from longmem.memory.protocols import EncodingModel, Memory
from longmem.model.attention import (
    MemoryRead,
    fuse_gated,
    fuse_joint,
    fuse_joint_plain,
    read_memory,
    sees_itself_alone,
)

Turns = dict[tuple[int, int, int | None], tuple[CosSin, CosSin]]
# Search and rows live outside of any graph. Said here: a shard attends without a model, and has no use for the compiler.
read_outside_of_graphs = torch.compiler.disable(read_memory)


class MemoryReader:
    """An attention handler that reads memory beside the local context, for one side layer and one call.

    When the layer is computed again in the backward pass (gradient checkpointing), it reads the chunks that it found the
    first time, weighed as they were then: the search is not repeated.

    Args:
        config: the model's configuration.
        memory_layer: whose stored keys and values are read.
        source: the layer that was copied; it says how queries are turned.
        bias: bias or gate, `heads`.
        null: score of the null slot, `heads`; None: there is none.
        heads: key-value heads that read; None: all.
        memory: one bank for each lane.
        position_embeddings: cosines and sines that the layer is called with, None for models without.
        turns: what other layers of the same call have turned their queries by, which this one may use and add to; where each
            head has its own distance, the cosines and sines at position 1.
        log_distance: logarithm of the memory distance, `heads`; None: that of the configuration.
    """

    def __init__(
        self,
        config: LongMemConfig,
        memory_layer: int,
        source: LayerStructure,
        bias: Tensor,
        memory: Sequence[Memory],
        position_embeddings: CosSin | None,
        null: Tensor | None = None,
        heads: Sequence[int] | None = None,
        turns: Turns | None = None,
        log_distance: Tensor | None = None,
    ) -> None:
        self._config, self._memory_layer, self._source = config, memory_layer, source
        self._bias, self._null, self._memory, self._heads = bias, null, memory, heads
        self._log_distance = log_distance
        self._position_embeddings, self._turns = position_embeddings, {} if turns is None else turns
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
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        reading, asking, log_distance = None, query, self._log_distance
        if self._heads is not None:
            reading = query_heads(tuple(self._heads), num_heads // num_kv_heads, query.device)
            asking, num_kv_heads = query.index_select(1, reading), len(self._heads)
            log_distance = None if log_distance is None else log_distance.to(query.device)[reading]
        retrieved = read_outside_of_graphs(
            self._memory_query(asking, log_distance),
            self._memory,
            self._memory_layer,
            num_kv_heads=num_kv_heads,
            num_chunks=self._config.num_retrieved_tokens // self._config.chunk_size,
            scaling=scaling,
            softcap=softcap,
            choice_per=self._config.choice_per,
            found=() if self.read is None else self.read.found,
        )
        if not self._config.start_reads:
            retrieved = retrieved.except_at(sees_itself_alone(query, key, attention_mask))
        if reading is not None:
            retrieved = retrieved.of_heads(reading, num_heads)
        if self._null is not None:
            retrieved = retrieved.beside_null(self._null)
        self.read = retrieved.read
        arguments = query, key, value, attention_mask
        if self._config.fusion == "gated":
            capped = {} if softcap is None else {"softcap": softcap}
            output, _ = local(module, *arguments, scaling=scaling, **capped, **kwargs)
            return fuse_gated(output, retrieved, self._bias), None
        if softcap is not None:
            return fuse_joint_plain(*arguments, retrieved, self._bias, scaling, softcap), None
        return fuse_joint(local, module, *arguments, retrieved, self._bias, scaling, **kwargs), None

    def _memory_query(self, query: Tensor, log_distance: Tensor | None) -> Tensor:
        """Return the queries that meet stored keys: turned from their own positions to the memory distance."""
        rotary, rotation, here = self._source.rotary, self._source.rotation, self._position_embeddings
        if rotary is None or rotation is None or here is None:
            return query
        reach = self._source.reach
        key = id(rotary.module), id(here[0]), reach if log_distance is None else None
        if key not in self._turns:  # `here` is kept, so that nothing else gets its id
            if log_distance is None:
                distance = self._config.memory_distance
                turn_or_first = rotary.turn_from(here, min(distance, reach or distance), query)
            else:
                turn_or_first = rotary.at([1], query.float())
            self._turns[key] = here, turn_or_first
        if log_distance is not None:
            distances = log_distance.float().exp()
            if reach is not None:
                # Gradients are those at the farthest distance, so that a head may come back.
                distances = distances + (distances.clamp(max=reach) - distances).detach()
            turn = rotary.turn_of_heads(here, self._turns[key][1], distances)
            return rotation.rotate_heads(query.float(), turn).to(query.dtype)
        return rotation.rotate(query.float(), self._turns[key][1]).to(query.dtype)


@functools.lru_cache(maxsize=256)  # made once for a device: a copy to a GPU would be waited for in each layer
def query_heads(kv_heads: tuple[int, ...], group: int, device: torch.device) -> Int[Tensor, " query_heads"]:
    """Return the query heads of some key-value heads, each of which has a group of so many, side by side."""
    return torch.tensor([head * group + place for head in kv_heads for place in range(group)], device=device)


@torch.compiler.disable  # the encoder is watched, and banks are prepared, outside of any graph
def banks_per_lane(model: EncodingModel, memory: Memory | Sequence[Memory], lanes: int) -> list[Memory]:
    """Return one bank for each lane; beams of one lane share its bank.

    Raises:
        ValueError: the number of banks does not fit the lanes, or a bank is not this model's.
    """
    banks: list[Any] = list(memory) if isinstance(memory, list | tuple) else [memory]
    if not banks or lanes % len(banks):
        raise ValueError(
            f"`memory` must be one bank or a list with one bank per batch row, got {len(banks)} for {lanes} rows."
        )
    for bank in banks:
        refuse_other_encoder(model, bank)
    return [bank for bank in banks for _ in range(lanes // len(banks))]


def refuse_other_encoder(model: EncodingModel, bank: Any) -> None:
    """Raise ValueError if `bank` is no bank of this model's kind; let it act if another encoder wrote what it holds."""
    config = model.config
    if not hasattr(bank, "search") or isinstance(bank, type):
        raise ValueError(
            f"`memory` must be a MemoryBank or a list with one for each row, got {type(bank).__name__}; a row reads "
            "several banks through `BankShards([...])`."
        )
    stored = (list(bank.memory_layers), bank.chunk_size, bank.by_token)
    if stored != (list(config.memory_layers or ()), config.chunk_size, config.search == "token"):
        raise ValueError(
            f"`memory` was made for memory layers {stored[0]} in chunks of {stored[1]}, found by "
            f"{'token' if stored[2] else 'chunk_mean'}; this model reads {config.memory_layers} in chunks of "
            f"{config.chunk_size}, found by {config.search}; "
            "make one with `MemoryBank.for_model(model)`."
        )
    bank.ready_for(model)
