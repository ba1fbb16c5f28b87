"""Attention over stored chunks in one Triton kernel: keys and values are read where they are stored, and not copied.

It computes what `attend_block` does of what `gather` returns, without gradients. It was run in Triton's interpreter only, on a
CPU: whether it is faster on a GPU is not known, so `LONGMEM_FUSED_READ=1` has to ask for it.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Num
from torch import Tensor

from longmem.memory.rows.storage import vector_width

TOKENS_PER_STEP = 32  # that one program compares at a time


@triton.jit
@no_type_check  # nor of shapes: Triton reads the source
def stored_vectors(tensor, at, there, place, DIM: tl.constexpr, WIDTH: tl.constexpr, IS_CODED: tl.constexpr):
    """Return vectors as float32; of coded ones two bytes behind their numbers are a bfloat16 scale (`rows/storage.py`)."""
    mask = there[:, None] & (place < DIM)[None, :]
    vectors = tl.load(tensor + at[:, None] * WIDTH + place[None, :], mask=mask, other=0).to(tl.float32)
    if IS_CODED:
        low = tl.load(tensor + at * WIDTH + DIM, mask=there, other=0).to(tl.int32) & 255
        high = tl.load(tensor + at * WIDTH + DIM + 1, mask=there, other=0).to(tl.int32) & 255
        vectors = vectors * ((high << 24) | (low << 16)).to(tl.float32, bitcast=True)[:, None]
    return vectors


@triton.jit
@no_type_check  # nor of shapes: Triton reads the source
def read_kernel(
    queries,
    keys,
    values,
    rows,
    sizes,
    log_weights,
    output,
    logsumexp,
    all_scores,
    num_queries,
    num_rows,
    scaling,
    softcap,
    nothing,
    CHUNKS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    DIM_ROOM: tl.constexpr,
    VALUE_ROOM: tl.constexpr,
    STEP: tl.constexpr,
    IS_CODED: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Let one query of one head attend to the tokens of its chunks, a few at a time, by a running softmax."""
    head = tl.program_id(1).to(tl.int64)
    query = head * num_queries + tl.program_id(0)
    place, value_place = tl.arange(0, DIM_ROOM), tl.arange(0, VALUE_ROOM)
    asked = tl.load(queries + query * DIM + place, mask=place < DIM, other=0).to(tl.float32)
    largest, total = -float("inf"), 0.0
    summed = tl.zeros([VALUE_ROOM], dtype=tl.float32)
    for start in range(0, CHUNKS * SIZE, STEP):
        token = start + tl.arange(0, STEP)
        inside, chunk = token < CHUNKS * SIZE, query * CHUNKS + token // SIZE
        row = tl.load(rows + chunk, mask=inside, other=-1)
        there = inside & (row >= 0)
        if HAS_SIZES:
            there = there & (token % SIZE < tl.load(sizes + chunk, mask=inside, other=0))
        at = (head * num_rows + tl.maximum(row, 0)) * SIZE + token % SIZE
        key = stored_vectors(keys, at, there, place, DIM, KEY_WIDTH, IS_CODED)
        scores = tl.sum(key * asked[None, :], axis=1) * scaling
        if HAS_SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        if HAS_WEIGHTS:
            scores = scores + tl.load(log_weights + chunk, mask=inside, other=0)
        scores = tl.where(there, scores, -float("inf"))
        tl.store(all_scores + query * CHUNKS * SIZE + token, scores, mask=inside)
        before, largest = largest, tl.maximum(largest, tl.max(scores, axis=0))
        base = tl.where(largest == -float("inf"), 0.0, largest)
        weights, kept = tl.exp(scores - base), tl.exp(before - base)
        value = stored_vectors(values, at, there, value_place, VALUE_DIM, VALUE_WIDTH, IS_CODED)
        summed = summed * kept + tl.sum(value * weights[:, None], axis=0)
        total = total * kept + tl.sum(weights, axis=0)
    is_found = total > 0
    total = tl.where(is_found, total, 1.0)
    tl.store(output + query * VALUE_DIM + value_place, summed / total, mask=value_place < VALUE_DIM)
    tl.store(logsumexp + query, tl.where(is_found, tl.maximum(largest + tl.log(total), nothing), nothing))


@torch.no_grad()
def attend_rows(
    queries: Float[Tensor, "kv_heads queries dim"],
    keys: Num[Tensor, "kv_heads rows chunk_size stored_dim"],
    values: Num[Tensor, "kv_heads rows chunk_size stored_value_dim"],
    rows: Int[Tensor, "kv_heads queries chunks"],
    sizes: Int[Tensor, "kv_heads queries chunks"] | None,
    log_weights: Float[Tensor, "kv_heads queries chunks"] | None,
    scaling: float,
    softcap: float | None,
    nothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp (`nothing` where nothing was found) and the weight of each chunk, in float32.

    Keys and values are those of a store, as they are stored, on the queries' device; other arguments as for `attend_block`.
    """
    (heads, count, dim), chunks, size = queries.shape, rows.shape[2], keys.shape[2]
    value_dim = vector_width(values.shape[3], values.dtype)
    output = queries.new_empty(heads, count, value_dim, dtype=torch.float32)
    logsumexp = output.new_empty(heads, count)
    scores = output.new_empty(heads, count, chunks * size)
    given: list[Any] = [queries.contiguous(), keys.contiguous(), values.contiguous(), rows.contiguous()]
    given += [rows if each is None else each.contiguous() for each in (sizes, log_weights)]  # what is None is not read
    read_kernel[(count, heads)](
        *given,
        output,
        logsumexp,
        scores,
        count,
        keys.shape[1],
        scaling,
        softcap or 1.0,
        nothing,
        CHUNKS=chunks,
        SIZE=size,
        DIM=dim,
        VALUE_DIM=value_dim,
        KEY_WIDTH=keys.shape[3],
        VALUE_WIDTH=values.shape[3],
        DIM_ROOM=triton.next_power_of_2(dim),
        VALUE_ROOM=triton.next_power_of_2(value_dim),
        STEP=TOKENS_PER_STEP,
        IS_CODED=keys.dtype == torch.int8,
        HAS_SIZES=sizes is not None,
        HAS_WEIGHTS=log_weights is not None,
        HAS_SOFTCAP=softcap is not None,
    )
    weights = (scores - logsumexp.unsqueeze(-1)).exp().unflatten(-1, (chunks, size)).sum(-1)
    return output, logsumexp, weights
