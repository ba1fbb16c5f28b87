"""Neighbours in memory: what came next after the tokens that are most like the present one is mixed into the prediction.

This is kNN-LM (Khandelwal et al., 2020, arXiv 1911.00172) without a datastore of its own: two tokens are compared by the keys
and values that the backbone has of them and memory holds anyway, of all memory layers and heads side by side. How much the
neighbours count depends on how near they are, as in adaptive retrieval (He et al., 2021, arXiv 2109.04212), by a formula in the
place of a trained network: nothing is trained, nothing more is stored.

Distances are squared, and relative to that of two tokens of the memory drawn by chance. With r the mean distance of the
`NEAR` nearest, all neighbours together have the share `1 / (1 + (r / HALF) ** 2)` of the prediction, and each of them, at
distance d, a part of it in proportion to `exp(-d / (SHARPNESS * r))`. How these numbers were chosen: `docs/experiments.md`,
"Neighbours".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from longmem.memory.protocols import Memory, NeighbourMemory
from longmem.model.attention import lanes_by_memory, tokens_missing

HALF = 0.04  # the distance at which neighbours and model count alike
SHARPNESS = 0.3
MOST_SHARE = 0.999  # of neighbours: what they do not know of stays possible
NEAR = 16  # neighbours whose mean distance says how near they are
CHUNKS_PER_HEAD = 32  # that are most like a token by one head's keys; of these, neighbours are chosen by all
SAMPLED_CHUNKS = 64  # from which the distance of tokens drawn by chance is known
NUMBERS_AT_ONCE = 2**25  # of keys and values that are fetched: 128 MiB
BLOCK, MIXED_AT_ONCE = 256, 64  # tokens whose distances, and whose mixtures, are computed at once

# Keys and values that one memory layer has of tokens.
LayerFeatures = tuple[Float[Tensor, "_lanes _kv_heads _tokens _dim"], Float[Tensor, "_lanes _kv_heads _tokens _dim"]]
# The same of the tokens of all lanes that read one memory, in one row.
FoldedFeatures = tuple[Float[Tensor, "_kv_heads _tokens _dim"], Float[Tensor, "_kv_heads _tokens _dim"]]


class Neighbours(NamedTuple):
    """What the neighbours of each token predict.

    `share`: of the prediction, that is theirs; 0 where there are none. `token_ids`: the tokens that followed them, nearest
    first, -1 for none; `weights`: of each, of their share, in all 1.
    """

    share: Float[Tensor, "lanes tokens"]
    token_ids: Int[Tensor, "lanes tokens neighbours"]
    weights: Float[Tensor, "lanes tokens neighbours"]

    def mixed_into(self, logits: Float[Tensor, "lanes tokens vocabulary"]) -> Float[Tensor, "lanes tokens vocabulary"]:
        """Return log-probabilities of the mixture, in the dtype of the logits; these themselves, where nothing is mixed in."""
        if not bool(self.share.any()):
            return logits
        parts = [logits, *(part.to(logits.device) for part in self)]
        blocks = zip(*(part.flatten(0, 1).split(MIXED_AT_ONCE) for part in parts), strict=True)
        return torch.cat([mixed(*block) for block in blocks]).view_as(logits)


def mixed(
    logits: Float[Tensor, "tokens vocabulary"],
    share: Float[Tensor, " tokens"],
    token_ids: Int[Tensor, "tokens neighbours"],
    weights: Float[Tensor, "tokens neighbours"],
) -> Float[Tensor, "tokens vocabulary"]:
    """Return what `Neighbours.mixed_into` does, of some tokens.

    >>> mixed(torch.zeros(1, 4), torch.tensor([0.2]), torch.tensor([[3, 0, 3]]), torch.tensor([[0.5, 0.25, 0.25]])).exp()
    tensor([[0.2500, 0.2000, 0.2000, 0.3500]])
    """
    full, is_known = logits.float(), (token_ids >= 0) & (token_ids < logits.shape[1])
    ids = torch.where(is_known, token_ids, 0)
    # All but a few tokens lose the neighbours' share, and no more: one pass over the vocabulary for it.
    lost = torch.where(share > 0, full.logsumexp(dim=1) - torch.log1p(-share), 0.0)
    own = full - lost[:, None]
    is_same = (ids[:, :, None] == ids[:, None, :]) & is_known[:, None, :]
    total = torch.where(is_same, weights[:, None, :], 0.0).sum(dim=2)
    is_first = is_known & ~is_same.tril(-1).any(dim=2)  # of the same token, which gains once
    before = own.gather(1, ids)
    gained = torch.logaddexp(before, (share[:, None] * total).log()) - before
    return own.scatter_add(1, ids, torch.where(is_first, gained, 0.0)).to(logits.dtype)


@torch.compiler.disable  # searches, and rows, live outside of any graph
@torch.no_grad()
def neighbours_of(
    features: dict[int, LayerFeatures], memory: Sequence[Memory], num_neighbours: int, places: int | Tensor = 0
) -> Neighbours:
    """Return the neighbours of tokens in memory, and what followed them.

    Args:
        features: position-free keys and values of the tokens, for each memory layer.
        memory: one for each lane; the same object may stand in several lanes.
        num_neighbours: of each token, at most.
        places: of how many last tokens (0: all), or of the tokens at which places.

    Raises:
        ValueError: a memory can't say what came next.
    """
    kept = slice(-places, None) if isinstance(places, int) else places
    device = next(iter(features.values()))[0].device
    features = {
        layer: (keys[:, :, kept].to(device), values[:, :, kept].to(device))
        for layer, (keys, values) in features.items()
    }
    lanes, _, tokens, _ = next(iter(features.values()))[0].shape
    share = torch.zeros(lanes, tokens, device=device)
    ids = torch.full((lanes, tokens, num_neighbours), -1, device=device)
    weights = torch.zeros(ids.shape, device=device)
    for bank, own in lanes_by_memory(memory):
        if not all(hasattr(bank, name) for name in ("nearest", "sample", "next_ids")):
            raise ValueError(
                f"`num_neighbours` must be 0 for a memory without `nearest` and `next_ids`, got {num_neighbours} and a "
                f"{type(bank).__name__}; set `model.config.num_neighbours = 0`."
            )
        near: NeighbourMemory = bank  # type: ignore[assignment]
        # Under autocast products of keys would be too coarse: near neighbours differ by little.
        with torch.autocast(device.type, enabled=False):
            found = neighbours_in(near, own, features, num_neighbours)
        for whole, part in zip((share, ids, weights), found or (), strict=False):
            whole[own] = part.unflatten(0, (len(own), tokens))
    return Neighbours(share, ids, weights)


def neighbours_in(
    memory: NeighbourMemory, lanes: Sequence[int], features: dict[int, LayerFeatures], num_neighbours: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return shares, ids and weights of the neighbours in one memory, of the tokens of some lanes; None if nothing is there."""
    scale = distance_by_chance(memory, features)
    if scale is None:
        return None
    folded = {
        layer: (keys[lanes].transpose(0, 1).flatten(1, 2), values[lanes].transpose(0, 1).flatten(1, 2))
        for layer, (keys, values) in features.items()
    }
    return nearest_tokens(memory, folded, scale, num_neighbours)


