"""Calls of a layer, seen and made again; and one attention function, registered with transformers, that a caller can replace.

The registry is the place where 340-odd architectures meet: whatever their projections, norms and rotations, they all call a
function with queries, keys and values. A module is *intercepted* when its configuration names our function; without a
handler for the current call the function is the one the module used before. A few architectures (Falcon, much remote
code) call torch's `scaled_dot_product_attention` themselves instead; their layers are intercepted around that call.
"""

import contextlib
import copy
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from longmem.backbone.positions import CosSin

IMPLEMENTATION = "longmem"
LocalAttention = Callable[..., tuple[Tensor, Tensor | None]]
# (local attention, module, query, key, value, attention_mask, **kwargs) -> (output, weights), as transformers has it:
# query `lanes heads tokens dim`, key and value `lanes kv_heads keys dim`, output `lanes tokens heads dim`.
Handler = Callable[..., tuple[Tensor, Tensor | None]]


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """How the backbone called one of its layers: everything but the hidden states (masks, positions, cache)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def position_embeddings(self) -> CosSin:
        """Cosines and sines that the layer was given."""
        return self.kwargs["position_embeddings"]

    def in_dtype(self, dtype: torch.dtype, computed_in: torch.dtype) -> "LayerCall":
        """Return the call for a layer that computes in another dtype than the backbone, `computed_in`.

        Arguments in the backbone's dtype (cosines and sines, additive masks) are cast; what an architecture keeps in float32
        whatever its dtype stays so. (Not `to`, by which accelerate would take this for a tensor.)
        """
        if dtype == computed_in:
            return self

        def cast(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(cast, value))
            return value.to(dtype) if isinstance(value, Tensor) and value.dtype == computed_in else value

        return LayerCall(cast(self.args), {name: cast(value) for name, value in self.kwargs.items()})

    def replay(self, layer: nn.Module, hidden_states: Tensor) -> Float[Tensor, "lanes tokens hidden"]:
        """Return the output of another layer for `hidden_states`, called the same way."""
        if "hidden_states" in self.kwargs:
            return first(layer(*self.args, **{**self.kwargs, "hidden_states": hidden_states}))
        return first(layer(hidden_states, *self.args[1:], **self.kwargs))


class EnoughSeen(Exception):
    """Ends a run of the backbone early: nothing after this point is needed."""


def first(output: Any) -> Tensor:
    """Return a module's main output, whether it comes alone or at the head of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, LayerCall]:
    """Return the hidden states that a layer was called with, and the rest of the call."""
    hidden_states = args[0] if args else kwargs["hidden_states"]
    return hidden_states, LayerCall((None, *args[1:]) if args else (), dict(kwargs))


class Handled(threading.local):
    """What a thread's forward pass replaces. A compiler would break off at a context variable, in each layer."""

    handlers: Mapping[nn.Module, Handler] | None = None
    layer: nn.Module | None = None  # whose own calls are intercepted now; cleared also after an interruption


_handled = Handled()


@contextlib.contextmanager
def handled_by(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Route the attention of intercepted modules (keys of `handlers`) to their handlers inside the block."""
    before = _handled.handlers, _handled.layer
    direct = any(not calls_registry(module) for module in handlers)
    try:
        _handled.handlers, _handled.layer = handlers, None
        with _DirectCalls() if direct else contextlib.nullcontext():
            yield
    finally:
        _handled.handlers, _handled.layer = before


def calls_registry(module: nn.Module) -> bool:
    """Return whether the module is an attention module that looks its function up in transformers' registry."""
    defined_in = sys.modules[type(module).__module__]
    return hasattr(module, "layer_idx") and hasattr(module, "config") and hasattr(defined_in, "ALL_ATTENTION_FUNCTIONS")


def intercept(module: nn.Module) -> None:
    """Make the attention module call `dispatch_attention`; other modules keep their implementation and their masks.

    The module gets its own shallow copy of the configuration. `_attn_implementation_internal` is private; setting the
    public property would reset nested configurations (transformers 5.23).
    """
    config: Any = module.config
    if config._attn_implementation == IMPLEMENTATION:
        return
    own_config = copy.copy(config)
    own_config.intercepted_config = config  # live: whoever changes the backbone's implementation changes both
    own_config._attn_implementation_internal = IMPLEMENTATION
    module.config = own_config


def intercept_direct_calls(layer: nn.Module) -> None:
    """Route the layer's own calls of `scaled_dot_product_attention` to its handler, if there is one for the call."""
    if _enter_layer not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_enter_layer)
        layer.register_forward_hook(_leave_layer, always_call=True)


def local_implementation(module: nn.Module) -> str:
    """Return the name of the attention implementation that the module used before it was intercepted."""
    if not calls_registry(module):
        return "sdpa"
    return module.config.intercepted_config._attn_implementation or "eager"  # type: ignore[union-attr, return-value]


def local_attention(module: nn.Module) -> LocalAttention:
    """Return the attention function that the module used before it was intercepted."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get_interface(local_implementation(module), eager)


def dispatch_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Return the handler's output for this module, or that of its own attention when nobody handles it."""
    handler = None if _handled.handlers is None else _handled.handlers.get(module)
    if handler is None:
        return local_attention(module)(module, *args, **kwargs)
    return handler(local_attention(module), module, *args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, dispatch_attention)


def _enter_layer(layer: nn.Module, args: Any) -> None:
    _handled.layer = layer


def _leave_layer(layer: nn.Module, args: Any, output: Any) -> None:
    _handled.layer = None


class _DirectCalls(TorchFunctionMode):
    """While it is entered, hands calls of `scaled_dot_product_attention` to the handler of the layer that makes them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, layer = kwargs or {}, _handled.layer
        handler = None if layer is None else (_handled.handlers or {}).get(layer)
        if handler is None or func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return attend_directly(handler, layer, *args, **kwargs)


def attend_directly(
    handler: Handler,
    layer: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what the handler makes of a call of `scaled_dot_product_attention`, with the arguments of that function."""

    def local(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Any:
        causal = mask is None and q.shape[2] > 1
        grouped = enable_gqa or k.shape[1] not in (1, q.shape[1])
        output = nn.functional.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
        return output.transpose(1, 2), None

    scaling = query.shape[-1] ** -0.5 if scale is None else scale
    output, _ = handler(local, layer, query, key, value, attn_mask, scaling=scaling)
    return output.transpose(1, 2)
