"""The passages of a memory that stand out in the attention of some tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from longmem.memory import ChunkPlace, MemoryBank
from longmem.memory.protocols import Memory
from longmem.model.modeling import LongMemForCausalLM
from longmem.model.reads import of_one_state, table_of_reads


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

    A chunk counts by `Reads.surprise` where it stands out most in the run. By share alone the first chunks of encoded windows
    would win: every token reads them a little, as language models do with the first tokens of a text, and that says nothing.

    Args:
        model: predicts.
        bank: is read; its documents need token ids to be shown as text.
        token_ids: one window of text.
        targets: runs of tokens in the window, from token 1; the prediction of token t is made at token t - 1.
        count: passages per run, at most.
        context: tokens of the document shown before and after a chunk.
        memory: a selection of the bank, to be read instead of all of it.
    """
    ids = token_ids[None].to(model.input_device)
    return of_one_state(bank, lambda: _passages(model, bank, memory or bank, ids, targets, count, context))


def _passages(
    model: LongMemForCausalLM,
    bank: MemoryBank,
    memory: Memory,
    ids: Int[Tensor, "1 tokens"],
    targets: Sequence[slice],
    count: int,
    context: int,
) -> list[list[Passage]]:
    read = model(ids, memory=memory, output_memory_reads=True, logits_to_keep=1).memory_reads
    if not read:
        return [[] for _ in targets]  # the bank is empty
    reads = table_of_reads([read], ids.shape[1])
    surprise, passages = reads.surprise(), []
    for target in targets:
        own = slice(reads.of(target.start - 1).start, reads.of(target.stop - 2).stop)
        largest = np.full(len(reads.rows), -np.inf)
        np.maximum.at(largest, reads.chunks[own], surprise[own])
        best = np.argsort(-largest, kind="stable")[:count]
        best = best[np.isfinite(largest[best])]
        shares = np.bincount(reads.chunks[own], reads.weights[own], minlength=len(reads.rows))
        places = bank.locate(torch.from_numpy(reads.rows[best]))
        shared = (shares[best] / (target.stop - target.start)).tolist()
        passages.append(
            [
                passage_at(model, bank, place, share, context)
                for place, share in zip(places, shared, strict=True)
                if place
            ]
        )
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
