"""What one forward pass shows: how layers are called, which modules attend, what rotates and what runs last."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longmem.backbone.interception import calls_registry, handled_by
from longmem.backbone.positions import CosSin, RotaryEmbedding


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """How the backbone called one of its layers: everything but the hidden states (masks, positions, cache)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def position_embeddings(self) -> CosSin:
        """Cosines and sines that the layer was given."""
        return self.kwargs["position_embeddings"]

    def at_positions(self, cos_sin: CosSin) -> "LayerCall":
        """Return the call with other cosines and sines."""
        return LayerCall(self.args, {**self.kwargs, "position_embeddings": cos_sin})

    def to(self, dtype: torch.dtype, computed_in: torch.dtype) -> "LayerCall":
        """Return the call for a layer that computes in another dtype than the backbone, `computed_in`.

        Arguments in the backbone's dtype (cosines and sines, additive masks) are cast; what an architecture keeps in float32
        whatever its dtype stays so.
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


class Observation:
    """A record of one forward pass over few tokens; `watching` fills it."""

    def __init__(self) -> None:
        self.attention: dict[int, tuple[nn.Module, int]] = {}  # module that attends, number of its query heads
        self.calls: dict[int, LayerCall] = {}
        self.inputs: dict[int, Tensor] = {}
        self.after_layers: list[nn.Module] = []
        self._rotary_calls: list[tuple[RotaryEmbedding, Any]] = []
        self._current_layer = -1
        self._num_layers = 0

    def rotary(self, number: int) -> RotaryEmbedding | None:
        """Return the rotary module whose cosines the layer was given, if it was given any that we saw made."""
        used = self.calls[number].kwargs.get("position_embeddings")
        if not isinstance(used, tuple):
            return None
        return next((call for call, output in self._rotary_calls if output[0] is used[0]), None)

    @contextlib.contextmanager
    def watching(self, decoder: nn.Module, layers: nn.ModuleList) -> Iterator[None]:
        """Observe every forward pass inside the block."""
        self._num_layers = len(layers)
        handles = []
        for number, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(self._enter_layer(number), with_kwargs=True))
        for child in decoder.children():
            if child is not layers:
                handles.append(child.register_forward_hook(self._leave_sibling))
        for module in decoder.modules():
            if "rotary" in type(module).__name__.lower():
                handles.append(module.register_forward_hook(self._leave_rotary, with_kwargs=True))
        watched = [module for layer in layers for module in layer.modules() if calls_registry(module)]
        try:
            with handled_by(dict.fromkeys([*watched, *layers], self._see_attention)):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter_layer(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._current_layer = number
            self.inputs[number], self.calls[number] = split_call(args, kwargs)
            self.after_layers.clear()

        return hook

    def _leave_sibling(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._current_layer == self._num_layers - 1:
            self.after_layers.append(module)

    def _leave_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._rotary_calls.append((RotaryEmbedding(module, args, dict(kwargs)), output))

    def _see_attention(
        self, local: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        self.attention.setdefault(self._current_layer, (module, query.shape[1]))
        return local(module, query, key, *args, **kwargs)
