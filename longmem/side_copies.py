"""The modules a side network is made of: copies of the backbone's, with some of its settings changed."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from longmem.backbone.interception import calls_registry, intercept, intercept_direct_calls
from longmem.backbone.structure import LayerStructure


class ModuleCopier:
    """Make trainable copies of a backbone's modules.

    Args:
        backbone: the causal LM; nothing of it is changed.
        options: fields of its configuration that the copies have differently; empty for plain copies.
    """

    def __init__(self, backbone: PreTrainedModel, options: dict[str, Any]) -> None:
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
        """Return a trainable copy: the backbone's weights, or new ones where the options changed their shape."""
        if self._changed is None:
            return copy.deepcopy(source).requires_grad_(True)
        blank = self._changed.get_submodule(self._paths[source])
        reference = next((tensor for tensor in source.parameters() if tensor.is_floating_point()), None)
        if reference is None:
            return copy.deepcopy(source)
        made = copy.deepcopy(blank).to(reference.dtype).to_empty(device=reference.device).train(source.training)
        given = dict(source.named_parameters()) | dict(source.named_buffers())
        with torch.no_grad():
            for module in made.modules():
                self._changed._init_weights(module)
            for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
                if name in given and given[name].shape == tensor.shape:
                    tensor.copy_(given[name])
        return made.requires_grad_(True)
