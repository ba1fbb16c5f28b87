"""What is trained, and how fast: the side network's parameters in groups for the optimizer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from longmem.model.modeling import LongMemForCausalLM
from longmem.model.side_network import SideLayer

GATES = (
    "memory_bias",
    "memory_null",
    "output_scale",
)  # open or close a whole path; they may learn at a rate of their own


def select_trained(model: LongMemForCausalLM, trained: str, *, reads_memory: bool) -> dict[str, nn.Parameter]:
    """Switch gradients on for what is trained, off for all else, and return it by its name in the side network.

    Args:
        model: changed in its `requires_grad` flags alone.
        trained: "all" that the side network lets be trained (with LoRA, its adapters and biases); "reading_attention": the
            attention modules of the layers that read memory, and their biases; "gates": memory biases, null slots and output
            scales.
        reads_memory: without it the memory biases are left as they are: nothing passes through them.
    """
    model.requires_grad_(True)  # freezes the backbone, and what LoRA leaves frozen
    reading = [layer for layer in side_layers(model) if layer.memory_bias is not None]
    wanted = {
        id(each) for layer in reading for each in (layer.memory_bias, layer.memory_null, *layer.attention.parameters())
    }
    if trained == "gates":
        wanted = {id(each) for name, each in model.side_network.named_parameters() if name.endswith(GATES)}
    chosen = {}
    for name, parameter in model.side_network.named_parameters():
        is_bias = name.endswith(("memory_bias", "memory_null"))
        keep = parameter.requires_grad and (trained == "all" or id(parameter) in wanted)
        parameter.requires_grad_(keep and (reads_memory or not is_bias))
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def parameter_groups(
    parameters: dict[str, nn.Parameter], *, learning_rate: float, gate_learning_rate: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Return optimizer groups: matrices with weight decay, vectors without, gates without and at a rate of their own."""
    gates = [parameter for name, parameter in parameters.items() if name.endswith(GATES)]
    others = [parameter for name, parameter in parameters.items() if not name.endswith(GATES)]
    groups = [
        {"params": [each for each in others if each.ndim > 1], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [each for each in others if each.ndim <= 1], "lr": learning_rate, "weight_decay": 0.0},
        {"params": gates, "lr": gate_learning_rate or learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def side_layers(model: LongMemForCausalLM) -> list[SideLayer]:
    """Return the side network's layers."""
    return cast(list[SideLayer], list(model.side_network.layers))


def mean_bias(model: LongMemForCausalLM) -> float:
    """Return the mean memory bias, or gate before its sigmoid, over layers and heads."""
    biases = [layer.memory_bias for layer in side_layers(model) if layer.memory_bias is not None]
    return torch.cat([bias.detach().float().flatten() for bias in biases]).mean().item()
