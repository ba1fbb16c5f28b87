"""Position-free keys: the rotation of rotary models undone with the architecture's own function.

Stored keys carry no position. The query that meets them is turned to `memory_distance`, as if what it retrieved stood
just outside the local window. Models with absolute positions, ALiBi or none need nothing: their keys are stored as they are.
"""

import copy
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

CosSin = tuple[Float[Tensor, "#lanes #tokens rotary_dim"], Float[Tensor, "#lanes #tokens rotary_dim"]]
CosSinOfHeads = tuple[
    Float[Tensor, "#lanes heads #tokens rotary_dim"], Float[Tensor, "#lanes heads #tokens rotary_dim"]
]


@dataclasses.dataclass(frozen=True)
class RotaryEmbedding:
    """A rotary module of the backbone and how the model calls it, so that other positions can be asked for."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def at(self, positions: Sequence[int], like: Tensor) -> CosSin:
        """Return cosines and sines `1 positions rotary_dim`, in the dtype and on the device of `like`.

        The backbone's module stays as it is.
        """

        def swap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                return like
            return torch.tensor([list(positions)], device=like.device)

        # Some kinds (dynamic, LongRoPE) write the frequencies for the positions they are asked for into their buffers, where
        # a later run of the backbone, or one in another thread, would find those of the memory distance.
        module = copy.copy(self.module)
        own = self.module._buffers.items()
        module._buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in own}
        return module(*map(swap, self.args), **{name: swap(value) for name, value in self.kwargs.items()})

    def turn_from(self, here: CosSin, distance: int, like: Tensor) -> CosSin:
        """Return cosines and sines that take queries from their own positions (`here`) to the memory distance.

        They are those of the difference of the angles. Keys are stored without the rotary scale `a`, so the query carries it
        twice, once for each side of the product.
        """
        (cos, sin), own = ([part.float() for part in pair] for pair in (self.at([distance], like), here))
        own_cos, own_sin = (part.to(cos.device) for part in own)
        scale = (cos.square() + sin.square()).sqrt() / (own_cos.square() + own_sin.square())
        return (cos * own_cos + sin * own_sin) * scale, (sin * own_cos - cos * own_sin) * scale

    @staticmethod
    def turn_of_heads(here: CosSin, first: CosSin, distances: Float[Tensor, " heads"]) -> CosSinOfHeads:
        """Return the same for a distance of each head, `lanes heads tokens rotary_dim`; distances get gradients.

        They may be of any length between two positions: angles grow in proportion to the distance, from those at position 1
        (`first`).
        """
        one, own = ([part.to(distances.device, torch.float32).unsqueeze(1) for part in pair] for pair in (first, here))
        angles = distances.float()[:, None, None] * torch.atan2(one[1], one[0])
        scale = (one[0].square() + one[1].square()) / (own[0].square() + own[1].square())
        cos, sin = angles.cos() * scale, angles.sin() * scale
        return cos * own[0] + sin * own[1], sin * own[0] - cos * own[1]


@dataclasses.dataclass(frozen=True)
class Rotation:
    """How a layer turns its queries and keys: a function of the architecture, and the dimensions it turns.

    Args:
        function: turns `lanes heads tokens dims` by cosines and sines.
        dims: the dimensions of a head that are turned; the others pass through.
    """

    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    dims: slice

    def rotate(
        self, states: Float[Tensor, "lanes heads tokens dim"], cos_sin: CosSin
    ) -> Float[Tensor, "lanes heads tokens dim"]:
        """Return the states turned."""
        start, stop, _ = self.dims.indices(states.shape[-1])
        turned = self.function(states[..., start:stop], *cos_sin)
        if stop - start == states.shape[-1]:
            return turned
        return torch.cat([states[..., :start], turned, states[..., stop:]], dim=-1)

    def rotate_heads(
        self, states: Float[Tensor, "lanes heads tokens dim"], cos_sin: CosSinOfHeads
    ) -> Float[Tensor, "lanes heads tokens dim"]:
        """Return the states turned, each head by cosines and sines of its own, `lanes heads tokens rotary_dim`."""
        lanes = states.shape[0]  # architectures turn all heads of a lane alike: here each head is a lane
        cos, sin = (part.expand(lanes, -1, -1, -1).flatten(0, 1) for part in cos_sin)
        return self.rotate(states.flatten(0, 1).unsqueeze(1), (cos, sin)).squeeze(1).unflatten(0, (lanes, -1))

    def undo(
        self, states: Float[Tensor, "lanes heads tokens dim"], cos_sin: CosSin
    ) -> Float[Tensor, "lanes heads tokens dim"]:
        """Return the states before they were turned.

        A rotary embedding multiplies by `a * R(position)`; `a` is 1 except for scaled kinds such as YaRN. The inverse is
        `R(-position) / a`: negated sine, and both divided by `a**2 = cos**2 + sin**2`.
        """
        cos, sin = (part.to(states.device, torch.float32) for part in cos_sin)
        squared_scale = cos.square() + sin.square()
        return self.rotate(states.float(), (cos / squared_scale, -sin / squared_scale)).to(states.dtype)


def candidate_rotations(attention: nn.Module, cos: Tensor, head_dim: int) -> Iterator[Rotation]:
    """Yield the rotations that the file of an attention module could mean; the caller finds out which one undoes its keys.

    Cosines hold one number per turned dimension or per pair of them. Partial rotary models turn the first dimensions,
    multi-head latent attention the last ones.
    """
    widths = [width for width in (cos.shape[-1], 2 * cos.shape[-1]) if width <= head_dim]
    for function in rotation_functions(attention):
        for width in widths:
            yield Rotation(function, slice(0, width))
            if width < head_dim:
                yield Rotation(function, slice(head_dim - width, head_dim))


def rotation_functions(attention: nn.Module) -> Iterator[Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Yield `apply_rotary_pos_emb` of the file that defines the attention module, as a function of one tensor.

    Files define it for queries and keys together, `(q, k, cos, sin)`, or for one of them, `(x, cos, sin)`.
    """
    defined = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if defined is None:
        return
    names = list(inspect.signature(defined).parameters)
    if names[:4] == ["q", "k", "cos", "sin"]:
        yield functools.partial(_turn_queries, defined)
    elif names[1:3] == ["cos", "sin"]:
        yield defined


def _turn_queries(defined: Callable[..., Any], states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return defined(states, states[:, :1], cos, sin)[0]
