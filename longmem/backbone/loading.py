"""Opening the frozen backbone and its tokenizer by hub name, local folder or packaged name."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from longmem.console import without_transformers_bars
from longmem.packaged import resolve_backbone

# Fields of a configuration that change nothing that is stored: names, versions, how it is run, what is generated.
WITHOUT_EFFECT = frozenset(
    ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "auto_map")
    + (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "quantization_config",
        "id2label",
        "label2id",
    )
)


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

    That is: the backbone's weights and saved buffers except those of layers above the highest memory layer, its
    configuration (rotary scaling, activations, ...) as far as it is not the default of its type, and the recipe (memory
    layers, chunk size, segment length). Two encoders with one fingerprint write the same numbers.

    Args:
        model: the backbone.
        decoder_layers: its decoder layers.
        memory_layers: the layers that are stored.
        recipe: further settings that change what is stored; plain values.
    """
    digest = hashlib.blake2b(digest_size=16)
    above = {
        id(tensor)
        for layer in list(decoder_layers)[max(memory_layers) + 1 :]
        for tensor in [*layer.parameters(), *layer.buffers()]
    }
    for name, tensor in [*model.named_parameters(), *saved_buffers(model)]:
        if id(tensor) not in above:
            values = on_cpu(model, name, tensor)
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.flatten().view(torch.uint8).numpy().data)
    settings = model.config.get_text_config().to_diff_dict()
    described = {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}
    digest.update(json.dumps([described, sorted(recipe.items())], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def saved_buffers(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that belong to a checkpoint; asking for `state_dict` would repack bitsandbytes' weights."""
    for prefix, module in model.named_modules():
        for name, tensor in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, tensor


def on_cpu(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """Return the values of a parameter; one that a device map has offloaded is fetched for the moment."""
    if not tensor.is_meta:
        values = tensor.detach().cpu()
        return (values if type(values) is Tensor else values.dequantize()).contiguous()
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    with align_module_device(owner, torch.device("cpu")):
        return getattr(owner, leaf).detach().clone()
