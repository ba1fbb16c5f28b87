"""Position-free keys: the rotation of rotary models undone with the architecture's own function.

Stored keys carry no position. The query that meets them is turned to `memory_distance`, as if what it retrieved stood
just outside the local window. Models with absolute positions need nothing: their keys are stored as they are.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

CosSin = tuple[Float[Tensor, "#lanes #tokens rotary_dim"], Float[Tensor, "#lanes #tokens rotary_dim"]]


@dataclasses.dataclass(frozen=True)
class RotaryEmbedding:
    """A rotary module of the backbone and how the model calls it, so that other positions can be asked for."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def at(self, position: int, like: Tensor) -> CosSin:
        """Return cosines and sines `1 1 rotary_dim` of one position, in the dtype and on the device of `like`."""

        def swap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                return like
            return torch.full((1, 1), position, device=like.device)

        return self.module(*map(swap, self.args), **{name: swap(value) for name, value in self.kwargs.items()})


def rotation_function(attention: nn.Module) -> Callable[..., Any] | None:
    """Return `apply_rotary_pos_emb` of the file that defines the attention module, or None if it has none we can call."""
    function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if function is None or list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    return function


def rotate(
    states: Float[Tensor, "lanes heads tokens dim"], cos_sin: CosSin, function: Callable[..., Any]
) -> Float[Tensor, "lanes heads tokens dim"]:
    """Return the states turned by the architecture's own rotation; dimensions beyond the rotary ones pass through."""
    cos, sin = cos_sin
    turned, _ = function(states[..., : cos.shape[-1]], states[..., :1, :, : cos.shape[-1]], cos, sin)
    return torch.cat([turned, states[..., cos.shape[-1] :]], dim=-1) if cos.shape[-1] < states.shape[-1] else turned


def unrotate(
    states: Float[Tensor, "lanes heads tokens dim"], cos_sin: CosSin, function: Callable[..., Any]
) -> Float[Tensor, "lanes heads tokens dim"]:
    """Return the states before rotation.

    A rotary embedding multiplies by `a * R(position)`; `a` is 1 except for scaled kinds such as YaRN. The inverse is
    `R(-position) / a`: negated sine, and both divided by `a**2 = cos**2 + sin**2`.
    """
    cos, sin = (part.float() for part in cos_sin)
    squared_scale = cos.square() + sin.square()
    return rotate(states.float(), (cos / squared_scale, -sin / squared_scale), function).to(states.dtype)


def move_queries(
    queries: Float[Tensor, "lanes heads tokens dim"], here: CosSin, there: CosSin, function: Callable[..., Any]
) -> Float[Tensor, "lanes heads tokens dim"]:
    """Return queries taken from their own positions (`here`) to the memory distance (`there`).

    Keys are stored without the rotary scale `a`, so the query carries it twice, once for each side of the product.
    """
    cos, sin = (part.float() for part in there)
    scale = (cos.square() + sin.square()).sqrt()
    free = unrotate(queries.float(), here, function)
    return rotate(free, (cos * scale, sin * scale), function).to(queries.dtype)
