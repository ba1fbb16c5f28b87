"""Who read what: the passages of a memory that stand out in the attention of some tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.memory import ChunkPlace, MemoryBank
from longmem.memory.protocols import Memory
from longmem.model.attention import MemoryRead
from longmem.model.modeling import LongMemForCausalLM


@dataclasses.dataclass(frozen=True)
class Passage:
    """A chunk that was read, in its surroundings.

    `share` is the part of attention that went to the chunk (0 to 1), over all reading layers and heads. `before`,
    `chunk` and `after` are consecutive text of the document; the chunk takes its tokens from `start` to `stop`.
    """

    document_id: str
    start: int
    stop: int
    share: float
    before: str
    chunk: str
    after: str


def chunk_shares(reads: Sequence[MemoryRead]) -> tuple[Int[Tensor, " rows"], Float[Tensor, "tokens rows"]]:
    """Return the rows that were read by any token, and the share of each token's attention that each of them got.

    A share is the mean over reading layers and heads, so those of one token add up to its mean share of memory.
    """
    rows = torch.stack([read.rows[0] for read in reads]).cpu()  # layers heads tokens chunks
    weights = torch.stack([read.chunk_weights[0] * _share_of(read)[..., None] for read in reads]).float().cpu()
    layers, heads, tokens, _ = rows.shape
    found = rows >= 0
    different, place = rows[found].unique(return_inverse=True)
    token = torch.arange(tokens).view(1, 1, -1, 1).expand_as(rows)[found]
    shares = torch.zeros(tokens * len(different))
    shares.index_add_(0, token * len(different) + place, weights[found] / (layers * heads))
    return different, shares.view(tokens, len(different))


def _share_of(read: MemoryRead) -> Float[Tensor, "heads tokens"]:
    assert read.memory_share is not None
    return read.memory_share[0]


@torch.no_grad()
def read_passages(
    model: LongMemForCausalLM,
    bank: MemoryBank,
    token_ids: Int[Tensor, " tokens"],
    targets: Sequence[slice],
    *,
    count: int = 1,
    context: int = 16,
    memory: Memory | None = None,
) -> list[list[Passage]]:
    """Return, for each run of predicted tokens, the `count` passages that stand out among what was read.

    A chunk with share p of a token's attention and q of the window's on average counts `p log(p / q)`, its part of the
    divergence between the two; in a run of tokens it counts where it stands out most. By share alone the first chunks of
    encoded windows would win: every token reads them a little, as language models do with the first tokens of a text,
    and that says nothing.

    Args:
        model: predicts.
        bank: is read; its documents need token ids to be shown as text.
        token_ids: one window of text.
        targets: runs of tokens in the window, from token 1; the prediction of token t is made at token t - 1.
        count: passages per run, at most.
        context: tokens of the document shown before and after a chunk.
        memory: what is read of the bank, such as `bank.select(...)`; None: all of it.
    """
    ids = token_ids[None].to(model.input_device)
    reads = model(
        ids, memory=bank if memory is None else memory, output_memory_reads=True, logits_to_keep=1
    ).memory_reads
    if not reads:
        return [[] for _ in targets]  # the bank is empty
    rows, shares = chunk_shares(reads)
    mean = shares.mean(dim=0).clamp_min(torch.finfo(shares.dtype).tiny)
    surprise = torch.xlogy(shares, shares / mean)
    passages = []
    for target in targets:
        predicting = slice(target.start - 1, target.stop - 1)
        best = surprise[predicting].amax(dim=0).topk(min(count, len(rows))).indices
        places = zip(bank.locate(rows[best]), shares[predicting].mean(dim=0)[best].tolist(), strict=True)
        passages.append([passage_at(model, bank, place, share, context) for place, share in places if place])
    return passages


def passage_at(model: LongMemForCausalLM, bank: MemoryBank, place: ChunkPlace, share: float, context: int) -> Passage:
    """Return a chunk with its surroundings; its text is empty where the bank has no token ids."""
    document_id, start, stop = place[:3]
    ids = bank.token_ids(document_id)
    if ids is None:
        return Passage(document_id, start, stop, share, "", "", "")
    first = bank.info(document_id).first_resident_token
    low, high = start - first, stop - first
    parts = ids[max(0, low - context) : low], ids[low:high], ids[high : high + context]
    before, chunk, after = (str(model.tokenizer.decode(part)) for part in parts)
    return Passage(document_id, start, stop, share, before, chunk, after)
