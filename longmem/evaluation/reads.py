"""Who read what: the passages of a memory that some tokens attended to most."""

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
class PassageRead:
    """What helped most to predict one token.

    `share` is the part of the attention of all reading layers and heads that went to the chunk (0 to 1), `memory_share`
    the part that went to memory as a whole. `before`, `chunk` and `after` are consecutive text of `document_id`, of which
    the chunk takes the tokens from `start` to `stop`.
    """

    token: str
    token_index: int
    document_id: str
    start: int
    stop: int
    share: float
    memory_share: float
    before: str
    chunk: str
    after: str


def chunk_shares(
    reads: Sequence[MemoryRead], position: int
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"], float]:
    """Return the rows that one position read, best first, their share of its attention, and that of all memory."""
    rows, weights, memory_shares = [], [], []
    for read in reads:
        assert read.memory_share is not None
        share = read.memory_share[0, :, position]
        rows.append(read.rows[0, :, position].flatten())
        weights.append((read.chunk_weights[0, :, position] * share[:, None]).flatten() / (len(reads) * len(share)))
        memory_shares.append(share.mean())
    all_rows, all_weights = torch.cat(rows), torch.cat(weights)
    different, place = all_rows[all_rows >= 0].unique(return_inverse=True)
    totals = torch.zeros(len(different), dtype=all_weights.dtype, device=all_weights.device)
    totals.index_add_(0, place, all_weights[all_rows >= 0])
    order = totals.argsort(descending=True)
    return different[order].cpu(), totals[order].cpu(), torch.stack(memory_shares).mean().item()


@torch.no_grad()
def read_passages(
    model: LongMemForCausalLM,
    bank: MemoryBank,
    token_ids: Int[Tensor, " tokens"],
    positions: Sequence[int],
    *,
    context: int = 16,
) -> list[PassageRead]:
    """Return, for each token at `positions` (from 1), the passage that its prediction read most.

    Args:
        model: predicts.
        bank: is read; its documents need token ids to be shown as text.
        token_ids: one window of text.
        positions: tokens of the window whose predictions are looked at.
        context: tokens of the passage shown before and after the chunk.
    """
    ids = token_ids[None].to(model.get_input_embeddings().weight.device)
    reads = model(ids, memory=bank, output_memory_reads=True).memory_reads
    passages = []
    for position in positions:
        rows, shares, memory_share = chunk_shares(reads, position - 1)  # the token before makes the prediction
        if not len(rows):
            continue
        (place,) = bank.locate(rows[:1])
        assert place is not None
        document_id, start, stop = place
        before, chunk, after = surrounding_text(model, bank, document_id, start, stop, context)
        passages.append(
            PassageRead(
                token=model.tokenizer.decode(token_ids[position]),
                token_index=position,
                document_id=document_id,
                start=start,
                stop=stop,
                share=shares[0].item(),
                memory_share=memory_share,
                before=before,
                chunk=chunk,
                after=after,
            )
        )
    return passages


def surrounding_text(
    model: LongMemForCausalLM, bank: MemoryBank, document_id: str, start: int, stop: int, context: int
) -> tuple[str, str, str]:
    """Return the text before, in and after tokens `start` to `stop` of a document; empty where the bank has no ids."""
    ids = bank.token_ids(document_id)
    if ids is None:
        return "", "", ""
    first = next(info.first_resident_token for info in bank.documents() if info.document_id == document_id)
    low, high = start - first, stop - first
    parts = ids[max(0, low - context) : low], ids[low:high], ids[high : high + context]
    before, chunk, after = (model.tokenizer.decode(part) for part in parts)
    return before, chunk, after
