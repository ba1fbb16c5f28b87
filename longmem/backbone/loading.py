"""Opening the frozen backbone and its tokenizer by hub name, local folder or packaged name."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from longmem.console import without_transformers_bars
from longmem.packaged import resolve_backbone


def load_backbone(name_or_path: str, revision: str | None = None, **load_options: Any) -> PreTrainedModel:
    """Return the causal LM of that name, in the dtype it was saved in unless `dtype=` says otherwise.

    Args:
        name_or_path: hub name, local folder or packaged name (`longmem.packaged`).
        revision: hub revision.
        load_options: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, quantization_config, ...).

    Raises:
        OSError: there is no such model, or it can't be reached.
    """
    resolved = resolve_backbone(name_or_path)
    with without_transformers_bars():
        return AutoModelForCausalLM.from_pretrained(resolved, revision=revision or "main", **load_options)


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer that belongs to the backbone of that name.

    Raises:
        OSError: there is no such tokenizer, or it can't be reached.
    """
    return AutoTokenizer.from_pretrained(resolve_backbone(name_or_path), revision=revision or "main")


def encoder_fingerprint(
    model: PreTrainedModel, decoder_layers: Sequence[Any], memory_layers: Sequence[int], recipe: dict[str, Any]
) -> str:
    """Return a hash of everything that determines stored keys and values.

    That is: the backbone's weights except those of layers above the highest memory layer, and the recipe (memory layers,
    chunk size, segment length, dtype). Two encoders with one fingerprint write the same numbers.

    Args:
        model: the backbone.
        decoder_layers: its decoder layers.
        memory_layers: the layers that are stored.
        recipe: further settings that change what is stored; plain values.
    """
    digest = hashlib.blake2b(digest_size=16)
    above = {
        id(parameter)
        for number, layer in enumerate(decoder_layers)
        if number > max(memory_layers)
        for parameter in layer.parameters()
    }
    for name, tensor in model.named_parameters():
        if id(tensor) not in above:
            values = on_cpu(model, name, tensor)
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.flatten().view(torch.uint8).numpy().data)
    digest.update(repr(sorted(recipe.items())).encode())
    return digest.hexdigest()


def on_cpu(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """Return the values of a parameter; one that a device map has offloaded is fetched for the moment."""
    if not tensor.is_meta:
        values = tensor.detach().cpu()
        return (values if type(values) is Tensor else values.dequantize()).contiguous()
    with align_module_device(model.get_submodule(name.rpartition(".")[0]), torch.device("cpu")):
        return model.get_parameter(name).detach().clone()
