"""A backbone that is trained along with its reader: what LongMem avoids, for comparison and for those who want it.

In Memorizing Transformers (arXiv 2203.08913) the same weights write and read, and both are trained, so what was written
before a step is not what would be written after it. Here the gradient reaches the backbone through the hidden states that the
side network takes from it (entry, residuals, LM head). What is stored is cut off from it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from longmem.backbone.cache_names import CACHE_NAMES
from longmem.backbone.capture import Backbone, BackboneStates


class CoupledWriter:
    """Return the state of a writer that is trained: its parameters, how often it moved, its moving average if any.

    `version` is the number of times it moved; `backbone` is what writes now.

    Args:
        backbone: that gives hidden states; its `parameters` are trained from here on.
        parameters: by their names in the backbone's model.
        decay: of the exponential moving average that writes in the backbone's place; None: the backbone itself writes.
    """

    def __init__(self, backbone: Backbone, parameters: dict[str, nn.Parameter], decay: float | None) -> None:
        self.parameters, self.decay, self.version = parameters, decay, 0
        self.backbone = backbone if decay is None else Backbone(copy.deepcopy(backbone.model))
        backbone.train_parameters(parameters)

    @torch.no_grad()
    def moved(self) -> None:
        """Count a move of the parameters, and let the average follow: `decay * average + (1 - decay) * parameter`."""
        self.version += 1
        if self.decay is not None:
            for name, parameter in self.parameters.items():
                self.backbone.model.get_parameter(name).lerp_(parameter, 1 - self.decay)

    def rewrite(self, states: BackboneStates, input_ids: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Put keys and values of the average in the place of the backbone's own.

        Raises:
            ValueError: the backbone was given a cache, which holds nothing that the average could go on from.
        """
        if self.decay is None or not states.keys:
            return
        if any(inputs.get(name) is not None for name in CACHE_NAMES):
            raise ValueError(
                "`cache` must be None while a moving average of the backbone writes memory, got a cache; pass "
                "`use_cache=False` or, when training is over, call `decouple_writer`."
            )
        layers = list(states.keys)
        keys, values = self.backbone.encode(input_ids, layers, **inputs)
        states.keys, states.values = dict(zip(layers, keys, strict=True)), dict(zip(layers, values, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: version, trained parameters, and the average's."""
        state: dict[str, Any] = {"version": self.version, "parameters": dict(self.parameters)}
        if self.decay is not None:
            state["average"] = {name: self.backbone.model.get_parameter(name) for name in self.parameters}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned of a writer with the same parameters."""
        self.version = state["version"]
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
            if self.decay is not None:
                self.backbone.model.get_parameter(name).copy_(state["average"][name])


def parameters_of_states(
    backbone: Backbone, hidden_layers: Collection[int], *, final_norm: bool
) -> dict[str, nn.Parameter]:
    """Return, by name, the parameters that hidden states of some layers and the logits depend on.

    Layers above the highest of those hidden states are left out: the side network computes in their stead.

    Args:
        backbone: whose parameters these are.
        hidden_layers: numbers of the layers that the hidden states enter; L stands for the output of the last one.
        final_norm: whether the backbone's own final norm is used.

    Raises:
        ValueError: some of them cannot be trained: quantized, in half precision or offloaded.
    """
    structure = backbone.structure
    border = max(hidden_layers)
    unused: list[nn.Module] = [layer.layer for layer in structure.layers[border:]]
    unused += [] if final_norm else structure.final_modules
    used: list[nn.Module] = [layer.layer for layer in structure.layers[:border]]
    left_out = ids_of(unused) - ids_of(used)  # a few architectures share weights between layers
    found = {name: weight for name, weight in backbone.model.named_parameters() if id(weight) not in left_out}
    for name, weight in found.items():
        if weight.dtype not in (torch.float32, torch.float64) or weight.is_meta:
            state = "offloaded" if weight.is_meta else f"of dtype {weight.dtype}"
            raise ValueError(
                f"the backbone must be on its devices in float32 to be trained, which keeps small updates, but {name} is "
                f"{state}; load it with `dtype=torch.float32`, without quantization and offloading."
            )
    return found


def ids_of(modules: Collection[nn.Module]) -> set[int]:
    """Return what tells the parameters of some modules from all others."""
    return {id(weight) for module in modules for weight in module.parameters()}
