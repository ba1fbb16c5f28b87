"""Who read what: the passages of a memory that the predictions of some tokens attended to most."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.attention import MemoryRead
from longmem.memory import MemoryBank
from longmem.modeling import LongMemForCausalLM


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


def chunk_shares(reads: Sequence[MemoryRead], positions: slice) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return the rows that tokens at `positions` read, most read first, and the share of attention of each."""
    rows, weights = [], []
    for read in reads:
        assert read.memory_share is not None
        share = read.memory_share[0, :, positions]
        rows.append(read.rows[0, :, positions].flatten())
        weights.append(
            (read.chunk_weights[0, :, positions] * share.unsqueeze(-1)).flatten() / share.numel() / len(reads)
        )
    all_rows, all_weights = torch.cat(rows).cpu(), torch.cat(weights).float().cpu()
    found = all_rows >= 0
    different, place = all_rows[found].unique(return_inverse=True)
    totals = torch.zeros(len(different)).index_add(0, place, all_weights[found])
    order = totals.argsort(descending=True)
    return different[order], totals[order]


@torch.no_grad()
def read_passages(
    model: LongMemForCausalLM,
    bank: MemoryBank,
    token_ids: Int[Tensor, " tokens"],
    targets: Sequence[slice],
    *,
    count: int = 1,
    context: int = 16,
) -> list[list[Passage]]:
    """Return, for each run of predicted tokens, the `count` passages that were read most.

    Args:
        model: predicts.
        bank: is read; its documents need token ids to be shown as text.
        token_ids: one window of text.
        targets: runs of tokens in the window, from token 1; the prediction of token t is made at token t - 1.
        count: passages per run, at most.
        context: tokens of the document shown before and after a chunk.
    """
    ids = token_ids[None].to(model.get_input_embeddings().weight.device)
    reads = model(ids, memory=bank, output_memory_reads=True, logits_to_keep=1).memory_reads
    if not reads:
        return [[] for _ in targets]  # the bank is empty
    passages = []
    for target in targets:
        rows, shares = chunk_shares(reads, slice(target.start - 1, target.stop - 1))
        places = zip(bank.locate(rows[:count]), shares[:count].tolist(), strict=True)
        passages.append([passage_at(model, bank, place, share, context) for place, share in places if place])
    return passages


def passage_at(
    model: LongMemForCausalLM, bank: MemoryBank, place: tuple[str, int, int], share: float, context: int
) -> Passage:
    """Return a chunk with its surroundings; its text is empty where the bank has no token ids."""
    document_id, start, stop = place
    ids = bank.token_ids(document_id)
    if ids is None:
        return Passage(document_id, start, stop, share, "", "", "")
    first = next(info.first_resident_token for info in bank.documents() if info.document_id == document_id)
    low, high = start - first, stop - first
    parts = ids[max(0, low - context) : low], ids[low:high], ids[high : high + context]
    before, chunk, after = (str(model.tokenizer.decode(part)) for part in parts)
    return Passage(document_id, start, stop, share, before, chunk, after)
