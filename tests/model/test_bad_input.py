"""Bad input: each row an argument, a value, and words that the message must contain (the rule and the way out)."""

import pytest
import torch
from model.conftest import SETTINGS, build_backbone
from tokenizers import normalizers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from longmem import LongMemConfig, LongMemForCausalLM, MemoryBank
from longmem.backbone.structure import adapters_in_words
from longmem.tracing import explain

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
    ("distance_per", "layer", ["distance_per", "model", "layer"]),
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


# What is refused, or adapted, for what was seen and for nothing else.


@pytest.fixture
def short_window():
    with pytest.warns(UserWarning, match="`segment_length` is 64, the window of this backbone, and not the usual 1024"):
        return LongMemForCausalLM.from_backbone(build_backbone("gpt2", n_positions=64), num_retrieved_tokens=16).eval()


def test_the_default_fits_the_window_of_the_backbone(short_window):
    assert short_window.config.segment_length == 64
    with pytest.raises(ValueError, match="`segment_length` must fit the backbone's window of 64 tokens"):
        LongMemForCausalLM.from_backbone(build_backbone("gpt2", n_positions=64), segment_length=1024)
    assert LongMemForCausalLM.from_backbone(build_backbone("llama")).config.segment_length == 1024


def test_the_last_learned_position_is_named_before_it_is_passed(short_window, monkeypatch):
    ids = torch.arange(60)[None]
    assert short_window.generate(ids, max_new_tokens=5, pad_token_id=0).shape == (1, 65)  # the last is chosen, not read
    monkeypatch.setattr(type(short_window.backbone), "forward", None)  # nothing runs
    for call in (
        lambda: short_window.generate(ids, max_new_tokens=6),
        lambda: short_window.generate(ids, max_length=70),
        lambda: short_window(torch.arange(65)[None]),
        lambda: short_window(ids, position_ids=ids + 10),
    ):
        with pytest.raises(ValueError, match=r"64 positions that GPT2LMHeadModel|from 0 to 63"):
            call()


def test_rotary_models_have_no_last_position(llama):
    model = LongMemForCausalLM.from_backbone(llama, **SETTINGS).eval()
    assert model(torch.arange(90)[None], position_ids=torch.arange(10**6, 10**6 + 90)[None]).logits.isfinite().all()


def test_what_is_memorized_under_autocast_is_what_the_fingerprint_says(llama):
    model = LongMemForCausalLM.from_backbone(llama, **SETTINGS).eval()
    banks = [MemoryBank.for_model(model, storage_dtype="float32") for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.memorize(banks[0], torch.arange(90), "a")
        inside = model(torch.arange(20)[None], output_memory_keys=True)
    model.memorize(banks[1], torch.arange(90), "a")
    outside = model(torch.arange(20)[None], output_memory_keys=True)
    layer = banks[0].memory_layers[0]
    assert torch.equal(banks[0].search_keys(layer), banks[1].search_keys(layer))
    assert torch.equal(inside.memory_keys[0], outside.memory_keys[0])
    assert not torch.equal(inside.logits, outside.logits)  # what is not stored is computed as autocast says


def test_numbers_that_overflow_are_not_called_a_look_ahead():
    backbone = build_backbone("llama")
    with torch.no_grad():
        backbone.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"finite logits, got NaN or inf in torch.float32.*bfloat16"):
        LongMemForCausalLM.from_backbone(backbone, **SETTINGS)


def test_adapters_that_are_not_merged_are_named():
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(build_backbone("llama"), lora)
    assert "adapters of PEFT that are not merged: `merge_and_unload()`" in adapters_in_words(adapted.base_model.model)
    model = LongMemForCausalLM.from_backbone(adapted.base_model.model, **SETTINGS).eval()
    ids = torch.arange(12)[None]  # where copies of layers with adapters compute what the backbone does, they are taken
    torch.testing.assert_close(model(ids).logits, adapted.base_model.model(ids).logits, atol=1e-4, rtol=1e-4)
    LongMemForCausalLM.from_backbone(adapted.merge_and_unload(), **SETTINGS)


def test_a_newer_librarys_input_is_ignored_with_a_warning(llama):
    model = LongMemForCausalLM.from_backbone(llama, **SETTINGS).eval()
    ids = torch.ones(1, 4).long()
    with pytest.warns(UserWarning, match="ignores `of_a_later_release`"):
        found = model(ids, of_a_later_release=3).logits
    assert torch.equal(found, model(ids).logits)
    bank = MemoryBank.for_model(model)
    with pytest.raises(ValueError, match="pass it as `memory`"):
        model(ids, bank=bank)
    with pytest.raises(ValueError, match="Did you mean `output_memory_reads`"):
        model(ids, output_memory_read=True)
    assert isinstance(model(ids, return_dict=False), tuple)


def test_generate_returns_who_read_what(llama):
    model = LongMemForCausalLM.from_backbone(llama, **SETTINGS).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, torch.arange(90), "a")
    asked = dict(memory=bank, max_new_tokens=3, output_memory_reads=True, return_dict_in_generate=True)
    output = model.generate(torch.arange(8)[None], **asked)
    assert [[read.rows.shape[2] for read in step] for step in output.memory_reads] == [[8], [1], [1]]
    first = model(torch.arange(8)[None], memory=bank, output_memory_reads=True).memory_reads
    assert torch.equal(output.memory_reads[0][0].rows, first[0].rows)
    with pytest.raises(ValueError, match="needs `return_dict_in_generate=True`"):
        model.generate(torch.arange(8)[None], memory=bank, max_new_tokens=3, output_memory_reads=True)
    with pytest.raises(ValueError, match="`output_memory_keys` must be left out"):
        model.generate(torch.arange(8)[None], memory=bank, max_new_tokens=3, output_memory_keys=True)


def test_a_text_of_which_the_tokenizer_makes_nothing_is_refused_for_what_it_is(model, bank):
    """It is not blank: a normalizer drops what no model was taught, such as spaces of no width."""
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    text, before = "\u200b\u200b", bank.documents()
    calls = {
        "text_or_ids": [
            lambda: model.memorize(bank, text, "new"),
            lambda: bank.update("past", text, model=model),
        ],
        "text": [lambda: bank.find(text, model)],
        "prompt": [lambda: explain(model, text, memory=bank)],
        "input_ids": [lambda: model(torch.tensor([model.tokenizer(text)["input_ids"]], dtype=torch.int64))],
    }
    for name, doors in calls.items():
        for door in doors:
            with pytest.raises(ValueError, match=rf"^`{name}` must hold [^\n]*token[^\n]*, got [^\n]*\.$"):
                door()
    # A piece of a text may be nothing.
    assert model.stream(bank).read(text) == 0
    assert model.memorize(bank, text, "past", append=True) == 0
    assert bank.documents() == before
