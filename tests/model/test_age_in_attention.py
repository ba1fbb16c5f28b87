"""Age in attention: log w(age) is added to the scores of what is read, in the choice of chunks and in the softmax."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import longmem.model.attention as attention
from longmem import LongMemForCausalLM
from longmem.memory import AgePrior, MemoryBank
from longmem.model.attention import NO_MEMORY, attend_block, fuse_gated, fuse_joint, fuse_joint_plain, read_memory
from longmem.model.index_queries import QueryRecorder

LANES, HEADS, KV_HEADS, TOKENS, DIM, LAYER, SCALING = 2, 4, 2, 5, 6, 7, 0.4
GROUP, DAY = HEADS // KV_HEADS, 86_400.0
SETTINGS = dict(segment_length=32, num_retrieved_tokens=16, memory_distance=8)


def dated_bank(prior, days=(0, 2, 5)):
    torch.manual_seed(0)
    bank = MemoryBank(memory_layers=[LAYER], chunk_size=4, storage_dtype="float32", age_prior=prior)
    for day in days:
        name = f"{len(bank.documents())}"
        bank.add(name, *([torch.randn(KV_HEADS, 24, DIM)] for _ in range(2)), dated=day * DAY)
    return bank


@pytest.fixture
def qkv():
    torch.manual_seed(9)
    shapes = [(LANES, HEADS, TOKENS, DIM), (LANES, KV_HEADS, TOKENS, DIM), (LANES, KV_HEADS, TOKENS, DIM)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


class Attention(nn.Module):
    num_key_value_groups = GROUP
    is_causal = True


def read(query, banks, **changes):
    return read_memory(query, banks, LAYER, **dict(num_kv_heads=KV_HEADS, num_chunks=3, scaling=SCALING) | changes)


def naive(query, bank, ages, prior, softcap=None):
    """One query head at a time, straight from the definition: all chunks, their bonus, the best, one softmax."""
    keys, values = bank.gather(LAYER, torch.arange(bank.num_chunks).expand(KV_HEADS, -1), bank.generation)
    logs = torch.tensor(
        [prior.log_weight(ages[place.document_id]) for place in bank.locate(torch.arange(len(keys[0])))]
    )
    outputs, sums = torch.empty_like(query), torch.empty(query.shape[:2])
    for head in range(HEADS):
        for token in range(query.shape[1]):
            own, one_query = keys[head // GROUP], query[head, token]
            best = (own.mean(1) @ one_query * SCALING + logs).topk(3).indices
            scores = own[best] @ one_query * SCALING
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            scores = (scores + logs[best, None]).flatten()
            sums[head, token] = scores.logsumexp(0)
            outputs[head, token] = scores.softmax(0) @ values[head // GROUP, best].flatten(0, 1)
    return outputs, sums


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("prior", [AgePrior("exp", a=0.4), AgePrior("poly", a=1), AgePrior("hinge", a=2, b=1)])
def test_reading_equals_the_definition_and_differs_from_reading_without_age(qkv, prior, softcap):
    query, bank, plain = qkv[0], dated_bank(prior), dated_bank(None)
    found, without = read(query, [bank, plain], softcap=softcap), read(query, [plain, plain], softcap=softcap)
    output, sums = naive(query[0].detach(), bank, {"0": 5, "1": 3, "2": 0}, prior, softcap)
    torch.testing.assert_close(found.output[0], output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logsumexp[0], sums, rtol=1e-5, atol=1e-5)
    assert (found.output[0] - without.output[0]).abs().max() > 1e-2
    assert torch.equal(found.output[1], without.output[1])  # the bank of the other lane has no prior
    assert found.read.log_weights.shape == found.read.rows.shape
    assert without.read.log_weights is None


def test_one_age_for_all_changes_no_bit(qkv):
    prior = AgePrior("exp", a=3)
    for days, is_same in (((4, 4, 4), True), ((4, 4, 3), False)):
        with_prior, without = read(qkv[0], [dated_bank(prior, days)] * 2), read(qkv[0], [dated_bank(None, days)] * 2)
        assert torch.equal(with_prior.output, without.output) == is_same
        assert torch.equal(with_prior.logsumexp, without.logsumexp) == is_same
        assert torch.equal(with_prior.read.rows, without.read.rows) == is_same


@pytest.mark.parametrize("fusion", ["joint", "gated"])
def test_fused_attention_with_age_equals_its_plain_twin_with_all_gradients(qkv, fusion, monkeypatch):
    """The plain twin keeps the whole graph; the fast path reads in blocks, twice."""
    query, key, value = qkv
    bank, bias = dated_bank(AgePrior("exp", a=0.4)), torch.randn(HEADS, requires_grad=True)
    results = []
    for block_size in (256, 2):
        monkeypatch.setattr(attention, "QUERY_BLOCK", block_size)
        found = read(query, [bank, bank])
        if fusion == "gated":
            local = sdpa_attention_forward(Attention(), query, key, value, None, scaling=SCALING, is_causal=True)[0]
            output = fuse_gated(local, found, bias)
        elif block_size == 2:
            output = fuse_joint(sdpa_attention_forward, Attention(), query, key, value, None, found, bias, SCALING)
        else:
            output = fuse_joint_plain(query, key, value, None, found, bias, SCALING)
        results.append([output, *torch.autograd.grad(output.sin().sum(), [*qkv, bias])])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    # The gradient of the queries is that of the definition.
    one = query[0].detach().requires_grad_()
    output, _ = naive(one, bank, {"0": 5, "1": 3, "2": 0}, AgePrior("exp", a=0.4))
    (expected,) = torch.autograd.grad(output.sin().sum(), one)
    (gradient,) = torch.autograd.grad(read(query, [bank, bank]).output[0].sin().sum(), query)
    torch.testing.assert_close(gradient[0], expected, rtol=1e-4, atol=1e-5)


def test_the_backward_pass_weighs_as_the_forward_pass_did(qkv):
    """A change of dates in between moves no row, so it is not refused, and must not be half seen."""
    gradients = []
    for changes in (False, True):
        bank = dated_bank(AgePrior("exp", a=0.4))
        output = read(qkv[0], [bank, bank]).output
        if changes:
            bank.supersede("2")
            bank.use_age_prior("exp:a=5")
        gradients.append(torch.autograd.grad(output.sin().sum(), qkv[0])[0])
    assert torch.equal(*gradients)
    assert (read(qkv[0], [bank, bank]).output - output).abs().max() > 1e-2


def test_what_weighs_nothing_makes_no_nan():
    torch.manual_seed(1)
    queries, keys, values = torch.randn(1, 2, 4), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    missing = torch.tensor([[[False, False, True], [True, True, True]]])
    old = torch.full((1, 2, 3), -1e7)
    output, logsumexp, weights = attend_block(queries, keys, values, missing, SCALING, None, old)
    assert output.isfinite().all()
    assert weights[0, 0, 2] == 0
    torch.testing.assert_close(weights[0].sum(-1), torch.tensor([1.0, 0.0]))
    assert logsumexp.tolist() == [[NO_MEMORY, NO_MEMORY]]


@pytest.mark.parametrize("fusion", ["joint", "gated"])
def test_a_bank_in_which_all_is_hidden_is_no_memory(llama, document, input_ids, fusion):
    model = LongMemForCausalLM.from_backbone(llama, fusion=fusion, **SETTINGS).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, "a", dated=0)
    without, with_memory = model(input_ids).logits, model(input_ids, memory=bank).logits
    assert (with_memory - without).abs().max() > 1e-3
    bank.supersede("a")
    hidden = model(input_ids, memory=bank, output_memory_reads=True)
    assert not bank.is_empty
    torch.testing.assert_close(hidden.logits, without, rtol=1e-5, atol=1e-5)
    for each in hidden.memory_reads:
        assert (each.rows == -1).all()
        assert each.memory_share.abs().max() == 0
    bank.restore("a")
    assert torch.equal(model(input_ids, memory=bank).logits, with_memory)


@pytest.mark.parametrize("fusion", ["joint", "gated"])
def test_a_model_reads_less_of_what_is_old_and_trains_with_it(llama, document, input_ids, fusion):
    model = LongMemForCausalLM.from_backbone(llama, fusion=fusion, **SETTINGS)
    bank = MemoryBank.for_model(model)
    for number, part in enumerate(document.split(50)):
        model.memorize(bank, part, f"{number}", dated=number * DAY)
    model.eval()
    plain = model(input_ids, memory=bank)
    bank.use_age_prior("exp:a=4")
    aged, recorder = model(input_ids, memory=bank, output_memory_reads=True), QueryRecorder(bank)
    assert (aged.logits - plain.logits).abs().max() > 1e-3
    # What records queries passes age on, and so do views and shards.
    assert torch.equal(model(input_ids, memory=recorder).logits, aged.logits)
    assert torch.equal(model(input_ids, memory=bank.select(["0", "1", "2"])).logits, aged.logits)
    newest = {place.document_id for each in aged.memory_reads for place in bank.locate(each.rows) if place}
    assert "2" in newest
    losses = []
    for checkpointing in (False, True):
        (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
        model.train()
        model.zero_grad()
        model(input_ids, memory=bank, labels=input_ids).loss.backward()
        losses.append([each.grad for each in model.side_network.parameters() if each.grad is not None])
    for kept, recomputed in zip(*losses, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=1e-4, atol=1e-6)


def test_memorize_dates_new_documents_alone(llama, document):
    model = LongMemForCausalLM.from_backbone(llama, **SETTINGS).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, "a", dated=5, valid_until=4e9, tags=["x"])
    info = bank.info("a")
    assert (info.dated, info.valid_until) == (5, 4e9)
    with pytest.raises(ValueError, match="`dated` must be left out with `append`, got 6"):
        model.memorize(bank, document, "a", append=True, dated=6)
    assert bank.info("a").num_tokens == len(document)
    encoded = model.memorize(bank, document, "b", reuse=(bank, "a"), dated=7, tags=["y"]).num_encoded
    assert encoded < len(document)  # its first windows were copied
    assert (bank.info("b").dated, bank.info("b").tags) == (7, ("y",))
    bank.update("a", document.flip(0), model=model)
    assert (bank.info("a").dated, bank.info("a").valid_until, bank.info("a").tags) == (5, 4e9, ("x",))
