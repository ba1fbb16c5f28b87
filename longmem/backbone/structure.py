"""What a causal LM is made of, found by watching it run instead of by a table of architectures."""

import contextlib
import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from longmem.backbone.interception import (
    EnoughSeen,
    LayerCall,
    calls_registry,
    handled_by,
    intercept,
    intercept_direct_calls,
)
from longmem.backbone.observation import Observation
from longmem.backbone.positions import RotaryEmbedding, Rotation, candidate_rotations

PROBE_LENGTH = 8
# Far apart, because some rotations are slow, and small enough for the window of any model.
PROBE_POSITIONS = (0, 1, 3, 9, 27, 81, 130, 243)
# Half precision turns a key by cosines of three digits; a key turned by the wrong angle is off by its own size.
POSITION_TOLERANCE = 0.2


@dataclasses.dataclass(frozen=True)
class LayerStructure:
    """One decoder layer: its modules and how its attention treats positions.

    `attention` is the module whose attention can be intercepted: one that looks its function up in the registry, or the
    layer itself. `obstacle` says why keys of this layer can't be stored; None if they can. `reach`: the farthest distance at
    which the layer sees a token, in tokens; None where it sees all.
    """

    layer: nn.Module
    attention: nn.Module
    num_heads: int = 0
    num_kv_heads: int = 0
    rotary: RotaryEmbedding | None = None
    rotation: Rotation | None = None
    obstacle: str | None = None
    reach: int | None = None


@dataclasses.dataclass(frozen=True)
class BackboneStructure:
    """The decoder layers of a causal LM, and what stands after them."""

    layers: tuple[LayerStructure, ...]
    final_modules: tuple[nn.Module, ...]  # run in this order between the last layer and the LM head: the final norm
    decoder_name: str  # dotted name of the module that owns layers and final norm

    @property
    def storable_layers(self) -> list[int]:
        """Numbers of the layers whose keys and values can be stored."""
        return [number for number, layer in enumerate(self.layers) if layer.obstacle is None]


class UnsupportedBackboneError(ValueError):
    """The causal LM lacks something that a memory needs; the message says what."""


def inspect_backbone(backbone: PreTrainedModel) -> BackboneStructure:
    """Return the structure of a causal LM, found by running it over a few tokens.

    Raises:
        UnsupportedBackboneError: the decoder layers can't be found, the model is not causal, or no layer has keys that
            can be seen and freed of their position.
    """
    decoder_name, decoder, layers = find_decoder(backbone)
    for layer in layers:
        for module in filter(calls_registry, layer.modules()):
            intercept(module)
    seen = watch(backbone, decoder, layers)
    silent = [layer for number, layer in enumerate(layers) if number not in seen.attention]
    if silent:
        for layer in silent:
            intercept_direct_calls(layer)
        seen = watch(backbone, decoder, layers)
    config = backbone.config.get_text_config()
    structures = tuple(
        dataclasses.replace(layer_structure(seen, number, layer), reach=reach_of(config, number))
        for number, layer in enumerate(layers)
    )
    obstacles = [structure.obstacle for structure in structures]
    if all(obstacles):
        raise UnsupportedBackboneError(
            f"{type(backbone).__name__} has no layer whose keys can be stored: {obstacles[0]}."
        )
    return BackboneStructure(structures, tuple(seen.after_layers), decoder_name)


def watch(backbone: PreTrainedModel, decoder: nn.Module, layers: nn.ModuleList) -> Observation:
    """Return what one forward pass over the probe tokens shows."""
    seen = Observation()
    with seen.watching(decoder, layers), torch.no_grad():
        logits = backbone(probe_ids(backbone), use_cache=False).logits
    if not logits.isfinite().all():
        raise UnsupportedBackboneError(
            f"{type(backbone).__name__} must give finite logits, got NaN or inf in {backbone.dtype}: its numbers overflow, or "
            "its weights are damaged. Load it with `dtype=torch.bfloat16` or `torch.float32`."
        )
    half = PROBE_LENGTH // 2
    changed = probe_ids(backbone)
    changed[:, half:] = (changed[:, half:] + 1) % backbone.config.get_text_config().vocab_size
    with torch.no_grad():
        others = backbone(changed, use_cache=False).logits
    # New models hardly attend, so even a small difference counts.
    if not same_logits(others[:, :half], logits[:, :half], computes_exactly(backbone), tolerance=1e-5):
        raise UnsupportedBackboneError(
            f"{type(backbone).__name__} is not causal: its logits depend on later tokens. Load it as a decoder "
            f"(`is_decoder=True`) or use a decoder-only causal LM.{adapters_in_words(backbone)}"
        )
    return seen


def input_device(backbone: PreTrainedModel) -> torch.device:
    """Return where the backbone expects token ids: with its embeddings, or where a device map brings these when needed."""
    embeddings: Any = backbone.get_input_embeddings()
    device = next(embeddings.parameters()).device
    hook = getattr(embeddings, "_hf_hook", None)
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


def adapters_in_words(backbone: PreTrainedModel) -> str:
    """Return a sentence, behind a space, on adapters that are not merged into the weights; nothing if there are none."""
    is_adapter = (any(kind.__name__ == "BaseTunerLayer" for kind in type(each).__mro__) for each in backbone.modules())
    said = " It holds adapters of PEFT that are not merged: `merge_and_unload()` makes them part of it."
    return said if any(is_adapter) else ""


def position_limit(backbone: PreTrainedModel) -> int | None:
    """Return how many positions a backbone has learned a vector for, None where any position will do."""
    window = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    tokens = backbone.get_input_embeddings()
    tables = (each for each in backbone.modules() if isinstance(each, nn.Embedding) and each is not tokens)
    # Some tables have rows before the first position, for padding.
    return window if window and any(0 <= each.num_embeddings - window <= 4 for each in tables) else None


