"""What one forward pass shows: which modules attend, what rotates and what runs last."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from longmem.backbone.interception import LayerCall, calls_registry, handled_by, split_call
from longmem.backbone.positions import RotaryEmbedding


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
