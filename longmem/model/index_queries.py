"""The queries that a model asks of its memory."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.memory import BankShards, BankView, MemoryBank
from longmem.memory.protocols import Found
from longmem.model.modeling import LongMemForCausalLM


class QueryRecorder(BankShards):
    """A memory that answers as `bank` does, and keeps the queries of every layer.

    It is the bank that answers, because what a layer asks depends on what the layers below it have read.
    """

    def __init__(self, bank: MemoryBank | BankView | BankShards) -> None:
        super().__init__([bank])
        self.queries: dict[int, list[Float[Tensor, "_kv_heads _queries _dim"]]] = {}

    def search(
        self, layer: int, queries: Float[Tensor, "kv_heads queries dim"], num_chunks: int, **options: Any
    ) -> Found:
        self.queries.setdefault(layer, []).append(queries.detach().to("cpu", torch.float32))
        return super().search(layer, queries, num_chunks, **options)


@torch.no_grad()
def recorded_queries(
    model: LongMemForCausalLM,
    bank: MemoryBank | BankView | BankShards,
    token_ids: Int[Tensor, " tokens"],
    layer: int,
    *,
    num_queries: int = 1024,
    num_windows: int = 4,
) -> Float[Tensor, "kv_heads queries dim"]:
    """Return queries that a memory layer sends to the bank while the model reads a text, evenly spaced in what it reads.

    Args:
        model: reads.
        bank: answers.
        token_ids: of the text.
        layer: a memory layer of the model.
        num_queries: for each key-value head, at most.
        num_windows: of `segment_length` tokens are read at most, from the start of the text on.
    """
    recorder = QueryRecorder(bank)
    length = model.config.segment_length
    for start in range(0, min(len(token_ids), num_windows * length), length):
        window, *_ = model.encoder.with_start(token_ids[None, start : start + length].to(model.input_device))
        model(window, memory=recorder, logits_to_keep=1)
    queries = torch.cat(recorder.queries[layer], dim=1)
    asked = queries.shape[1]
    return queries[:, torch.linspace(0, asked - 1, min(num_queries, asked)).long()]
