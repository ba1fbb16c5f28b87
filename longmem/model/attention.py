"""Attention over the local context and over what was retrieved: pure functions, and a plain twin that proves them.

Notation (`docs/architecture.md`): for one query, local scores s_j and retrieved scores m_k. Joint fusion is one softmax over
all of them; gated fusion (the paper, equation 5) mixes two. The fast path reads retrieved keys in blocks, keeps their
output o_m and log-sum-exp l_m, and merges them into the backbone's own attention function as if they were one more key with
score l_m and value o_m: the same softmax, exactly, whatever kernel computes the local part.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longmem.errors import ChangedMemoryError
from longmem.memory import BankView, MemoryBank
from longmem.memory.protocols import AttendingMemory, Found, Memory

# Queries per key-value head whose retrieved keys are gathered at once: a few MB, so that they stay in cache.
QUERY_BLOCK = 256
ATTEMPTS_TO_READ = 16  # of a memory that another thread changes
NO_MEMORY = -1e3  # log-sum-exp of an empty read: its weight beside any real score underflows to exactly 0


@dataclasses.dataclass
class MemoryRead:
    """What every query of one reading layer read.

    `rows` (`lanes heads tokens chunks`) are chunk rows of the bank, -1 where nothing was found; `chunk_weights` the share of
    each chunk in the retrieved softmax; `memory_share` (`lanes heads tokens`) the weight of memory beside the local context;
    `log_weights` what the age of each chunk has added to its scores, None where no bank has an age prior.
    """

    layer: int
    rows: Int[Tensor, "lanes heads tokens chunks"]
    chunk_weights: Float[Tensor, "lanes heads tokens chunks"]
    memory_share: Float[Tensor, "lanes heads tokens"] | None = None
    log_weights: Float[Tensor, "lanes heads tokens chunks"] | None = None
    # What each memory found, in the order in which lanes name them: a layer that is computed again reads these rows.
    found: tuple[Found, ...] = ()
    heads: Int[Tensor, " reading"] | None = None  # that `rows`, `chunk_weights` and `log_weights` are of; None: all

    def of_all_heads(self) -> "MemoryRead":
        """Return the same with all heads in every part; those that do not read have found nothing."""
        if self.heads is None or self.memory_share is None:
            return self
        heads, count, weights = self.heads, self.memory_share.shape[1], self.log_weights
        return dataclasses.replace(
            self,
            rows=spread(self.rows, heads, count, -1),
            chunk_weights=spread(self.chunk_weights, heads, count, 0),
            log_weights=None if weights is None else spread(weights, heads, count, 0),
            heads=None,
        )


@dataclasses.dataclass
class Retrieved:
    """Attention over retrieved tokens alone: its output, its log-sum-exp (`NO_MEMORY` where nothing was found), its read."""

    output: Float[Tensor, "lanes heads tokens dim"]
    logsumexp: Float[Tensor, "lanes heads tokens"]
    read: MemoryRead

    def biased_score(self, bias: Float[Tensor, " heads"]) -> Float[Tensor, "lanes heads tokens"]:
        """Return the score with which memory as a whole stands beside the local scores, in float32."""
        return (self.logsumexp + bias.float()[:, None]).clamp_min(NO_MEMORY)

    def beside_null(self, null: Float[Tensor, " heads"]) -> "Retrieved":
        """Return what counts beside a null slot of this score, which has no value and leaves its share to the local context.

        With retrieved scores m_k, memory counts `sum exp(m_k)` times its share of the softmax over the m_k and the null score.
        """
        share = nn.functional.logsigmoid(self.logsumexp - null.float()[:, None])
        return Retrieved(self.output, (self.logsumexp + share).clamp_min(NO_MEMORY), self.read)

    def except_at(self, places: Bool[Tensor, "lanes tokens"]) -> "Retrieved":
        """Return the same, but that the tokens at these places found nothing."""
        read, places = self.read, places[:, None]
        chunks = places[..., None]
        rows, weights = read.rows.masked_fill(chunks, -1), read.chunk_weights.masked_fill(chunks, 0)
        read = dataclasses.replace(read, rows=rows, chunk_weights=weights)
        return Retrieved(self.output, self.logsumexp.masked_fill(places, NO_MEMORY), read)

    def of_heads(self, heads: Int[Tensor, " reading"], num_heads: int) -> "Retrieved":
        """Return the same for all query heads of a layer, of which only `heads` have read; the others found nothing."""
        logsumexp = spread(self.logsumexp, heads, num_heads, NO_MEMORY)
        read = dataclasses.replace(self.read, heads=heads)
        return Retrieved(spread(self.output, heads, num_heads, 0), logsumexp, read)


def spread(
    part: Shaped[Tensor, "lanes reading *rest"], heads: Int[Tensor, " reading"], num_heads: int, fill: float
) -> Shaped[Tensor, "lanes heads *rest"]:
    """Return what some heads have for all heads of a layer, the others of which have `fill`."""
    whole = part.new_full((part.shape[0], num_heads, *part.shape[2:]), fill)
    return whole.index_copy(1, heads, part)


def sees_itself_alone(
    queries: Float[Tensor, "lanes heads tokens dim"],
    keys: Float[Tensor, "lanes kv_heads keys dim"],
    attention_mask: Any,
) -> Bool[Tensor, "lanes tokens"]:
    """Return which tokens have no other in their local context: the first of each text, behind padding too.

    `attention_mask` as attention functions get it: None where they are causal by position, else of two axes (1 for tokens) or
    of four (booleans, or what is added to scores).
    """
    lanes, tokens = queries.shape[0], queries.shape[2]
    if not isinstance(attention_mask, Tensor):
        return (torch.arange(tokens, device=queries.device) + keys.shape[2] == tokens).expand(lanes, -1)
    if attention_mask.ndim == 2:
        seen = attention_mask.bool().cumsum(dim=-1)[:, -tokens:]
    else:
        is_flag = attention_mask.dtype == torch.bool
        visible = attention_mask if is_flag else attention_mask > torch.finfo(attention_mask.dtype).min / 2
        seen = visible[:, 0].sum(dim=-1)
    return (seen <= 1).expand(lanes, -1)


def choosers(queries: Float[Tensor, "kv_heads queries dim"], shared: int) -> Float[Tensor, "kv_heads choices dim"]:
    """Return by what chunks are chosen: each query, or the mean of so many that stand side by side."""
    return queries if shared == 1 else queries.unflatten(1, (-1, shared)).float().mean(dim=2)


def beside_queries(
    chosen: Shaped[Tensor, "kv_heads choices *rest"], queries: Float[Tensor, "kv_heads queries dim"]
) -> Shaped[Tensor, "kv_heads queries *rest"]:
    """Return for each query what goes with its choice; the queries that share one stand side by side."""
    shared = queries.shape[1] // max(1, chosen.shape[1])
    return chosen if shared == 1 else chosen.repeat_interleave(shared, dim=1)


def beside_all_queries(found: Found, queries: Float[Tensor, "kv_heads queries dim"]) -> Found:
    """Return what was found, for each query and not for each choice."""
    parts = {name: getattr(found, name) for name in ("rows", "scores", "log_weights", "sizes")}
    spread = {name: beside_queries(part, queries) for name, part in parts.items() if part is not None}
    return found._replace(**spread)


def attend_block(
    queries: Float[Tensor, "kv_heads queries dim"],
    keys: Float[Tensor, "kv_heads choices retrieved dim"],
    values: Float[Tensor, "kv_heads choices retrieved value_dim"],
    missing: Bool[Tensor, "kv_heads choices retrieved"],
    scaling: float,
    softcap: float | None = None,
    log_weights: Float[Tensor, "kv_heads choices retrieved"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp and weights of each query's attention over what was retrieved for it, in float32.

    Queries that share a choice stand side by side. `missing`: no token was found here. `log_weights`: added to the scores,
    and not capped with them.
    """
    sharing = queries.unflatten(1, (keys.shape[1], -1))
    scores = (sharing @ keys.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if log_weights is not None:
        scores = scores + log_weights.unsqueeze(2)
    missing = missing.unsqueeze(2)
    scores = scores.masked_fill(missing, -torch.inf)
    logsumexp = scores.logsumexp(dim=-1).clamp_min(NO_MEMORY)
    # The softmax over nothing is NaN, which is replaced whole, in gradients too.
    weights = scores.softmax(dim=-1).masked_fill(missing, 0.0)
    output = (weights.to(values.dtype) @ values).flatten(1, 2).float()
    return output, logsumexp.flatten(1), weights.flatten(1, 2)


@dataclasses.dataclass
class GroupRead:
    """What the lanes that share one memory read, with all their queries in one axis (`fold_groups`)."""

    output: Float[Tensor, "kv_heads queries dim"]
    logsumexp: Float[Tensor, "kv_heads queries"]
    chunk_weights: Float[Tensor, "kv_heads queries chunks"]
    found: Found  # of each choice; one choice may be of several queries


def read_memory(
    queries: Float[Tensor, "lanes heads tokens dim"],
    memory: Sequence[Memory],
    layer: int,
    *,
    num_kv_heads: int,
    num_chunks: int,
    scaling: float,
    softcap: float | None = None,
    choice_per: Literal["head", "group"] = "head",
    found: Sequence[Found] = (),
) -> Retrieved:
    """Return each query's attention over the `num_chunks` chunks whose search keys have the largest inner product with it.

    Where a bank has an age prior, log w(age) counts in the choice of chunks and in the softmax over their tokens.
    Query heads of one group search the index of their key-value head (LongMem, token-to-chunk retrieval, per head), each by
    itself or all together, by their mean query. Lanes that share a bank are searched together. Gradients reach the queries;
    what is stored has none.

    Args:
        queries: position-treated queries, not yet scaled.
        memory: one bank for each lane; the same object may stand in several lanes.
        layer: the memory layer to read.
        scaling: factor on the scores before their softmax.
        softcap: bound of the scores, for models that have one.
        choice_per: whether each query head chooses chunks, or the query heads of a key-value head together.
        found: of an earlier call with the same memory (`MemoryRead.found`), to read that instead of searching.

    Raises:
        ChangedMemoryError: what was found before is no longer there, or a memory changes faster than it can be read.
    """
    lanes, heads, tokens, _ = queries.shape
    groups, shared = lanes_by_memory(memory), heads // num_kv_heads if choice_per == "group" else 1
    reads = []
    for number, (bank, own) in enumerate(groups):
        folded = fold_groups(queries if len(own) == lanes else queries[own], num_kv_heads, shared)
        if found:
            reads.append(_read_again(folded, found[number], bank, layer, scaling, softcap))
        else:
            reads.append(search_and_attend(folded, bank, layer, num_chunks, scaling, softcap, shared))

    def unfold(parts: Iterable[Tensor]) -> Tensor:
        sizes = [len(own) for _, own in groups]
        unfolded = [unfold_groups(part, size, heads, tokens, shared) for part, size in zip(parts, sizes, strict=True)]
        if len(unfolded) == 1:
            return unfolded[0]
        order = [lane for _, own in groups for lane in own]  # from groups, in the order of memories, back to lanes
        return torch.cat(unfolded)[sorted(range(lanes), key=order.__getitem__)]

    ages: Tensor | None = None
    if any(read.found.log_weights is not None for read in reads):
        ages = unfold(
            torch.zeros_like(read.chunk_weights)
            if read.found.log_weights is None
            else beside_queries(read.found.log_weights, read.output)
            for read in reads
        )
    memory_read = MemoryRead(
        layer,
        rows=unfold(beside_queries(read.found.rows, read.output) for read in reads),
        chunk_weights=unfold(read.chunk_weights for read in reads).detach(),
        log_weights=ages,
        found=tuple(read.found for read in reads),
    )
    output, logsumexp = unfold(read.output for read in reads), unfold(read.logsumexp for read in reads)
    return Retrieved(output, logsumexp, memory_read)


def lanes_by_memory(memory: Sequence[Memory]) -> list[tuple[Memory, list[int]]]:
    """Return each memory once, with the lanes that read it."""
    groups: dict[int, tuple[Memory, list[int]]] = {}
    for lane, bank in enumerate(memory):
        groups.setdefault(id(bank), (bank, []))[1].append(lane)
    return list(groups.values())


def search_and_attend(
    queries: Float[Tensor, "kv_heads queries dim"],
    memory: Memory,
    layer: int,
    num_chunks: int,
    scaling: float,
    softcap: float | None,
    shared: int = 1,
) -> GroupRead:
    """Return the queries' attention over what a memory holds; search and reading are of one state of it.

    Where somebody else changes the memory between the two, both are done again. `shared`: as many queries, side by side, choose
    together.
    """
    # A bank is asked first: whether something has a method it does not have takes Python long to say.
    if not isinstance(memory, MemoryBank) and isinstance(memory, AttendingMemory):
        return _attend_there(queries, memory, memory, layer, num_chunks, scaling, softcap, shared)
    searched = choosers(queries.detach(), shared)
    for _ in range(ATTEMPTS_TO_READ):
        found = memory.search(layer, searched, num_chunks, scaling=scaling)
        rows = found.rows.to(queries.device)
        try:
            # The search has the queries as they are. Here they take the dtype of products, and stored keys follow them: under
            # autocast, queries in float32 would have every key converted to it.
            meeting = queries.to(product_dtype(queries))
            return attend_found(meeting, found._replace(rows=rows), memory, layer, scaling, softcap)
        except ChangedMemoryError:
            continue
    raise ChangedMemoryError


def _attend_there(
    queries: Float[Tensor, "kv_heads queries dim"],
    there: AttendingMemory,
    memory: Memory,
    layer: int,
    num_chunks: int,
    scaling: float,
    softcap: float | None,
    shared: int,
) -> GroupRead:
    """Return what a memory has computed where it is; in a backward pass keys and values of what was found are fetched."""
    dtype = product_dtype(queries)
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "dtype": dtype, "shared": shared}
    attended = there.attend(layer, queries.detach(), num_chunks, **options)
    if attended is None:
        return nothing_found(queries, num_chunks)
    return _with_gradients(GroupRead(*attended), queries, memory, layer, scaling, softcap)


