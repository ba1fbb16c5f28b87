"""LoRA (arXiv 2106.09685) on the side network: frozen copies of the backbone's layers, a few trained MB beside them.

A linear layer computes `W x + (alpha / rank) B A x`. W is the backbone's own and frozen, A and B are trained; B starts at
zero, so a new network computes exactly what it would without them. The layers themselves come from the library peft.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from longmem.configuration import ALL_LINEAR
from longmem.console import without_warnings_of
from longmem.errors import did_you_mean

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def add_adapters(layers: nn.ModuleList, settings: dict[str, Any]) -> None:
    """Put adapters into the linear layers that the settings name, and freeze every other parameter of `layers`.

    Adapters of layers in half precision are float32: steps of a usual learning rate would be lost in rounding.

    Raises:
        ValueError: a name in `target_modules` is that of no linear layer.
    """
    # peft takes a second or two to import; without LoRA nobody waits for it. It imports bitsandbytes where that is
    # installed, which warns of a missing kernel for inference that nothing here uses.
    with without_warnings_of("bitsandbytes"):
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear

        from longmem.model.lora_linear import InferenceLinear

    linear = {name: module for name, module in layers.named_modules() if is_linear(module)}
    names = list(linear)
    if settings["target_modules"] != ALL_LINEAR:
        for ending in settings["target_modules"]:
            if not any(ends_with(name, ending) for name in linear):
                known = sorted({name.rpartition(".")[2] for name in linear})
                raise ValueError(
                    f"`target_modules` of `lora` must name linear layers of the side network, got `{ending}`; they end in "
                    f"{', '.join(known)}.{did_you_mean(ending, known)}"
                )
        names = [name for name in linear if any(ends_with(name, ending) for ending in settings["target_modules"])]
    inject_adapter_in_model(
        LoraConfig(
            r=settings["rank"],
            lora_alpha=settings["alpha"],
            target_modules=names,
            lora_dropout=settings["dropout"],
            fan_in_fan_out=any(isinstance(linear[name], Conv1D) for name in names),  # GPT-2 stores W transposed
        ),
        layers,
    )
    for _, layer in adapted_layers(layers):
        if type(layer) is Linear:  # not one of quantized weights
            layer.__class__ = InferenceLinear
        for part in (layer.lora_A, layer.lora_B):
            part.to(torch.promote_types(next(part.parameters()).dtype, torch.float32))


def is_linear(module: nn.Module) -> bool:
    """Return whether the module is a linear layer that returns a tensor; routers of experts may be ones that return more."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    return isinstance(module(module.weight.new_zeros(1, module.in_features)), Tensor)


def ends_with(name: str, ending: str) -> bool:
    """Return whether a module's name ends in these whole parts.

    >>> ends_with("0.layer.self_attn.q_proj", "self_attn.q_proj"), ends_with("0.layer.self_attn.q_proj", "proj")
    (True, False)
    """
    return name == ending or name.endswith(f".{ending}")


def adapted_layers(network: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield name and module of every layer that has adapters."""
    from peft.tuners.lora import LoraLayer

    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def adapter_names(network: nn.Module) -> set[str]:
    """Return the names of all parameters of `network` that belong to adapters."""
    return {
        f"{path}.{name}"
        for path, layer in adapted_layers(network)
        for name, _ in layer.named_parameters()  # type: ignore[attr-defined]
        if not name.startswith("base_layer.")
    }


def merge_adapters(network: nn.Module) -> None:
    """Add what the adapters compute to the weights beside them, and put the plain layers back in their places."""
    for path, layer in list(adapted_layers(network)):
        layer.merge(safe_merge=True)  # refuses weights that become infinite or NaN
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, layer.get_base_layer())
