"""Drift maps: from vectors of an old encoder to those of a new one, fitted on tokens that both have encoded.

Affine: a matrix and an offset by ridge regression. Procrustes: a rotation, a scale and the means (Schönemann 1966); it has
fewer ways to go wrong. Both are fitted for each head by itself (the idea of Drift-Adapter, for keys and values of attention).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class DriftMap(NamedTuple):
    """A map x -> x @ matrix + offset for each head."""

    matrix: Float[Tensor, "heads dim dim"]
    offset: Float[Tensor, "heads 1 dim"]

    def apply(self, vectors: Float[Tensor, "heads tokens dim"]) -> Float[Tensor, "heads tokens dim"]:
        """Return the vectors moved, in float32; the mean of some vectors moves to the mean of where they go."""
        return vectors.float() @ self.matrix + self.offset


def fit_map(
    kind: str,
    old: Float[Tensor, "heads tokens dim"],
    new: Float[Tensor, "heads tokens dim"],
    ridge: float,
) -> DriftMap:
    """Return the map of a kind, "affine" or "procrustes", that brings `old` nearest to `new`.

    `ridge`: weight of the penalty on the matrix, relative to the mean square of a centred coordinate; for affine maps the
    penalty draws to a scaled identity and not to zero, so that few samples change little.

    >>> old = torch.randn(1, 50, 3, generator=torch.Generator().manual_seed(0))
    >>> turned = old @ torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]) * 2 + 5
    >>> maps = [fit_map(kind, old, turned, ridge=0.0) for kind in ("affine", "procrustes")]
    >>> [round(relative_error(each.apply(old), turned), 3) for each in maps]
    [0.0, 0.0]
    """
    old, new = old.double(), new.double()
    old_mean, new_mean = old.mean(dim=1, keepdim=True), new.mean(dim=1, keepdim=True)
    x, y = old - old_mean, new - new_mean
    if kind == "procrustes":
        left, strengths, right = torch.linalg.svd(x.transpose(1, 2) @ y)
        scale = strengths.sum(dim=1) / x.square().sum(dim=(1, 2)).clamp_min(1e-30)
        matrix = (left @ right) * scale[:, None, None]
    else:
        gram = x.transpose(1, 2) @ x
        weight = ridge * gram.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        identity = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
        scale = (x * y).sum(dim=(1, 2)) / x.square().sum(dim=(1, 2)).clamp_min(1e-30)
        target = x.transpose(1, 2) @ y + weight * scale[:, None, None] * identity
        matrix = torch.linalg.lstsq(gram + weight * identity, target).solution
    offset = new_mean - old_mean @ matrix
    return DriftMap(matrix.float(), offset.float())


def relative_error(found: Float[Tensor, "heads tokens dim"], wanted: Float[Tensor, "heads tokens dim"]) -> float:
    """Return the distance between vectors, relative to the length of what is wanted."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30))


def neighbours_kept(
    found: Float[Tensor, "heads tokens dim"], wanted: Float[Tensor, "heads tokens dim"], share: float = 0.02
) -> float:
    """Return how much of what a search among `wanted` keys finds, a search among `found` finds too, from 0 to 1.

    The wanted keys themselves are the queries, 1,024 at most, and each looks for this share of all keys, one at least; of none
    nothing is kept. The distance between keys does not tell it: most of their length, and of their variance, may be what they
    have in common.

    >>> keys = torch.randn(1, 100, 8, generator=torch.Generator().manual_seed(0))
    >>> neighbours_kept(3 * keys, keys), neighbours_kept(keys.mean(dim=1, keepdim=True).expand(1, 100, 8), keys) < 0.1
    (1.0, True)
    """
    if not wanted.shape[1]:
        return 0.0
    wanted, found = wanted[:, :1024].float(), found[:, :1024].float()
    count = max(1, round(share * wanted.shape[1]))
    nearest, chosen = (
        (wanted @ keys.transpose(1, 2)).topk(count, dim=2).indices.unsqueeze(axis)
        for keys, axis in ((wanted, -1), (found, -2))
    )
    return (nearest == chosen).any(dim=-1).double().mean().item()