def _read_again(
    queries: Float[Tensor, "kv_heads queries dim"],
    found: Found,
    memory: Memory,
    layer: int,
    scaling: float,
    softcap: float | None,
) -> GroupRead:
    """Return the attention over what was found before, recorded for a backward pass as the first time."""
    if not isinstance(memory, AttendingMemory):
        return attend_found(queries.to(product_dtype(queries)), found, memory, layer, scaling, softcap)
    with torch.no_grad():
        read = attend_found(queries.to(product_dtype(queries)), found, memory, layer, scaling, softcap)
    return _with_gradients(read, queries, memory, layer, scaling, softcap)


def _with_gradients(
    read: GroupRead,
    queries: Float[Tensor, "kv_heads queries dim"],
    memory: Memory,
    layer: int,
    scaling: float,
    softcap: float | None,
) -> GroupRead:
    """Return a read that was computed elsewhere; its gradients are those of computing it here, from keys that are fetched."""
    if not (torch.is_grad_enabled() and queries.requires_grad) or read.found.generation is None:
        return read
    dtype = product_dtype(queries)

    def again(own: Tensor) -> tuple[Tensor, Tensor]:
        computed = attend_found(own.to(dtype), read.found, memory, layer, scaling, softcap)
        return computed.output, computed.logsumexp

    output, logsumexp = _ComputedThere.apply(queries, read.output, read.logsumexp, again)
    return dataclasses.replace(read, output=output, logsumexp=logsumexp)


