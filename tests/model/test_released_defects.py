"""Defects of the released code (github.com/Victorwz/LongMem, commit b7f3c6b) that a user could meet: not here.

Numbers such as E3 are those of `docs/paper-differences.md`.
"""

import inspect

import pytest
import torch
from model.conftest import build_backbone

from longmem import LongMemConfig, LongMemForCausalLM, MemoryBank
from longmem.backbone.cache_names import cache_of

# The released form: ALiBi backbone, cross-network residual, gate.
RELEASED = dict(
    layer_reduction_factor=2, residual="paper", residual_states="post_norm", fusion="gated", final_norm="side"
)
SIZES = dict(side_layer_offset=1, memory_layers=[3], num_retrieved_tokens=8, segment_length=32)


@pytest.fixture
def model():
    return LongMemForCausalLM.from_backbone(build_backbone("newgpt"), **RELEASED, **SIZES).eval()


def tokens(count, seed=0):
    return torch.randint(2, 97, (count,), generator=torch.Generator().manual_seed(seed))


def remember(model, *lengths, **options):
    bank = MemoryBank.for_model(model, **options)
    for number, length in enumerate(lengths):
        model.memorize(bank, tokens(length, number), document_id=str(number))
    return bank


@torch.no_grad()
def test_search_works_on_the_cpu(model):  # E1
    bank = remember(model, 40)
    assert bank.device.type == "cpu"
    ids = tokens(12, 9)[None]
    assert (model(ids, memory=bank).logits - model(ids).logits).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*chunks were written at once")
@pytest.mark.parametrize("capacity", [4, 8, 32, 36])
@torch.no_grad()
def test_a_bank_may_be_smaller_than_two_segments_and_is_used_whole(model, capacity):  # E2
    bank = remember(model, 64, capacity_tokens=capacity)
    assert bank.num_tokens == capacity  # to the last slot
    assert model(tokens(8)[None], memory=bank).logits.isfinite().all()


@torch.no_grad()
def test_rows_and_index_agree_after_a_long_segment_follows_a_short_one(model):  # E3
    bank = remember(model, 16, 60, capacity_tokens=64)
    rows = torch.arange(bank.num_chunks).expand(4, -1)
    means = bank.gather(3, rows, bank.generation)[0].float().mean(2)
    found, scores, *_ = bank.search(3, means, 1)
    stored = means.gather(1, found.expand_as(means))  # what the rows that the index names hold
    torch.testing.assert_close(scores[..., 0], (means * stored).sum(-1), rtol=1e-2, atol=1e-2)
    assert bank.num_chunks == 16


@pytest.mark.parametrize("remembered", [0, 40])  # E4: a crash on an empty memory; E4b: NaN for the padded row
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(model, remembered, side):
    bank = remember(model, remembered) if remembered else MemoryBank.for_model(model)
    text, pads = tokens(9, 7), torch.ones(4, dtype=torch.long)
    row = torch.cat([pads, text] if side == "left" else [text, pads])
    ids, real = torch.stack([row, tokens(13, 8)]), torch.ones(2, 13, dtype=torch.long)
    real[0, :4] = real[0, :4] if side == "right" else 0
    real[0, 9:] = real[0, 9:] if side == "left" else 0
    logits = model(ids, attention_mask=real, memory=bank).logits
    assert logits.isfinite().all()
    alone = model(text[None], memory=bank).logits[0]
    torch.testing.assert_close(logits[0][real[0].bool()], alone, rtol=1e-4, atol=1e-4)


def test_no_padding_is_stored(model):  # E4c: windows of different lengths are never padded into one batch
    bank = MemoryBank.for_model(model)
    model.memorize(bank, tokens(75), document_id="a", batch_size=2)
    (info,) = bank.documents()
    assert (info.num_tokens, info.num_chunks, info.num_waiting_tokens) == (75, 19, 3)


@pytest.mark.parametrize(("wanted", "nearest"), [(10, 8), (2, 4)])  # E5, E5b: a shape error; an error of FAISS
def test_retrieved_tokens_that_are_no_multiple_of_a_chunk_are_refused_by_name(wanted, nearest):
    with pytest.raises(Exception, match=f"must be a multiple of `chunk_size`, got {wanted} and 4; {nearest} would do"):
        LongMemConfig(num_retrieved_tokens=wanted)


