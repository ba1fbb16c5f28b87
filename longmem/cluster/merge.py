"""What shards answer, put together: the best chunks of all, and attention over them, as one bank would give it.

In one trip (docs/scaling.md, section 3, C) each shard sends the attention of each of its best chunks. In two (E) it sends their
scores, hears how many of them are among the best of all, and sends attention over those. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.memory.protocols import Attended, Found
from longmem.model.attention import NO_MEMORY

Answer = dict[str, Any]


class Ranking(NamedTuple):
    """The best chunks of all shards: their scores, shards, and places among what these found, one shard after the other."""

    numbers: list[int]
    scores: Float[Tensor, "kv_heads queries chunks"]
    owners: Int[Tensor, "kv_heads queries chunks"]
    order: Int[Tensor, "kv_heads queries chunks"]

    def wanted(self, number: int) -> Int[Tensor, "kv_heads queries"]:
        """Return how many chunks of a shard are among the best: they are its first, as each shard has sorted its own."""
        wanted = ((self.owners == number) & (self.scores > -torch.inf)).sum(-1)
        return wanted.to(torch.int16 if self.scores.shape[-1] < 2**15 else torch.int32)


def rank(answers: Mapping[int, Answer], num_chunks: int, device: torch.device) -> Ranking | None:
    """Return the best chunks of all that was found, of equal scores the earlier shard's first; None if nothing was."""
    numbers = sorted(number for number, each in answers.items() if "scores" in each)
    if not numbers:
        return None
    parts = [answers[each]["scores"].to(device) for each in numbers]
    owners = torch.tensor([each for each, part in zip(numbers, parts, strict=True) for _ in range(part.shape[2])])
    scores, order = torch.cat(parts, dim=2).sort(dim=2, descending=True, stable=True)
    scores, order = scores[..., :num_chunks], order[..., :num_chunks]
    return Ranking(numbers, scores, owners.to(device)[order], order)


def joined(answers: Mapping[int, Answer], name: str, ranking: Ranking, fill: float = 0.0) -> Tensor:
    """Return what the shards say of the best chunks, in their order; `fill`: for shards that say nothing of it."""
    parts = []
    for number in ranking.numbers:
        part = answers[number].get(name)
        parts.append(torch.full_like(answers[number]["scores"], fill) if part is None else part)
    whole, order = torch.cat([part.to(ranking.order.device) for part in parts], dim=2), ranking.order
    return whole.gather(2, order if whole.ndim == 3 else order.unsqueeze(-1).expand(*order.shape, whole.shape[-1]))


def found(
    answers: Mapping[int, Answer], ranking: Ranking, num_shards: int, chunk_size: int, generation: Hashable
) -> Found:
    """Return the best chunks; row r of shard s is row `r * num_shards + s`."""
    rows, extra = joined(answers, "rows", ranking), {}
    for name, fill in (("log_weights", 0.0), ("sizes", float(chunk_size))):
        if any(name in answers[each] for each in ranking.numbers):
            extra[name] = joined(answers, name, ranking, fill)
    sizes = extra.get("sizes")
    return Found(
        torch.where(rows < 0, -1, rows * num_shards + ranking.owners),
        ranking.scores,
        extra.get("log_weights"),
        generation,
        None if sizes is None else sizes.long(),
    )


def in_places(
    answers: Mapping[int, Answer], picked: Mapping[int, Answer], wanted: Mapping[int, Tensor], chunk_size: int
) -> dict[int, Answer]:
    """Return answers of the second trip in the form of those of the first: with a place for each chunk that was found.

    `output` alone has one for each query, for it is of all chunks of a shard that were wanted.
    """
    whole: dict[int, Answer] = {}
    nothing = {"rows": torch.empty(0, dtype=torch.int64), "logsumexp": torch.empty(0)}
    fills = {"rows": -1, "logsumexp": -torch.inf, "log_weights": 0.0, "sizes": chunk_size}
    for number, count in wanted.items():
        scores, told = answers[number]["scores"], nothing | picked.get(number, {})
        is_wanted = torch.arange(scores.shape[2]) < count.unsqueeze(-1)
        parts = {name: (told[name], fill) for name, fill in fills.items() if name in told}
        whole[number] = {"scores": scores} | {
            name: part.new_full(scores.shape, fill).masked_scatter(is_wanted, part)
            for name, (part, fill) in parts.items()
        }
        if "output" in told:
            output = told["output"].new_zeros(*count.shape, told["output"].shape[-1])
            output[count > 0] = told["output"]
            whole[number]["output"] = output
    return whole


def attended(answers: Mapping[int, Answer], ranking: Ranking, best: Found) -> Attended:
    """Return attention over the best chunks, `sum softmax(l)_c o_c` of log-sum-exps l and outputs o, in float32."""
    is_missing = best.rows < 0
    logsumexp = joined(answers, "logsumexp", ranking).masked_fill(is_missing, -torch.inf)
    together = logsumexp.logsumexp(-1).clamp_min(NO_MEMORY)
    nothing = is_missing.all(-1, keepdim=True)
    weights = logsumexp.masked_fill(nothing, 0.0).softmax(-1).masked_fill(is_missing, 0.0)
    outputs = {number: each["output"] for number, each in answers.items() if "output" in each}
    if next(iter(outputs.values())).ndim == 4:
        output = (weights.unsqueeze(-2) @ joined(answers, "output", ranking).float()).squeeze(-2)
    else:
        shares = [weights.masked_fill(ranking.owners != number, 0.0).sum(-1, keepdim=True) for number in outputs]
        parts = [each.to(weights.device).float() for each in outputs.values()]
        output = torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(0)
    return Attended(output, together, weights, best)
