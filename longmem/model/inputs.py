"""What a call of the model may be given: banks that fit it, and no argument that would be ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longmem.backbone.structure import BackboneStructure, UnsupportedBackboneError
from longmem.configuration import LongMemConfig
from longmem.memory.protocols import EncodingModel, Memory


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
    if not hasattr(bank, "search"):
        raise ValueError(
            f"`memory` must be a MemoryBank or a list with one for each row, got {type(bank).__name__}; a row reads "
            "several banks through `BankShards([...])`."
        )
    if list(bank.memory_layers) != list(config.memory_layers or ()) or bank.chunk_size != config.chunk_size:
        raise ValueError(
            f"`memory` was made for memory layers {list(bank.memory_layers)} in chunks of {bank.chunk_size}, this "
            f"model reads {config.memory_layers} in chunks of {config.chunk_size}; "
            "make one with `MemoryBank.for_model(model)`."
        )
    bank.ready_for(model)


def refuse_unstorable_layers(config: LongMemConfig, structure: BackboneStructure) -> None:
    """Raise UnsupportedBackboneError if a memory layer has no keys that can be stored."""
    for layer in config.memory_layers or ():
        if (obstacle := structure.layers[layer].obstacle) is not None:
            raise UnsupportedBackboneError(
                f"`memory_layers` must be layers whose keys can be stored, {structure.storable_layers} of this backbone, "
                f"got {config.memory_layers}: {obstacle}."
            )


def refuse_unknown_inputs(kwargs: dict[str, Any]) -> None:
    """Raise for arguments of `forward` that would be ignored; those that transformers passes by habit are let through."""
    harmless = {"return_dict", "output_attentions", "output_hidden_states", "inputs_embeds"}
    for name, value in kwargs.items():
        if name == "tokenizer":  # `generate` reads stop strings with it and, in transformers 5, hands it on
            continue
        if name not in harmless or not (value is None or isinstance(value, bool)):
            raise ValueError(f"`forward` got `{name}`, which a LongMem model does not use; leave it out.")
        if value is True and name in ("output_attentions", "output_hidden_states"):
            raise ValueError(
                f"`{name}=True` is not available: two networks run. Use `output_memory_reads=True` to see what was read."
            )
