"""Bad input: each row an argument, a value, and words that the message must contain (the rule and the way out)."""

import pytest
import torch
from model.conftest import SETTINGS, build_backbone
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from longmem import LongMemConfig, LongMemForCausalLM, MemoryBank

CONFIG_ROWS = [
    ("chunk_sise", 4, ["chunk_sise", "not a field", "Did you mean `chunk_size`"]),
    ("chunk_size", 0, ["chunk_size", "at least 1", "got 0"]),
    ("num_retrieved_tokens", 18, ["multiple of `chunk_size`", "got 18 and 4", "16 would do"]),
    ("num_retrieved_tokens", -4, ["num_retrieved_tokens", "at least 1"]),
    ("segment_length", 2, ["segment_length", "at least one chunk", "got 2"]),
    ("segment_length", 4096, ["segment_length", "window of 2048", "got 4096"]),
    ("layer_reduction_factor", 3, ["layer_reduction_factor", "divide the backbone's 4 layers", "1, 2, 4"]),
    ("memory_layers", [9], ["memory_layers", "below the backbone's 4 layers", "got [9]", "default would be"]),
    ("memory_layers", [2, 1], ["memory_layers", "ascending", "got [2, 1]"]),
    ("memory_layers", [], ["memory_layers", "got []"]),
    ("memory_distance", -1, ["memory_distance", "0 or more", "got -1"]),
    ("fusion", "mixed", ["fusion", "joint", "gated"]),
    ("residual", "none", ["residual", "substitute", "paper"]),
    ("init", "identity", ["init", 'residual="paper"', 'init="backbone"']),
    ("residual_states", "post_norm", ["residual_states", "pre_norm"]),
    ("chunk_size", "4", ["chunk_size", "int"]),
    ("side_layer_offset", 1, ["side_layer_offset", 'residual="paper"', "leave it at 0"]),
    ("num_side_layers", 2, ["num_side_layers", 'residual="paper"']),
    ("final_norm", "side", ["final_norm", 'residual="paper"', "leave it at 'backbone'"]),
    ("side_layer_options", {"rms_norm_eps": 1e-5}, ["side_layer_options", 'residual="paper"']),
]
PAPER_ROWS = [
    ("side_layer_offset", 2, ["side_layer_offset", "from 0 to 1", "got 2"]),
    ("num_side_layers", 3, ["num_side_layers", "from 1 to 2", "got 3"]),
    ("memory_layers", [2, 3], ["readers of their own", "got [2, 3]", "side layer m // 2 of 2"]),
    ("side_layer_options", {"rms_norm_ep": 1.0}, ["side_layer_options", "Did you mean `rms_norm_eps`"]),
    ("side_layer_options", {"hidden_size": 8}, ["side_layer_options", "hidden_size", "leave it out"]),
]


@pytest.mark.parametrize(("field", "value", "words"), CONFIG_ROWS)
def test_configuration(llama, field, value, words):
    with pytest.raises(Exception) as caught:
        LongMemForCausalLM.from_backbone(llama, **{**SETTINGS, field: value})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("field", "value", "words"), PAPER_ROWS)
def test_configuration_of_the_papers_form(llama, field, value, words):
    with pytest.raises(Exception) as caught:
        LongMemForCausalLM.from_backbone(
            llama, **{**SETTINGS, "residual": "paper", "layer_reduction_factor": 2, field: value}
        )
    for word in words:
        assert word in str(caught.value)


def test_a_good_configuration_is_accepted(llama):
    LongMemForCausalLM.from_backbone(llama, **SETTINGS)


def nan_ids(model, bank):
    keys, values = model.encode(torch.zeros(1, 8, dtype=torch.long))
    keys[0][0, 0, 0, 0] = float("nan")
    bank.add("b", [key[0] for key in keys], [value[0] for value in values])