class _ComputedThere(torch.autograd.Function):
    """Results that came from elsewhere, whose gradients are those of computing them here."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, output: Tensor, logsumexp: Tensor, again: Callable[..., Any]) -> Any:
        ctx.save_for_backward(queries)
        ctx.again = again
        return output.clone(), logsumexp.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (queries,) = ctx.saved_tensors
        with torch.enable_grad():
            own = queries.detach().requires_grad_()
            results = ctx.again(own)
        return (*torch.autograd.grad(results, own, gradients), None, None, None)


def nothing_found(queries: Float[Tensor, "kv_heads queries dim"], num_chunks: int) -> GroupRead:
    """Return what is read of a memory that holds nothing."""
    rows = torch.full((*queries.shape[:2], num_chunks), -1, device=queries.device)
    weights = torch.zeros_like(rows, dtype=torch.float32)
    return GroupRead(
        torch.zeros_like(queries, dtype=torch.float32),
        queries.new_full(rows.shape[:2], NO_MEMORY, dtype=torch.float32),
        weights,
        Found(rows, torch.full_like(weights, -torch.inf), None, None),
    )


def product_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype in which products of these states are computed: that of autocast where it is on, else their own.

    Under autocast queries and keys are float32, because rotary embeddings turn them in that.
    """
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def attend_found(
    queries: Float[Tensor, "kv_heads queries dim"],
    found: Found,
    memory: Memory,
    layer: int,
    scaling: float,
    softcap: float | None,
) -> GroupRead:
    """Return the queries' attention over the chunks that were found for them, block by block.

    Under autograd a block's keys are gathered again in the backward pass instead of being kept (hundreds of MB a layer),
    so the memory must not have moved, overwritten or encoded again rows in between: `gather` sees to that.
    """
    if found.generation is None:
        return nothing_found(queries, found.rows.shape[2])
    needs_grad = torch.is_grad_enabled() and queries.requires_grad
    fuses = not needs_grad and reads_fused(queries) and isinstance(memory, MemoryBank | BankView)
    stored = memory.stored(layer, found.generation) if fuses else None  # type: ignore[attr-defined]
    if stored is not None:
        from longmem.model.fused_read import attend_rows

        (keys, values), own = stored, beside_all_queries(found, queries)
        read = attend_rows(queries, keys, values, own.rows, own.sizes, own.log_weights, scaling, softcap, NO_MEMORY)
        return GroupRead(*read, found)

    def block(
        some_queries: Tensor, some_rows: Tensor, some_weights: Tensor | None, some_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        kv_heads, count, chunks = some_rows.shape
        keys, values = memory.gather(layer, some_rows.clamp_min(0).flatten(1), found.generation)
        keys, values = (part.to(some_queries).unflatten(1, (count, chunks)).flatten(2, 3) for part in (keys, values))
        size = keys.shape[2] // chunks
        missing = tokens_missing(some_rows, some_sizes, size)
        if some_weights is not None:
            some_weights = some_weights.repeat_interleave(size, dim=-1)
        output, logsumexp, weights = attend_block(some_queries, keys, values, missing, scaling, softcap, some_weights)
        return output, logsumexp, weights.unflatten(-1, (chunks, -1)).sum(-1)

    results = []
    # Split, not sliced: the gradient of each slice would be a tensor of zeros as large as all queries.
    choices = (found.rows, found.log_weights, found.sizes)
    shared = queries.shape[1] // max(1, found.rows.shape[1])
    blocks = [queries.split(QUERY_BLOCK * shared, dim=1)]
    blocks += (itertools.repeat(None) if part is None else part.split(QUERY_BLOCK, dim=1) for part in choices)
    for arguments in zip(*blocks, strict=False):  # the queries say how many there are
        if needs_grad:
            results.append(checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(block(*arguments))
    output, logsumexp, weights = (joined(column, dim=1) for column in zip(*results, strict=True))
    return GroupRead(output, logsumexp, weights, found)


def reads_fused(queries: Tensor) -> bool:
    """Return whether a Triton kernel is to read these queries' chunks where they are stored: on a GPU, and only when asked."""
    return queries.is_cuda and os.environ.get("LONGMEM_FUSED_READ") == "1"


def tokens_missing(
    rows: Int[Tensor, "kv_heads queries chunks"], sizes: Int[Tensor, "kv_heads queries chunks"] | None, chunk_size: int
) -> Bool[Tensor, "kv_heads queries retrieved"]:
    """Return which tokens of the chunks are not there: those of missing rows, and what fills up a shorter chunk."""
    missing = rows < 0
    if sizes is None:
        return missing if chunk_size == 1 else missing.repeat_interleave(chunk_size, dim=-1)
    there = sizes.masked_fill(missing, 0).unsqueeze(-1)
    return (torch.arange(chunk_size, device=sizes.device) >= there).flatten(2)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return parts one behind the other; one alone as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def fold_groups(
    states: Shaped[Tensor, "lanes heads tokens dim"], num_kv_heads: int, shared: int = 1
) -> Shaped[Tensor, "kv_heads queries dim"]:
    """Return the states with lanes, the query heads of a group and tokens in one axis, one row of work per key-value head.

    As many heads of a group as are `shared`, 1 or all, stand side by side.
    """
    grouped = states.unflatten(1, (num_kv_heads, -1)).transpose(0, 1)
    return (grouped if shared == 1 else grouped.transpose(2, 3)).flatten(1, 3)


def unfold_groups(states: Tensor, lanes: int, heads: int, tokens: int, shared: int = 1) -> Tensor:
    """Return what `fold_groups` folded, `lanes heads tokens ...`, with any trailing axes."""
    group = heads // states.shape[0]
    if shared == 1:
        grouped = states.unflatten(1, (lanes, group, tokens))
    else:
        grouped = states.unflatten(1, (lanes, tokens, group)).transpose(2, 3)
    return grouped.transpose(0, 1).flatten(1, 2)


def fuse_gated(
    local_output: Float[Tensor, "lanes tokens heads dim"], retrieved: Retrieved, gate: Float[Tensor, " heads"]
) -> Float[Tensor, "lanes tokens heads dim"]:
    """Return `(1 - sigmoid(g)) local + sigmoid(g) retrieved` per head; where nothing was found, the local output alone."""
    share = torch.sigmoid(gate.float())[:, None] * (retrieved.logsumexp > NO_MEMORY)
    retrieved.read.memory_share = share.detach()
    share = share.transpose(1, 2).unsqueeze(-1)
    mixed = (1 - share) * local_output.float() + share * retrieved.output.transpose(1, 2)
    return mixed.to(local_output.dtype)


def fuse_joint(
    local: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Float[Tensor, "lanes heads tokens dim"],
    key: Float[Tensor, "lanes kv_heads keys dim"],
    value: Float[Tensor, "lanes kv_heads keys value_dim"],
    attention_mask: Tensor | None,
    retrieved: Retrieved,
    bias: Float[Tensor, " heads"],
    scaling: float,
    **kwargs: Any,
) -> Float[Tensor, "lanes tokens heads value_dim"]:
    """Return one softmax over local and retrieved tokens, computed by the backbone's own attention function.

    One key is put before the local ones. Extra dimensions of query and key make its score the retrieved log-sum-exp plus the
    bias; an extra dimension of its value makes its weight, the memory share, readable in the output. Half precision carries
    that score in two parts, so that it is not rounded. Without a mask the function is causal by position, and a dummy
    query before the others keeps query and key aligned.
    """
    score = retrieved.biased_score(bias) / scaling
    dtype = product_dtype(query)
    coarse = score.to(dtype)
    fine = (score - coarse.float()).to(dtype)
    width, value_width = 8 - query.shape[-1] % 8, 8 - value.shape[-1] % 8  # GPU kernels want multiples of 8
    width = width if width > 1 else width + 8
    extra_query = torch.stack([coarse, fine], dim=-1)
    query_and_score = torch.cat([query, nn.functional.pad(extra_query, (0, width - 2))], dim=-1)
    keys, values = (nn.functional.pad(states, (0, more, 1, 0)) for states, more in ((key, width), (value, value_width)))
    keys[:, :, 0, key.shape[-1] : key.shape[-1] + 2] = 1
    values[:, :, 0, value.shape[-1]] = 1
    is_causal_by_position = attention_mask is None and query.shape[2] > 1
    if is_causal_by_position:
        query_and_score = nn.functional.pad(query_and_score, (0, 0, 1, 0))
    elif attention_mask is not None:
        visible = attention_mask.new_ones if attention_mask.dtype == torch.bool else attention_mask.new_zeros
        attention_mask = torch.cat([visible(*attention_mask.shape[:-1], 1), attention_mask], dim=-1)
    output, _ = local(module, query_and_score, keys, values, attention_mask, scaling=scaling, **kwargs)
    output = output[:, int(is_causal_by_position) :]
    share = output[..., value.shape[-1] : value.shape[-1] + 1]
    retrieved.read.memory_share = share.detach().squeeze(-1).transpose(1, 2)
    return output[..., : value.shape[-1]] + share * retrieved.output.transpose(1, 2).to(output.dtype)


def fuse_joint_plain(
    query: Float[Tensor, "lanes heads tokens dim"],
    key: Float[Tensor, "lanes kv_heads keys dim"],
    value: Float[Tensor, "lanes kv_heads keys value_dim"],
    attention_mask: Tensor | None,
    retrieved: Retrieved,
    bias: Float[Tensor, " heads"],
    scaling: float,
    softcap: float | None = None,
) -> Float[Tensor, "lanes tokens heads value_dim"]:
    """Return the same as `fuse_joint` with every score written out: the reference, and the way for soft-capped scores."""
    group = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None:
        offset = key.shape[2] - query.shape[2]
        visible = torch.ones_like(scores[0, 0], dtype=torch.bool).tril(offset)
        scores = scores.masked_fill(~visible, float("-inf"))
    elif attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask.float()
    memory_score = retrieved.biased_score(bias).unsqueeze(-1)
    weights = torch.softmax(torch.cat([memory_score, scores], dim=-1), dim=-1)
    share = weights[..., :1]
    retrieved.read.memory_share = share.detach().squeeze(-1)
    output = weights[..., 1:].to(value.dtype) @ value + (share * retrieved.output).to(value.dtype)
    return output.transpose(1, 2)
