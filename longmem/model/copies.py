"""The modules a side network is made of: copies of the backbone's, with some of its settings changed."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from longmem.backbone.capture import PassableForward
from longmem.backbone.interception import calls_registry, intercept, intercept_direct_calls
from longmem.backbone.structure import LayerStructure, UnsupportedBackboneError

UNIT_VECTORS = 1024  # columns of a quantized weight that are asked for at once


class ModuleCopier:
    """Make trainable copies of a backbone's modules.

    Args:
        backbone: the causal LM; nothing of it is changed.
        options: fields of its configuration that the copies have differently; empty for plain copies.
        dtype: of the copies, None for the backbone's.
        share_matrices: let plain copies have the backbone's own matrices where the dtype is the same: they take no memory,
            and must stay frozen. Vectors are copied.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        options: dict[str, Any],
        dtype: torch.dtype | None = None,
        share_matrices: bool = False,
    ) -> None:
        self._dtype = dtype
        self._share_matrices = share_matrices
        self._backbone_dtype = backbone.dtype
        self._paths = {module: path for path, module in backbone.named_modules()}
        self._changed: PreTrainedModel | None = None
        if options:
            config = copy.deepcopy(backbone.config)
            for name, value in options.items():
                setattr(config.get_text_config(), name, value)
            # The architecture itself says where a setting goes. On the meta device this costs neither time nor memory.
            with torch.device("meta"):
                self._changed = type(backbone)(config)

    def layer(self, source: LayerStructure, cache_slot: int) -> tuple[nn.Module, nn.Module]:
        """Return a copy of a decoder layer, and the attention module in it, which is intercepted as the source's is.

        `cache_slot`: layer index that its keys and values take in the shared cache.
        """
        layer = self.module(source.layer)
        # Hooks of the backbone came along with the copy; they record the backbone, not this layer.
        layer._forward_pre_hooks.clear()
        layer._forward_hooks.clear()
        if isinstance(layer.forward, PassableForward):
            compute = layer.__dict__.pop("forward").compute
            if getattr(compute, "__func__", None) is not type(layer).forward:  # accelerate has put its own there
                layer.forward = compute
        for module in filter(calls_registry, layer.modules()):
            intercept(module)
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = cache_slot  # type: ignore[assignment]
        path = next(name for name, module in source.layer.named_modules() if module is source.attention)
        attention = layer.get_submodule(path)
        if attention is layer:
            intercept_direct_calls(layer)
        return layer, attention

    def modules(self, sources: Sequence[nn.Module]) -> nn.ModuleList:
        """Return copies of modules that run one after the other."""
        return nn.ModuleList(self.module(source) for source in sources)

    def module(self, source: nn.Module) -> nn.Module:
        """Return a trainable copy: the backbone's weights, or new ones where the options changed their shape.

        Raises:
            UnsupportedBackboneError: the weights are not on a device but offloaded.
        """
        refuse_offloaded(source)
        made = self._plain(source) if self._changed is None else self._with_options(source, self._changed)
        made = made.to(self._dtype)
        shared = set(source.parameters())
        for parameter in made.parameters():  # what is still quantized, such as packed experts, stays as it is
            parameter.requires_grad_(parameter.is_floating_point() and parameter not in shared)
        return made

    def _plain(self, source: nn.Module) -> nn.Module:
        quantized = {module for module in source.modules() if is_quantized_linear(module)}
        # A copy takes what its memo holds for a module, here a linear layer that can be trained.
        memo: dict[int, Any] = {id(module): plain_linear(module, self._backbone_dtype) for module in quantized}
        if self._share_matrices:
            shared = [weight for weight in source.parameters() if weight.ndim > 1]
            memo |= {id(weight): weight for weight in shared if self._dtype in (None, weight.dtype)}
        return copy.deepcopy(source, memo)

    def _with_options(self, source: nn.Module, changed: PreTrainedModel) -> nn.Module:
        blank = changed.get_submodule(self._paths[source])
        reference = next((tensor for tensor in source.parameters() if tensor.is_floating_point()), None)
        if reference is None:
            return copy.deepcopy(source)
        made = copy.deepcopy(blank).to(reference.dtype).to_empty(device=reference.device).train(source.training)
        given = dict(source.named_parameters()) | dict(source.named_buffers())
        with torch.no_grad():
            for module in made.modules():
                changed._init_weights(module)
            for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
                if name in given and given[name].shape == tensor.shape:
                    tensor.copy_(given[name])
        return made


def refuse_offloaded(source: nn.Module) -> None:
    """Raise if weights of the module are not on any device, but brought to one for each forward pass."""
    if any(parameter.device.type == "meta" for parameter in source.parameters()):
        raise UnsupportedBackboneError(
            "a layer that the side network copies is offloaded to the CPU or to disk by the device map, so there is nothing "
            "to train; place the layers from the first memory layer on, and the final norm, on a device."
        )


def is_quantized_linear(module: nn.Module) -> bool:
    """Return whether the module is a linear layer whose weight is not a plain floating-point tensor."""
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return False
    weight: Any = getattr(module, "weight", None)
    is_plain = type(weight) is nn.Parameter and type(weight.data) is torch.Tensor
    return not is_plain or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@torch.no_grad()
def plain_linear(module: Any, dtype: torch.dtype) -> nn.Linear:
    """Return a linear layer with the weights that a quantized one computes with, whatever library quantized it.

    Its outputs for the unit vectors are the columns of its weight.
    """
    device = next(tensor.device for tensor in [*module.parameters(), *module.buffers()])
    bias = module(torch.zeros(1, module.in_features, dtype=dtype, device=device))[0]
    has_bias = getattr(module, "bias", None) is not None
    plain = nn.Linear(module.in_features, module.out_features, bias=has_bias, device=device, dtype=dtype)
    for start in range(0, module.in_features, UNIT_VECTORS):
        stop = min(start + UNIT_VECTORS, module.in_features)
        units = torch.zeros(stop - start, module.in_features, dtype=dtype, device=device)
        units[:, start:stop].fill_diagonal_(1)
        plain.weight[:, start:stop] = (module(units) - bias).T
    if has_bias:
        plain.bias.copy_(bias)
    return plain
