"""Saving and loading: the side network alone, strictly, also through the Auto classes."""

import json

import pytest
import torch
from model.conftest import SETTINGS, build_backbone
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from longmem import LongMemConfig, LongMemForCausalLM, MemoryBank


@pytest.fixture
def folders(tmp_path):
    """A saved backbone and a saved, changed side network on it."""
    backbone, saved = tmp_path / "backbone", tmp_path / "saved"
    build_backbone("llama").save_pretrained(backbone)
    model = LongMemForCausalLM.from_backbone(str(backbone), **SETTINGS, memory_layers=[1, 2])
    with torch.no_grad():
        for parameter in model.side_network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(saved)
    return model.eval(), saved


@pytest.mark.parametrize("opener", [LongMemForCausalLM, AutoModelForCausalLM])
@torch.no_grad()
def test_a_reloaded_model_is_the_same(folders, input_ids, document, opener):
    model, saved = folders
    reloaded = opener.from_pretrained(saved)
    assert isinstance(reloaded, LongMemForCausalLM)
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, document_id="a")
    assert torch.equal(model(input_ids, memory=bank).logits, reloaded(input_ids, memory=bank).logits)
    fresh = LongMemForCausalLM.from_backbone(model.backbone, **SETTINGS, memory_layers=[1, 2])
    assert not torch.equal(model(input_ids, memory=bank).logits, fresh(input_ids, memory=bank).logits)


def test_the_backbone_is_named_not_copied(folders):
    model, saved = folders
    names = set(load_file(saved / "model.safetensors"))
    assert names
    assert all(name.startswith("side_network.") for name in names)
    config = json.loads((saved / "config.json").read_text())
    assert config["backbone_name_or_path"] == model.config.backbone_name_or_path
    assert config["model_type"] == "longmem"
    assert "arXiv 2306.07174" in (saved / "README.md").read_text()


def test_the_configuration_survives(folders):
    model, saved = folders
    for config in (AutoConfig.from_pretrained(saved), LongMemConfig.from_pretrained(saved)):
        assert isinstance(config, LongMemConfig)
        for name in ("memory_layers", "chunk_size", "memory_distance", "fusion", "memory_bias_init"):
            assert getattr(config, name) == getattr(model.config, name)
        assert config.get_text_config().hidden_size == 32


@pytest.mark.parametrize("damage", ["missing", "unexpected", "reshaped", "truncated", "gone"])
def test_loading_refuses_any_other_weights(folders, damage):
    _, saved = folders
    file = saved / "model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    if damage == "missing":
        del weights[name]
    elif damage == "unexpected":
        weights["side_network.surplus"] = torch.zeros(1)
    elif damage == "reshaped":
        weights[name] = torch.zeros(3)
    save_file(weights, file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    if damage == "gone":
        file.unlink()
    words = {"truncated": "damaged", "gone": "no model.safetensors", "reshaped": "another shape"}
    with pytest.raises(ValueError, match=words.get(damage, damage)):
        LongMemForCausalLM.from_pretrained(saved)


def test_a_name_that_is_neither_folder_nor_on_the_hub(tmp_path):
    with pytest.raises(OSError, match="not a local folder"):
        LongMemForCausalLM.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        LongMemForCausalLM.from_pretrained(tmp_path / "empty")


def test_another_backbone_is_refused(folders):
    _, saved = folders
    with pytest.raises(ValueError, match="num_hidden_layers should be 4, got 2"):
        LongMemForCausalLM.from_pretrained(saved, backbone=build_backbone("llama", num_hidden_layers=2))


def test_the_fingerprint_is_that_of_what_is_stored(folders, input_ids):
    model, saved = folders
    same = LongMemForCausalLM.from_pretrained(saved)
    assert same.encoder_fingerprint() == model.encoder_fingerprint()
    above = build_backbone("llama")
    above.model.layers[3].mlp.up_proj.weight.data.add_(1.0)  # above the memory layers: stored numbers stay the same
    assert (
        LongMemForCausalLM.from_pretrained(saved, backbone=above).encoder_fingerprint() == model.encoder_fingerprint()
    )
    below = build_backbone("llama")
    below.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1.0
    other = LongMemForCausalLM.from_pretrained(saved, backbone=below)
    assert other.encoder_fingerprint() != model.encoder_fingerprint()
    with pytest.raises(ValueError, match="memorize the documents again"):
        other(input_ids, memory=MemoryBank.for_model(model))
