"""The cache of keys and values has another name since transformers 5.24; either is taken, and each model gets its own."""

import warnings

import pytest
import torch
from model.conftest import SETTINGS, build_backbone
from transformers import DynamicCache, LlamaForCausalLM

from longmem import LongMemForCausalLM, MemoryBank
from longmem.backbone.cache_names import as_keyword, cache_of, named_for

NAMES = ("cache", "past_key_values")


class OldCode(LlamaForCausalLM):
    """A model of the Hub whose own code has kept the old name."""

    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        return super().forward(input_ids, **as_keyword(past_key_values), **kwargs)


class NewCode(LlamaForCausalLM):
    """A model of the Hub whose own code has the new name."""

    def forward(self, input_ids=None, cache=None, **kwargs):
        return super().forward(input_ids, **as_keyword(cache), **kwargs)


@pytest.mark.parametrize("given", NAMES)
@pytest.mark.parametrize(("kind", "own"), [(OldCode, "past_key_values"), (NewCode, "cache")])
def test_a_model_gets_the_cache_under_its_own_name(llama, kind, own, given):
    cache = DynamicCache()
    assert named_for(kind(llama.config), {given: cache, "use_cache": True}) == {own: cache, "use_cache": True}


@torch.no_grad()
@pytest.mark.parametrize("given", NAMES)
@pytest.mark.parametrize("kind", [OldCode, NewCode, LlamaForCausalLM])
def test_decoding_with_a_cache_equals_the_full_forward(llama, input_ids, document, kind, given):
    backbone = kind(llama.config).eval()
    backbone.load_state_dict(llama.state_dict())
    model = LongMemForCausalLM.from_backbone(backbone, **SETTINGS).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, document_id="a")
    full = model(input_ids, memory=bank).logits[:, 10:]
    cache = cache_of(model(input_ids[:, :10], memory=bank, use_cache=True))
    found = model(input_ids[:, 10:], memory=bank, **{given: cache}).logits
    torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-4)
    assert (found - model(input_ids[:, 10:], memory=bank).logits).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "newgpt"])
def test_no_old_name_is_used_where_transformers_has_a_new_one(input_ids, document, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = LongMemForCausalLM.from_backbone(build_backbone(kind), **SETTINGS).eval()
        bank = MemoryBank.for_model(model)
        stream = model.stream(bank)
        stream.read(document)
        assert len(list(stream.generate(3))) == 3
        assert model.generate(input_ids, memory=bank, max_new_tokens=3, do_sample=False).shape == (2, 27)


@torch.no_grad()
@pytest.mark.parametrize("given", NAMES)
def test_newgpt_itself_takes_either_name(input_ids, given):
    model = build_backbone("newgpt")
    cache = cache_of(model(input_ids[:, :10], use_cache=True))
    found = model(input_ids[:, 10:], **{given: cache}).logits
    torch.testing.assert_close(found, model(input_ids).logits[:, 10:], rtol=1e-4, atol=1e-4)
    tokens = model.generate(input_ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens[:, -1], model(tokens[:, :-1]).logits[:, -1].argmax(dim=-1))