@torch.no_grad()
def test_the_model_works_without_any_memory(model):  # E6
    ids = tokens(12)[None]
    assert torch.equal(model(ids).logits, model(ids, memory=MemoryBank.for_model(model)).logits)


@pytest.mark.parametrize("layer", range(4))
@torch.no_grad()
def test_every_depth_can_be_read_and_none_is_ignored_in_silence(layer):  # E7
    model = LongMemForCausalLM.from_backbone(
        build_backbone("newgpt"), **RELEASED, **{**SIZES, "memory_layers": [layer]}
    )
    bank, ids = remember(model.eval(), 40), tokens(12, 9)[None]
    assert (model(ids, memory=bank).logits - model(ids).logits).abs().max() > 1e-3
    with pytest.raises(Exception, match=r"`memory_layers` must be .* below the backbone's 4 layers, got \[4\]"):
        LongMemForCausalLM.from_backbone(build_backbone("newgpt"), **RELEASED, **{**SIZES, "memory_layers": [4]})


@torch.no_grad()
def test_single_tokens_add_up_to_chunks(model):  # E8: pieces shorter than a chunk are lost
    whole, pieces = remember(model, 9), MemoryBank.for_model(model)
    (keys,), (values,) = model.encode(tokens(9)[None])
    for token in range(9):
        write = pieces.append if token else pieces.add
        write("0", [keys[0, :, token : token + 1]], [values[0, :, token : token + 1]])
    rows = torch.arange(2).expand(4, -1)
    assert pieces.num_chunks == whole.num_chunks == 3  # the last has one token
    assert torch.equal(pieces.gather(3, rows, pieces.generation)[0], whole.gather(3, rows, whole.generation)[0])


def test_memory_is_neither_in_the_weights_nor_shared_by_models(model):  # E13: kept in the model, in no file
    bank = remember(model, 40)
    assert not [name for name in model.state_dict() if "bank" in name or name.endswith(".keys")]
    other = LongMemForCausalLM.from_backbone(build_backbone("newgpt"), **RELEASED, **SIZES).eval()
    ids = tokens(12)[None]
    assert torch.equal(model(ids).logits, other(ids).logits)  # nothing is read that was not handed over
    assert (other(ids, memory=bank).logits - other(ids).logits).abs().max() > 1e-3


def test_numbers_too_large_for_float16_are_refused(model):  # E14: stored as inf
    bank = MemoryBank.for_model(model)
    keys = torch.full((4, 8, 8), 1e5)
    with pytest.raises(ValueError, match="must fit the storage dtype torch.float16"):
        bank.add("a", [keys], [keys])
    assert bank.is_empty


def test_frozen_is_frozen_and_the_rest_is_trained(model):  # E17: the switch was set on modules, not on parameters
    before = {name: parameter.clone() for name, parameter in model.backbone.named_parameters()}
    model.train().requires_grad_(True)
    bank, ids = remember(model, 40), tokens(12)[None]
    model(ids, memory=bank, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(parameter.grad is not None for parameter in model.side_network.parameters())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.backbone.named_parameters())
    for parameter in model.side_network.layers[0].parameters():  # any part can be frozen as in any torch model
        parameter.requires_grad_(False)
    model.zero_grad()
    model(ids, memory=bank, labels=ids).loss.backward()
    assert all(parameter.grad is None for parameter in model.side_network.layers[0].parameters())


def test_there_is_one_default_chunk_size_and_it_travels_with_the_model(model, tmp_path):  # three defaults: 4, 8 and 2
    assert LongMemConfig().chunk_size == 4
    assert inspect.signature(MemoryBank).parameters["chunk_size"].default is inspect.Parameter.empty
    model.save_pretrained(tmp_path)
    assert LongMemForCausalLM.from_pretrained(tmp_path, backbone=model.backbone).config.chunk_size == 4
    with pytest.raises(ValueError, match="in chunks of 2"):
        model(tokens(8)[None], memory=MemoryBank(memory_layers=[3], chunk_size=2))


@torch.no_grad()
def test_decoding_with_a_cache_reads_memory_as_the_full_forward_does(model):  # incremental state was ignored
    bank, ids = remember(model, 40), tokens(14, 9)[None]
    cache, logits = None, []
    for part in (ids[:, :6], *ids[:, 6:].split(1, dim=1)):
        output = model(part, memory=bank, cache=cache, use_cache=True)
        cache = cache_of(output)
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids, memory=bank).logits, rtol=1e-4, atol=1e-4)