def distance_by_chance(memory: NeighbourMemory, features: dict[int, LayerFeatures]) -> Float[Tensor, ""] | None:
    """Return the mean squared distance of two tokens of a memory, from a sample; None for one in which nothing is found."""
    if memory.is_empty or (sample := memory.sample(SAMPLED_CHUNKS)).generation is None:
        return None
    parts = []
    for layer, (keys, _) in features.items():
        rows = sample.rows[0].to(keys.device)
        stored = memory.gather(layer, rows.expand(keys.shape[1], -1), sample.generation)
        there = ~tokens_missing(sample.rows, sample.sizes, memory.chunk_size)[0, 0].to(keys.device)
        parts += [part.float().flatten(1, 2)[:, there].var(dim=1, correction=0).sum() for part in stored]
    return 2 * torch.stack(parts).sum().clamp_min(1e-12)


def nearest_tokens(
    memory: NeighbourMemory, features: dict[int, FoldedFeatures], scale: Float[Tensor, ""], num_neighbours: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return shares, ids and weights of the neighbours of tokens in one memory, of one state of it."""
    found = [memory.nearest(layer, keys.float(), CHUNKS_PER_HEAD) for layer, (keys, _) in features.items()]
    generation = next((each.generation for each in found if each.generation is not None), None)
    here = side_by_side(list(features.values()))
    candidates = torch.cat([each.rows.transpose(0, 1).flatten(1) for each in found], dim=1).to(here.device)
    rows = candidates[candidates >= 0].unique()
    if generation is None or not len(rows):
        return weighed(here.new_empty(len(here), 0), rows, num_neighbours)
    next_ids_of = memory.next_ids(rows, generation)
    # Where a memory is small, tokens have candidates in common, and all of these are fetched once.
    most = max(1, NUMBERS_AT_ONCE // (memory.chunk_size * here.shape[1]))
    size = len(here) if len(rows) <= most else max(1, most // candidates.shape[1])
    every, parts = rows, []
    for some_here, some_candidates in zip(here.split(size), candidates.split(size), strict=True):
        rows = some_candidates[some_candidates >= 0].unique()
        next_ids = next_ids_of[torch.searchsorted(every, rows)].flatten()
        stored = [memory.gather(layer, rows.expand(len(keys), -1), generation) for layer, (keys, _) in features.items()]
        there = side_by_side([(keys.flatten(1, 2), values.flatten(1, 2)) for keys, values in stored])
        squares = there.square().sum(dim=1)
        for tokens, own in zip(some_here.split(BLOCK), some_candidates.split(BLOCK), strict=True):
            distances = torch.addmm(squares + tokens.square().sum(dim=1, keepdim=True), tokens, there.T, alpha=-2)
            is_near = among(own, rows).repeat_interleave(memory.chunk_size, dim=1) & (next_ids >= 0)
            distances = (distances / scale).clamp_min(0).masked_fill(~is_near, torch.inf)
            parts.append(weighed(distances, next_ids, num_neighbours))
    share, ids, weights = (torch.cat(column) for column in zip(*parts, strict=True))
    return share, ids, weights


def weighed(
    distances: Float[Tensor, "tokens stored"], next_ids: Int[Tensor, " stored"], num_neighbours: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return shares, ids and weights of the nearest of stored tokens; a distance of infinity is that of no neighbour.

    >>> share, ids, weights = weighed(torch.tensor([[0.04, torch.inf, 0.04]]), torch.tensor([7, 8, 9]), 3)
    >>> share, sorted(ids[0].tolist()), weights
    (tensor([0.5000]), [-1, 7, 9], tensor([[0.5000, 0.5000, 0.0000]]))
    """
    missing = num_neighbours - min(num_neighbours, distances.shape[1])
    nearest, places = distances.topk(num_neighbours - missing, largest=False)
    ids = functional.pad(next_ids[places], (0, missing), value=-1)
    nearest = functional.pad(nearest, (0, missing), value=torch.inf)
    is_there = nearest < torch.inf
    near = nearest[:, :NEAR].masked_fill(~is_there[:, :NEAR], 0)
    typical = (near.sum(dim=1) / is_there[:, :NEAR].sum(dim=1).clamp_min(1)).clamp_min(1e-6)
    share = (1 / (1 + (typical / HALF) ** 2)).clamp_max(MOST_SHARE)
    weights = (-nearest / (SHARPNESS * typical)[:, None]).softmax(dim=1).nan_to_num(0.0)
    return torch.where(is_there.any(dim=1), share, 0.0), ids.masked_fill(~is_there, -1), weights


def side_by_side(layers: Sequence[FoldedFeatures]) -> Float[Tensor, "tokens dims"]:
    """Return keys and values of all layers and heads as one vector for each token."""
    return torch.cat([part.float().transpose(0, 1).flatten(1) for layer in layers for part in layer], dim=1)


def among(found: Int[Tensor, "tokens found"], rows: Int[Tensor, " rows"]) -> Bool[Tensor, "tokens rows"]:
    """Return which of some sorted rows were found for each token.

    >>> among(torch.tensor([[5, -1], [2, 5]]), torch.tensor([2, 4, 5]))
    tensor([[False, False,  True],
            [ True, False,  True]])
    """
    is_found = torch.zeros(len(found), len(rows) + 1, dtype=torch.bool, device=rows.device)
    places = torch.where(found < 0, len(rows), torch.searchsorted(rows, found.clamp(min=0).contiguous()))
    return is_found.scatter_(1, places, True)[:, :-1]
