"""The parameter sketch: how far an encoder has moved since, without keeping its weights.

Every weight is added with a random sign to one of 1,024 sums. That is linear, so the length of the difference of two sketches
estimates how far the weights have moved (Alon, Matias, Szegedy 1996; Charikar, Chen, Farach-Colton 2002).
"""

import dataclasses
import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

SIZE = 1024  # 4 kB in float32
BLOCK = 1024 * SIZE  # weights that share a pattern of signs, turned by another amount for each block


@dataclasses.dataclass(frozen=True)
class Sketch:
    """The signed sums of all weights on an encoder path, and their norm."""

    sums: Float[Tensor, " 1024"]
    norm: float

    def gap(self, other: "Sketch") -> float:
        """Return an estimate of the distance between the weights of two sketches, relative to the norm of `other`'s."""
        return float((self.sums - other.sums).norm()) / max(other.norm, 1e-30)


@torch.no_grad()
def sketch(tensors: Iterable[tuple[str, Tensor]]) -> Sketch:
    """Return the sketch of tensors on the CPU; the same names, shapes and order are sketched alike.

    >>> weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> before, after = (sketch([("weight", each)]) for each in (weights, weights * 1.01))
    >>> round(before.gap(before), 4), round(after.gap(before), 2)
    (0.0, 0.01)
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (BLOCK,), generator=generator, dtype=torch.int8).mul_(2).sub_(1).float()
    sums, squares, place = torch.zeros(SIZE, dtype=torch.float64), 0.0, 0
    for _, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        for block in tensor.reshape(-1).split(BLOCK):
            values = block.float()
            squares += float(values.square().sum(dtype=torch.float64))
            # Turned by a number that no other block of a model this size has: equal blocks do not cancel or add up.
            values = values * torch.roll(signs, (place * 40_503) % BLOCK)[: len(values)]
            whole = torch.nn.functional.pad(values, (0, -len(values) % SIZE)).view(-1, SIZE)
            sums += whole.sum(dim=0, dtype=torch.float64)
            place += 1
    return Sketch(sums.float(), math.sqrt(squares))