def computes_exactly(backbone: PreTrainedModel) -> bool:
    """Return whether the same computation done in another way agrees to float32 precision: no half, nothing quantized."""
    return backbone.dtype == torch.float32 and not hasattr(backbone, "hf_quantizer")


def same_logits(found: Tensor, expected: Tensor, is_exact: bool, tolerance: float = 1e-3) -> bool:
    """Return whether logits agree, to `tolerance` of the largest, or to a tenth where rounding may differ."""
    return bool((found - expected).abs().max() <= (tolerance if is_exact else 0.1) * expected.abs().max())


def probe_ids(backbone: PreTrainedModel) -> Tensor:
    """Return a few different, valid token ids, `1 tokens`, on the device of the embeddings."""
    vocab_size = backbone.config.get_text_config().vocab_size
    ids = torch.arange(PROBE_LENGTH, device=input_device(backbone))[None]
    return (ids * (vocab_size // PROBE_LENGTH or 1) + 5) % vocab_size


def find_decoder(backbone: PreTrainedModel) -> tuple[str, nn.Module, nn.ModuleList]:
    """Return name and module of the decoder stack, and its list of layers.

    Lists whose layers look their attention up in the registry come first, in the order of the modules.
    """
    num_layers = backbone.config.get_text_config().num_hidden_layers
    text_decoder = backbone.get_decoder()
    found = [
        (name, module, child)
        for name, module in backbone.named_modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers
    ]
    if not found:
        raise UnsupportedBackboneError(
            f"{type(backbone).__name__}: found no list of {num_layers} decoder layers; "
            "is it a decoder-only causal LM of transformers 5?"
        )
    inside = set(text_decoder.modules()) if isinstance(text_decoder, nn.Module) else set()
    return max(found, key=lambda place: (place[1] in inside, any(map(calls_registry, place[2].modules()))))


def reach_of(config: PreTrainedConfig, number: int) -> int | None:
    """Return the farthest distance at which a layer sees a token, by its configuration; None where it sees all.

    Beyond it a model with a sliding window was never trained: in Gemma 3 270M what layers read as if 1,024 tokens away, behind
    a window of 512, cost 3.6 nats a token, and at 512 tokens 0.01.
    """
    kinds = getattr(config, "layer_types", None)
    kind = kinds[number] if kinds else "sliding_attention"  # Mistral: one window for all layers
    names = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    window = getattr(config, names[kind], None) if kind in names else None
    return window - 1 if isinstance(window, int) and window > 1 else None


def layer_structure(seen: Observation, number: int, layer: nn.Module) -> LayerStructure:
    """Return what is known of a layer, after asking it for keys of one token at many positions."""
    if number not in seen.attention:
        return LayerStructure(
            layer,
            layer,
            obstacle=f"the attention of layer {number} goes neither through transformers' registry of attention functions "
            "(`ALL_ATTENTION_FUNCTIONS`) nor through torch's `scaled_dot_product_attention`, so its keys can't be seen",
        )
    attention, num_heads = seen.attention[number]
    call, rotary = seen.calls[number], seen.rotary(number)
    if rotary is not None:
        cos_sin = rotary.at(PROBE_POSITIONS, like=seen.inputs[number])
        call = LayerCall(call.args, {**call.kwargs, "position_embeddings": cos_sin})
    keys = keys_of_one_token(call, seen.inputs[number], layer, attention)
    known = LayerStructure(layer, attention, num_heads, keys.shape[1])
    scale = keys.abs().amax(dim=2, keepdim=True)
    scale = scale.clamp_min(1e-4 * scale.max())
    if is_constant(keys, scale):
        return known
    if rotary is None:
        return dataclasses.replace(
            known,
            obstacle=f"layer {number} turns its keys, but the rotation is not given to the layer as "
            "`position_embeddings`, so it can't be undone and keys can't be stored free of their position",
        )
    cos_sin = call.position_embeddings
    for rotation in candidate_rotations(attention, cos_sin[0], keys.shape[-1]):
        with contextlib.suppress(RuntimeError):  # a candidate of the wrong width
            if is_constant(rotation.undo(keys, cos_sin), scale):
                return dataclasses.replace(known, rotary=rotary, rotation=rotation)
    return dataclasses.replace(
        known,
        obstacle=f"the keys of layer {number} depend on their position, and the `apply_rotary_pos_emb(q, k, cos, sin)` of "
        f"{inspect.getmodule(type(attention)).__name__} "  # type: ignore[union-attr]
        "does not undo it, so keys can't be stored free of their position",
    )


def keys_of_one_token(call: LayerCall, inputs: Tensor, layer: nn.Module, attention: nn.Module) -> Tensor:
    """Return the keys `1 kv_heads tokens dim` that the layer makes when every token has the same hidden state."""
    kept: list[Tensor] = []

    def keep(local: Any, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        kept.append(key)
        raise EnoughSeen

    with handled_by({attention: keep}), contextlib.suppress(EnoughSeen), torch.no_grad():
        call.replay(layer, inputs[:, :1].expand_as(inputs).contiguous())
    return kept[0]


def is_constant(keys: Tensor, scale: Tensor) -> bool:
    """Return whether keys `1 kv_heads tokens dim` are the same at every position, each dimension to its own `scale`.

    Not to one scale for all: trained models have dimensions a hundred times larger than others, which hardly turn.
    """
    return bool(((keys - keys[:, :, :1]).abs() <= POSITION_TOLERANCE * scale).all())
