"""A model among others: copied, pickled, sharing its backbone, interrupted, its backbone changed under it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from model.architectures import build
from model.conftest import SETTINGS, build_backbone
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from longmem import LongMemForCausalLM, MemoryBank
from longmem.backbone.structure import UnsupportedBackboneError


def make(backbone, document, **fields):
    model = LongMemForCausalLM.from_backbone(backbone, **{**SETTINGS, **fields}).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, document_id="a")
    return model, bank


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "falcon"])
@torch.no_grad()
def test_a_copied_and_a_pickled_model_compute_the_same(model_type, input_ids, document):
    model, bank = make(build(model_type), document)
    expected = model(input_ids, memory=bank).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(input_ids, memory=bank).logits, expected)
        next(layer.memory_bias for layer in other.side_network.layers if layer.memory_bias is not None).fill_(5.0)
        assert not torch.equal(other(input_ids, memory=bank).logits, expected)
    assert torch.equal(model(input_ids, memory=bank).logits, expected)


@pytest.mark.parametrize("model_type", ["llama", "falcon"])
@torch.no_grad()
def test_models_of_one_backbone_do_not_disturb_each_other_or_it(model_type, input_ids, document):
    backbone = build(model_type)
    plain = backbone(input_ids).logits
    one, bank = make(backbone, document)
    expected = one(input_ids, memory=bank).logits
    hooks = [len(module._forward_pre_hooks) for module in backbone.modules()]
    other, other_bank = make(backbone, document, memory_layers=[1])
    assert [len(module._forward_pre_hooks) for module in backbone.modules()] == hooks
    assert torch.equal(one(input_ids, memory=bank).logits, expected)
    assert not torch.equal(other(input_ids, memory=other_bank).logits, expected)
    assert torch.equal(backbone(input_ids).logits, plain)


@torch.no_grad()
def test_an_interruption_leaves_nothing_behind(input_ids, document):
    """Ctrl-C inside a layer that calls torch's attention itself: no later call may meet the old memory."""
    model, bank = make(build("falcon"), document)
    expected = model(input_ids, memory=bank).logits
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value)

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.side_network.layers[0].layer.mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids, memory=bank)
    handle.remove()
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(query, key, value), plain)
    assert torch.equal(model(input_ids, memory=bank).logits, expected)


@torch.no_grad()
def test_another_attention_implementation_is_refused_and_leaks_no_later_token(input_ids, document):
    backbone = build_backbone("llama", attn_implementation="eager")
    model, _ = make(backbone, document)
    plain = backbone(input_ids).logits
    backbone.set_attn_implementation("sdpa")
    torch.testing.assert_close(backbone(input_ids).logits, plain, rtol=1e-4, atol=1e-5)  # causal as before
    with pytest.raises(ValueError, match='attention implementation .* "eager", got "sdpa"'):
        model(input_ids)


@torch.no_grad()
def test_a_bank_written_in_inference_mode_can_be_written_to_later(input_ids, document):
    model, expected = make(build_backbone("llama"), document)
    bank = expected.empty_like()
    with torch.inference_mode():
        model.memorize(bank, document, document_id="a")
        stream = model.stream(bank)
        stream.read(document)
    stream.read(document)
    bank.delete("stream")
    model.memorize(bank, document.flip(0), document_id="b")
    bank.delete("b")
    assert torch.equal(model(input_ids, memory=bank).logits, model(input_ids, memory=expected).logits)


@pytest.mark.parametrize(
    "change",
    [dict(rope_parameters={"rope_type": "default", "rope_theta": 100.0}), dict(hidden_act="relu")],
    ids=str,
)
def test_encoders_with_the_same_weights_and_other_settings_have_other_fingerprints(change):
    weights = build_backbone("llama").state_dict()
    models = []
    for fields in ({}, {}, change):
        backbone = build_backbone("llama", **fields)
        backbone.load_state_dict(weights)
        models.append(LongMemForCausalLM.from_backbone(backbone, **SETTINGS))
    one, same, other = (model.encoder_fingerprint() for model in models)
    assert one == same != other
    models[0].backbone.to(torch.bfloat16)
    assert models[0].encoder_fingerprint() != one


@torch.no_grad()
def test_generation_settings_come_back_and_other_processes_write_nothing(tmp_path, document):
    model, _ = make(build_backbone("llama"), document)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[3, 5])
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path / "main")
    again = LongMemForCausalLM.from_pretrained(tmp_path / "main", backbone=model.backbone)
    assert (again.generation_config.temperature, again.generation_config.eos_token_id) == (0.7, [3, 5])


def test_a_local_backbone_is_found_from_any_folder(tmp_path, monkeypatch):
    build_backbone("llama").save_pretrained(tmp_path / "here" / "backbone")
    monkeypatch.chdir(tmp_path / "here")
    LongMemForCausalLM.from_backbone("backbone", **SETTINGS).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert LongMemForCausalLM.from_pretrained(tmp_path / "model").config.memory_layers == [2]


@pytest.mark.parametrize("vocab_size", [7, 49, 97])
def test_a_model_that_sees_later_tokens_is_refused_whatever_its_vocabulary(vocab_size):
    config = AutoConfig.for_model(
        "bert", vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(UnsupportedBackboneError, match="not causal"):
        LongMemForCausalLM.from_backbone(AutoModelForCausalLM.from_config(config).eval(), **SETTINGS)


@torch.no_grad()
def test_a_slow_rotation_is_found(input_ids):
    rope = {"rope_type": "linear", "factor": 100.0, "rope_theta": 10000.0}
    model = LongMemForCausalLM.from_backbone(build_backbone("llama", rope_parameters=rope), **SETTINGS)
    here, _ = model.encode(input_ids)
    there, _ = model.encode(input_ids, position_ids=torch.arange(24)[None] + 300)
    torch.testing.assert_close(here[0], there[0], rtol=1e-3, atol=1e-3)
