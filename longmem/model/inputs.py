"""What a model may be given: layers whose keys can be stored, and no argument that would be ignored."""

from __future__ import annotations

from inspect import signature
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs

from longmem.backbone.structure import BackboneStructure, UnsupportedBackboneError
from longmem.configuration import LongMemConfig


def refuse_unstorable_layers(config: LongMemConfig, structure: BackboneStructure) -> None:
    """Raise UnsupportedBackboneError if a memory layer has no keys that can be stored."""
    for layer in config.memory_layers or ():
        if (obstacle := structure.layers[layer].obstacle) is not None:
            raise UnsupportedBackboneError(
                f"`memory_layers` must be layers whose keys can be stored, {structure.storable_layers} of this backbone, "
                f"got {config.memory_layers}: {obstacle}."
            )


def refuse_unknown_inputs(backbone: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Raise for arguments of `forward` that would be ignored; what transformers hands to every model is let through.

    That is: a name of transformers' own, or of the backbone's `forward`, with a value that asks for nothing.
    """
    theirs = {*TransformersKwargs.__annotations__, *signature(type(backbone).forward).parameters}
    for name, value in kwargs.items():
        if name in ("output_attentions", "output_hidden_states") and value:
            raise ValueError(
                f"`{name}={value}` is not available: two networks run. Use `output_memory_reads=True` to see what was read."
            )
        # `generate` reads stop strings with the tokenizer and, in transformers 5, hands it on.
        asks_for_nothing = value is None or (value is False and name.startswith("output_"))
        if name not in ("tokenizer", "return_dict") and not (name in theirs and asks_for_nothing):
            raise ValueError(f"`forward` got `{name}`, which a LongMem model does not use; leave it out.")
