"""What a causal LM is made of, found by watching it run once instead of by a table of architectures."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longmem.backbone.interception import handled_by, intercept
from longmem.backbone.positions import RotaryEmbedding, rotation_function

PROBE_LENGTH = 8


@dataclasses.dataclass(frozen=True)
class LayerStructure:
    """One decoder layer: its modules and how its attention treats positions."""

    layer: nn.Module
    attention: nn.Module
    num_heads: int
    num_kv_heads: int
    rotary: RotaryEmbedding | None
    rotation: Callable[..., Any] | None


@dataclasses.dataclass(frozen=True)
class BackboneStructure:
    """The decoder layers of a causal LM, and what stands after them."""

    layers: tuple[LayerStructure, ...]
    final_modules: tuple[nn.Module, ...]  # run in this order between the last layer and the LM head: the final norm
    decoder_name: str  # dotted name of the module that owns layers and final norm


class UnsupportedBackboneError(ValueError):
    """The causal LM lacks something that a memory needs; the message says what."""


def inspect_backbone(backbone: PreTrainedModel) -> BackboneStructure:
    """Return the structure of a causal LM, found by one forward pass over a few tokens.

    Raises:
        UnsupportedBackboneError: the decoder layers can't be found, attention does not go through transformers'
            registry, or rotation happens where it can't be undone.
    """
    decoder_name, decoder, layers = find_decoder(backbone)
    for layer in layers:
        for module in attention_candidates(layer):
            intercept(module)
    seen = Observation()
    with seen.watching(decoder, layers), torch.no_grad():
        backbone(probe_ids(backbone), use_cache=False)
    missing = [number for number in range(len(layers)) if number not in seen.attention]
    if missing:
        raise UnsupportedBackboneError(
            f"{type(backbone).__name__}: the attention of layers {missing} does not go through transformers' registry "
            "of attention functions (`ALL_ATTENTION_FUNCTIONS`), so its keys can't be seen. "
            "Use an architecture whose attention supports `attn_implementation`."
        )
    structures = tuple(seen.layer_structure(number, layer) for number, layer in enumerate(layers))
    refuse_hidden_rotation(backbone, structures)
    return BackboneStructure(structures, tuple(seen.after_layers), decoder_name)


def probe_ids(backbone: PreTrainedModel) -> Tensor:
    """Return a few valid token ids, `1 tokens`, on the device of the embeddings."""
    device = next(backbone.get_input_embeddings().parameters()).device
    return (torch.arange(PROBE_LENGTH, device=device) * 7 % backbone.config.get_text_config().vocab_size)[None]


def find_decoder(backbone: PreTrainedModel) -> tuple[str, nn.Module, nn.ModuleList]:
    """Return name and module of the decoder stack, and its list of layers."""
    num_layers = backbone.config.get_text_config().num_hidden_layers
    for name, module in backbone.named_modules():
        for child in module.children():
            if not isinstance(child, nn.ModuleList) or len(child) != num_layers:
                continue
            if all(any(True for _ in attention_candidates(layer)) for layer in child):
                return name, module, child
    raise UnsupportedBackboneError(
        f"{type(backbone).__name__}: found no list of {num_layers} decoder layers whose attention modules know their "
        "`layer_idx`; is it a decoder-only causal LM of transformers 5?"
    )


def attention_candidates(layer: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a decoder layer that may call an attention function."""
    for module in layer.modules():
        if module is not layer and hasattr(module, "layer_idx") and hasattr(module, "config"):
            yield module


def refuse_hidden_rotation(backbone: PreTrainedModel, layers: tuple[LayerStructure, ...]) -> None:
    """Raise if the model rotates its keys where we can neither see nor undo it."""
    has_rotary_modules = any("rotary" in type(module).__name__.lower() for module in backbone.modules())
    for number, layer in enumerate(layers):
        if layer.rotary is None and not has_rotary_modules:
            continue  # absolute positions, ALiBi or none: nothing to undo
        if layer.rotary is None or layer.rotation is None:
            raise UnsupportedBackboneError(
                f"{type(backbone).__name__}: layer {number} rotates its keys, but "
                + ("its rotation is not given to the layer as `position_embeddings`" if layer.rotary is None else "")
                + ("its file has no `apply_rotary_pos_emb(q, k, cos, sin)`" if layer.rotary is not None else "")
                + ", so it can't be undone and keys can't be stored free of their position."
            )


class Observation:
    """What one forward pass shows: attention modules, rotary embeddings, modules after the last layer."""

    def __init__(self) -> None:
        self.attention: dict[int, tuple[nn.Module, int, int]] = {}
        self.position_embeddings: dict[int, Any] = {}
        self.rotary_calls: list[tuple[RotaryEmbedding, Any]] = []
        self.after_layers: list[nn.Module] = []
        self.current_layer: int | None = None
        self.num_layers = 0

    @contextlib.contextmanager
    def watching(self, decoder: nn.Module, layers: nn.ModuleList) -> Iterator[None]:
        """Observe every forward pass inside the block."""
        self.num_layers = len(layers)
        handles = []
        for number, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(self.enter_layer(number), with_kwargs=True))
        for child in decoder.children():
            if child is not layers:
                handles.append(child.register_forward_hook(self.leave_sibling))
        for module in decoder.modules():
            if "rotary" in type(module).__name__.lower():
                handles.append(module.register_forward_hook(self.leave_rotary, with_kwargs=True))
        watched = {module: self.see_attention for layer in layers for module in attention_candidates(layer)}
        try:
            with handled_by(watched):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def enter_layer(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.current_layer = number
            self.position_embeddings[number] = kwargs.get("position_embeddings")
            self.after_layers.clear()

        return hook

    def leave_sibling(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.current_layer == self.num_layers - 1:
            self.after_layers.append(module)

    def leave_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.rotary_calls.append((RotaryEmbedding(module, args, dict(kwargs)), output))

    def see_attention(
        self, local: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        assert self.current_layer is not None
        self.attention[self.current_layer] = (module, query.shape[1], key.shape[1])
        return local(module, query, key, *args, **kwargs)

    def layer_structure(self, number: int, layer: nn.Module) -> LayerStructure:
        attention, num_heads, num_kv_heads = self.attention[number]
        used = self.position_embeddings[number]
        rotary = None
        if isinstance(used, tuple):
            rotary = next((call for call, output in self.rotary_calls if output[0] is used[0]), None)
        return LayerStructure(layer, attention, num_heads, num_kv_heads, rotary, rotation_function(attention))
