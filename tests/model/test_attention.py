"""The maths of reading memory: fast against plain, values and all gradients."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import longmem.model.attention as attention
from longmem.memory import MemoryBank
from longmem.model.attention import NO_MEMORY, attend_block, fuse_gated, fuse_joint, fuse_joint_plain, read_memory

LANES, HEADS, KV_HEADS, TOKENS, DIM, LAYER = 2, 4, 2, 5, 6, 7


@pytest.fixture
def banks():
    made = []
    for seed in range(LANES):
        torch.manual_seed(seed)
        bank = MemoryBank(memory_layers=[LAYER], chunk_size=4, storage_dtype="float32")
        bank.add("a", [torch.randn(KV_HEADS, 40, DIM)], [torch.randn(KV_HEADS, 40, DIM)])
        made.append(bank)
    return made


@pytest.fixture
def qkv():
    torch.manual_seed(9)
    shapes = [(LANES, HEADS, TOKENS, DIM), (LANES, KV_HEADS, TOKENS, DIM), (LANES, KV_HEADS, TOKENS, DIM)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


class Attention(nn.Module):
    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


def read(query, banks, **changes):
    options = dict(num_kv_heads=KV_HEADS, num_chunks=3, scaling=0.4) | changes
    return read_memory(query, banks, LAYER, **options)


def naive_read(query, bank, num_chunks=3, scaling=0.4, choice_per="head"):
    """One query head at a time, straight from the definition."""
    keys, values = bank.gather(LAYER, torch.arange(bank.num_chunks).expand(KV_HEADS, -1), bank.generation)
    outputs, sums = torch.empty_like(query), torch.empty(query.shape[:2])
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        for token in range(TOKENS):
            size = HEADS // KV_HEADS
            chooser = (
                query[group * size : (group + 1) * size, token].mean(0) if choice_per == "group" else query[head, token]
            )
            best = (keys[group].mean(1) @ chooser.detach()).topk(num_chunks).indices
            scores = keys[group, best].flatten(0, 1) @ query[head, token] * scaling
            sums[head, token] = scores.logsumexp(0)
            outputs[head, token] = scores.softmax(0) @ values[group, best].flatten(0, 1)
    return outputs, sums


@pytest.mark.parametrize("choice_per", ["head", "group"])
def test_heads_read_the_chunks_that_they_choose_alone_or_as_a_group(banks, qkv, choice_per):
    found = read(qkv[0], banks, choice_per=choice_per)
    for lane, bank in enumerate(banks):
        output, sums = naive_read(qkv[0][lane], bank, choice_per=choice_per)
        torch.testing.assert_close(found.output[lane], output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.logsumexp[lane], sums, rtol=1e-5, atol=1e-5)
        for result, expected in ((found.output[lane], output), (found.logsumexp[lane], sums)):
            gradients = [
                torch.autograd.grad(each.sin().sum(), qkv[0], retain_graph=True)[0] for each in (result, expected)
            ]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.read.chunk_weights.sum(-1), torch.ones(LANES, HEADS, TOKENS))
    rows = found.read.rows.unflatten(1, (KV_HEADS, -1))
    assert (choice_per == "group") == bool((rows == rows[:, :, :1]).all())


@pytest.mark.parametrize("options", [{}, {"choice_per": "group"}])
def test_what_was_found_is_read_again_as_it_was(banks, qkv, options):
    first = read(qkv[0], banks, **options)
    again = read(qkv[0], banks, found=first.read.found, **options)
    assert torch.equal(first.output, again.output)
    assert torch.equal(first.read.rows, again.read.rows)


def test_lanes_that_share_a_bank_are_read_as_alone(banks, qkv):
    shared = read(qkv[0], [banks[1], banks[1]])
    alone = read(qkv[0][:1], [banks[1]])
    torch.testing.assert_close(shared.output[:1], alone.output, rtol=1e-6, atol=1e-6)
    mixed = read(qkv[0], banks)
    assert (mixed.output[0] - shared.output[0]).abs().max() > 1e-2  # another bank is another memory
    torch.testing.assert_close(mixed.output[1], shared.output[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("choice_per", ["head", "group"])
def test_blocks_do_not_matter(banks, qkv, monkeypatch, choice_per):
    whole = read(qkv[0], banks, choice_per=choice_per)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 2)
    parts = read(qkv[0], banks, choice_per=choice_per)
    torch.testing.assert_close(whole.output, parts.output, rtol=1e-6, atol=1e-6)
    (gradient_whole,) = torch.autograd.grad(whole.output.square().sum(), qkv[0])
    (gradient_parts,) = torch.autograd.grad(parts.output.square().sum(), qkv[0])
    torch.testing.assert_close(gradient_whole, gradient_parts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask_kind", ["none", "bool", "float", "cached"])
def test_fast_joint_attention_equals_the_plain_twin_with_all_gradients(banks, qkv, mask_kind):
    query, key, value = qkv
    if mask_kind == "cached":
        query = query[:, :, -1:]
    visible = torch.ones(LANES, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    visible[0, :, :, :2] = visible[0, :, :, :2] & torch.eye(TOKENS, dtype=torch.bool)[:, :2]  # left padding
    masks = {"none": None, "cached": None, "bool": visible, "float": (~visible).float() * torch.finfo().min}
    mask = masks[mask_kind]
    bias = torch.randn(HEADS, requires_grad=True)
    results = []
    for fuse in (
        lambda found: fuse_joint(sdpa_attention_forward, Attention(), query, key, value, mask, found, bias, 0.4),
        lambda found: fuse_joint_plain(query, key, value, mask, found, bias, 0.4),
    ):
        found = read(query, banks)
        output = fuse(found)
        gradients = torch.autograd.grad(output.sin().sum(), [*qkv, bias])
        results.append([output, found.read.memory_share, *gradients])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    assert results[0][-1].abs().max() > 1e-3  # the bias matters


def test_joint_attention_is_one_softmax(banks, qkv):
    """Against all scores in one row: local causal ones, then those of the retrieved tokens plus the bias."""
    query, key, value = (states.detach() for states in qkv)
    bias, group = torch.randn(HEADS), HEADS // KV_HEADS
    found = read(query, banks)
    output = fuse_joint(sdpa_attention_forward, Attention(), query, key, value, None, found, bias, 0.4)
    for lane, head, token in [(0, 0, 0), (1, 3, 4), (0, 2, 3)]:
        keys, values = banks[lane].gather(
            LAYER, found.read.rows[lane, head, token].expand(KV_HEADS, -1), banks[lane].generation
        )
        keys, values = keys[head // group].flatten(0, 1), values[head // group].flatten(0, 1)
        local_keys, local_values = key[lane, head // group, : token + 1], value[lane, head // group, : token + 1]
        one_query = query[lane, head, token]
        scores = torch.cat([local_keys @ one_query * 0.4, keys @ one_query * 0.4 + bias[head]])
        expected = scores.softmax(0) @ torch.cat([local_values, values])
        torch.testing.assert_close(output[lane, token, head], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_share_of_memory(banks, qkv, dtype):
    query, key, value = (states.detach() for states in qkv)
    bias = torch.full((HEADS,), -20.0)  # large scores: rounding one to bfloat16 would be off by a factor of e^0.06
    exact = fuse_joint_plain(query, key, value, None, full := read(query, banks), bias + 20, 0.4)
    output = fuse_joint(
        sdpa_attention_forward, Attention(), query.to(dtype), key.to(dtype), value.to(dtype), None, full, bias + 20, 0.4
    )
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), exact, rtol=0.03, atol=0.03)


def test_gated_attention_mixes_per_head(banks, qkv):
    found = read(qkv[0], banks)
    local = torch.randn(LANES, TOKENS, HEADS, DIM)
    gate = torch.tensor([-50.0, 0.0, 1.0, 50.0])
    output = fuse_gated(local, found, gate)
    memory = found.output.transpose(1, 2)
    torch.testing.assert_close(output[:, :, 0], local[:, :, 0])
    torch.testing.assert_close(output[:, :, 1], (local[:, :, 1] + memory[:, :, 1]) / 2)
    torch.testing.assert_close(output[:, :, 3], memory[:, :, 3])
    torch.testing.assert_close(found.read.memory_share[:, 2], torch.full((LANES, TOKENS), 0.7310586))


def test_an_empty_bank_beside_a_full_one_reads_nothing(banks, qkv):
    query, key, value = qkv
    found = read(query, [banks[0].empty_like(), banks[1]])
    assert (found.logsumexp[0] == NO_MEMORY).all()
    assert (found.read.rows[0] == -1).all()
    local, _ = sdpa_attention_forward(Attention(), query, key, value, None, scaling=0.4)
    for output in (
        fuse_joint(sdpa_attention_forward, Attention(), query, key, value, None, found, torch.zeros(HEADS), 0.4),
        fuse_joint_plain(query, key, value, None, found, torch.zeros(HEADS), 0.4),
        fuse_gated(local, found, torch.zeros(HEADS)),
    ):
        torch.testing.assert_close(output[0], local[0], rtol=1e-5, atol=1e-6)
        assert (output[1] - local[1]).abs().max() > 1e-2


def test_missing_slots_are_masked_not_zero_keys(banks, qkv):
    """Ten chunks are there: asking for twelve must be the same as asking for all ten."""
    few, many = read(qkv[0], banks, num_chunks=10), read(qkv[0], banks, num_chunks=12)
    torch.testing.assert_close(few.output, many.output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(few.logsumexp, many.logsumexp, rtol=1e-5, atol=1e-6)
    assert (many.read.rows[..., 10:] == -1).all()
    assert (many.read.chunk_weights[..., 10:] == 0).all()


def test_soft_capped_scores(qkv):
    keys, values = torch.randn(1, 3, 8, DIM) * 5, torch.randn(1, 3, 8, DIM)
    queries, missing = torch.randn(1, 3, DIM), torch.zeros(1, 3, 8, dtype=torch.bool)
    output, sums, _ = attend_block(queries, keys, values, missing, 1.0, softcap=2.0)
    scores = 2 * torch.tanh((keys @ queries.unsqueeze(-1)).squeeze(-1) / 2)
    torch.testing.assert_close(sums, scores.logsumexp(-1))
    torch.testing.assert_close(output, (scores.softmax(-1).unsqueeze(-2) @ values).squeeze(-2))
    assert (sums - attend_block(queries, keys, values, missing, 1.0)[1]).abs().max() > 1e-2


def test_writing_over_chunks_before_backward_is_refused(banks, qkv):
    output = read(qkv[0], banks).output
    banks[0].append("a", [torch.randn(KV_HEADS, 8, DIM)], [torch.randn(KV_HEADS, 8, DIM)])  # only adds: allowed
    torch.autograd.grad(output.sum(), qkv[0])
    output = read(qkv[0], banks).output
    banks[0].delete("a")
    with pytest.raises(RuntimeError, match="before writing to the bank"):
        torch.autograd.grad(output.sum(), qkv[0])


class NotingBank:
    """A bank that notes in which dtype it is asked, for all that reading needs."""

    def __init__(self, bank):
        self.bank, self.asked = bank, set()

    def search(self, layer, queries, num_chunks, *, scaling=None):
        self.asked.add(queries.dtype)
        return self.bank.search(layer, queries, num_chunks, scaling=scaling)

    def gather(self, layer, rows, generation):
        return self.bank.gather(layer, rows, generation)


def test_under_autocast_memory_is_read_in_its_dtype(banks, qkv, monkeypatch):
    """Rotary embeddings give float32 queries there; with them every gathered key would become float32."""
    noted = [NotingBank(bank) for bank in banks]
    met = set()

    def attend(queries, keys, values, *others):
        met.update((queries.dtype, keys.dtype, values.dtype))
        return attend_block(queries, keys, values, *others)

    monkeypatch.setattr(attention, "attend_block", attend)
    exact = read(qkv[0], noted)
    assert met == {torch.float32}
    met.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = read(qkv[0], noted)
    assert met == {torch.bfloat16}
    assert {bank_dtype for bank in noted for bank_dtype in bank.asked} == {torch.float32}
    assert torch.equal(found.read.rows, exact.read.rows)  # the search has the queries as they are
    assert found.output.dtype == found.logsumexp.dtype == torch.float32
    torch.testing.assert_close(found.output, exact.output, rtol=0.03, atol=0.03)
    torch.testing.assert_close(found.logsumexp, exact.logsumexp, rtol=0.03, atol=0.03)
    assert not torch.equal(found.output, exact.output)
    (gradient,) = torch.autograd.grad(found.output.sum(), qkv[0])
    (expected,) = torch.autograd.grad(exact.output.sum(), qkv[0])
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, expected, rtol=0.1, atol=0.1)


def test_autocast_keeps_the_share_of_memory(banks, qkv):
    """As in half precision, the score of memory comes in two parts: autocast would round a single one."""
    query, key, value = torch.full_like(qkv[0], 4.0), torch.full_like(qkv[1], 4.0), qkv[2].detach()
    found = read(qkv[0].detach(), banks)
    found.logsumexp = torch.full_like(found.logsumexp, 38.5)  # beside local scores of 38.4; one bfloat16 would be 38.4
    fuse_joint_plain(query, key, value, None, found, torch.zeros(HEADS), 0.4)
    exact = found.read.memory_share
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fuse_joint(sdpa_attention_forward, Attention(), query, key, value, None, found, torch.zeros(HEADS), 0.4)
    torch.testing.assert_close(found.read.memory_share.float(), exact, rtol=0.01, atol=0.0)
