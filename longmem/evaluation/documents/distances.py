"""How far back lies what a token repeats: the last place where the same few tokens stood."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

# Of what lies before the window: each group ends with so many tokens.
UP_TO = {"up to 2k": 2_048, "2k to 8k": 8_192, "8k to 32k": 32_768, "32k to 65k": 65_536, "beyond": None}
DISTANCES = ("in the window", *UP_TO, "never before")


def last_distances(token_ids: Int[Tensor, " tokens"], ngram: int) -> Int[Tensor, " tokens"]:
    """Return for each token how many tokens before it the same `ngram` tokens, itself the last of them, last ended.

    0 where they did not stand there before, as for the first tokens, which end none.

    >>> last_distances(torch.tensor([7, 8, 9, 7, 8, 7, 8]), 2).tolist()
    [0, 0, 0, 0, 3, 0, 2]
    """
    ids = token_ids.numpy().astype(np.int64)
    found = np.zeros(len(ids), dtype=np.int64)
    if len(ids) < ngram:
        return torch.from_numpy(found)
    # The number of an n-gram among all there are: no hash, so that different ones are never taken for the same.
    _, names = np.unique(ids, return_inverse=True)
    kinds, grams = int(names.max()) + 1, names
    for _ in range(ngram - 1):
        _, grams = np.unique(grams[:-1] * kinds + names[-len(grams) + 1 :], return_inverse=True)
    order = np.argsort(grams, kind="stable")
    same = grams[order][1:] == grams[order][:-1]
    found[order[1:][same] + ngram - 1] = (order[1:] - order[:-1])[same]
    return torch.from_numpy(found)


def distance_groups(
    distances: Int[Tensor, " scored"],
    positions: Int[Tensor, " scored"],
    starts: Int[Tensor, " scored"],
    ngram: int,
) -> Int[Tensor, " scored"]:
    """Return for each token the number of its group in `DISTANCES`.

    What stands wholly in the window is "in the window"; what reaches over its start is not.

    Args:
        distances: of `last_distances`.
        positions: of the tokens in their document.
        starts: of the window that each was scored in.
        ngram: tokens that are the same.
    """
    ends = torch.tensor([end for end in UP_TO.values() if end is not None])
    groups = 1 + torch.searchsorted(ends, distances)
    groups[positions - distances - (ngram - 1) >= starts] = DISTANCES.index("in the window")
    groups[distances == 0] = DISTANCES.index("never before")
    return groups