CALL_ROWS = {
    "blank text": (lambda m, b: m.memorize(b, " \n", "b"), ["text_or_ids", "some text"]),
    "no ids": (lambda m, b: m.memorize(b, [], "b"), ["text_or_ids", "at least one"]),
    "nested ids": (lambda m, b: m.memorize(b, [[1, 2], [3, 4]], "b"), ["flat sequence", "(2, 2)"]),
    "fractional ids": (lambda m, b: m.memorize(b, [0.5], "b"), ["token ids", "float32"]),
    "other tokenizer": (lambda m, b: m.memorize(b, [5, 999], "b"), ["0 to 96", "999", "another model"]),
    "text without tokenizer": (lambda m, b: m.memorize(b, "text", "b"), ["tokenizer", "pass token ids"]),
    "duplicate id": (lambda m, b: m.memorize(b, [1, 2, 3, 4], "a"), ["document_id", "'a'"]),
    "empty id": (lambda m, b: m.memorize(b, [1, 2, 3, 4], ""), ["document_id"]),
    "unknown document": (lambda m, b: b.delete("aa"), ["document_id", "aa", "Did you mean `a`"]),
    "unknown selection": (lambda m, b: b.select(["zz"]), ["zz", "a"]),
    "not a bank": (lambda m, b: m(torch.ones(1, 4).long(), memory=["a"]), ["memory", "MemoryBank", "str"]),
    "banks for other rows": (
        lambda m, b: m(torch.ones(2, 4).long(), memory=[b, b, b]),
        ["one bank per batch row", "3 for 2"],
    ),
    "bank of other layers": (
        lambda m, b: m(torch.ones(1, 4).long(), memory=MemoryBank(memory_layers=[0], chunk_size=4)),
        ["[0]", "MemoryBank.for_model"],
    ),
    "unknown input": (lambda m, b: m(torch.ones(1, 4).long(), memmory=b), ["memmory"]),
    "unknown input without a value": (lambda m, b: m(torch.ones(1, 4).long(), memmory=None), ["memmory"]),
    "input of the backbone alone": (
        lambda m, b: m(torch.ones(1, 4).long(), inputs_embeds=torch.ones(1, 4, 32)),
        ["`inputs_embeds`", "leave it out"],
    ),
    "switch of transformers": (
        lambda m, b: m(torch.ones(1, 4).long(), is_causal=False),
        ["`is_causal`", "leave it out"],
    ),
    "hidden states": (lambda m, b: m(torch.ones(1, 4).long(), output_hidden_states=True), ["output_memory_reads"]),
    "two caches": (
        lambda m, b: m(torch.ones(1, 4).long(), cache=DynamicCache(), past_key_values=DynamicCache()),
        ["`cache`", "`past_key_values`", "leave one out"],
    ),
    "capacity under a chunk": (lambda m, b: MemoryBank.for_model(m, capacity_tokens=2), ["capacity_tokens", "2"]),
    "capacity not in chunks": (lambda m, b: MemoryBank.for_model(m, capacity_tokens=6), ["multiple", "6"]),
    "unknown index": (lambda m, b: MemoryBank.for_model(m, index="flatt"), ["index", "Did you mean `flat`"]),
    "not a number": (nan_ids, ["keys", "finite"]),
    "not a model": (lambda m, b: LongMemForCausalLM.from_backbone(m.backbone.model), ["backbone", "causal LM"]),
    "unknown option": (lambda m, b: LongMemForCausalLM.from_pretrained(".", revison="x"), ["Did you mean `revision`"]),
}


@pytest.mark.parametrize("row", sorted(CALL_ROWS))
def test_calls(llama, row):
    call, words = CALL_ROWS[row]
    model = LongMemForCausalLM.from_backbone(llama, **SETTINGS)
    bank = MemoryBank.for_model(model)
    model.memorize(bank, torch.arange(50), document_id="a")
    before = bank.documents()
    with pytest.raises((ValueError, TypeError)) as caught:
        call(model, bank)
    for word in words:
        assert word in str(caught.value)
    assert bank.documents() == before  # nothing is half written


def test_what_transformers_hands_to_every_model_is_taken(llama):
    model = LongMemForCausalLM.from_backbone(llama, **SETTINGS)
    tokens = torch.ones(1, 4).long()
    by_habit = dict(return_dict=True, output_attentions=False, output_router_logits=False, inputs_embeds=None)
    assert torch.equal(model(tokens, **by_habit, tokenizer=object()).logits, model(tokens).logits)


def test_a_failure_in_the_middle_of_a_document_leaves_nothing_of_it(llama):
    model = LongMemForCausalLM.from_backbone(llama, **SETTINGS)
    bank = MemoryBank.for_model(model)

    def stop(done, total):
        if done == 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.memorize(bank, torch.arange(97).repeat(2), document_id="a", progress=stop)
    assert bank.documents() == []
    assert bank.is_empty


def test_a_given_configuration_object_is_copied(llama):
    """A configuration inside another one loses its attention implementation, and the model its causality."""
    LongMemConfig(backbone_config=llama.config)
    assert llama.config._attn_implementation == "sdpa"


def test_joint_fusion_refuses_other_attention_implementations():
    AttentionInterface.register("somebody's", sdpa_attention_forward)
    AttentionMaskInterface.register("somebody's", sdpa_mask)
    llama = build_backbone("llama")
    llama.set_attn_implementation("somebody's")
    with pytest.raises(ValueError, match='"sdpa" or "eager", got "somebody\'s"'):
        LongMemForCausalLM.from_backbone(llama, **SETTINGS)
    LongMemForCausalLM.from_backbone(llama, **SETTINGS, fusion="gated")
