"""Saving and loading: the side network alone, strictly, also through the Auto classes."""

import json

import pytest
import torch
from model.conftest import SETTINGS, build_backbone
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from longmem import LongMemConfig, LongMemForCausalLM, MemoryBank, StaleMemoryError


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
    options = {"strict_backbone": False}
    with pytest.warns(UserWarning, match="differs from this one in weights"):
        changed = LongMemForCausalLM.from_pretrained(saved, backbone=above, **options)
    assert changed.encoder_fingerprint() == model.encoder_fingerprint()
    below = build_backbone("llama")
    below.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1.0
    with pytest.warns(UserWarning, match="differs from this one in weights"):
        other = LongMemForCausalLM.from_pretrained(saved, backbone=below, **options)
    assert other.encoder_fingerprint() != model.encoder_fingerprint()
    with pytest.raises(StaleMemoryError, match=r"differ in weights.*encode the bank again"):
        other(input_ids, memory=MemoryBank.for_model(model))


# LoRA and half the room -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lora_folders(tmp_path):
    """A changed model with LoRA, and where it is saved."""
    build_backbone("llama").save_pretrained(tmp_path / "backbone")
    model = LongMemForCausalLM.from_backbone(
        str(tmp_path / "backbone"), **SETTINGS, memory_layers=[1, 2], lora={"rank": 2, "target_modules": ["q_proj"]}
    )
    with torch.no_grad():
        for parameter in model.side_network.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "saved-lora")
    return model.eval(), tmp_path / "saved-lora"


@pytest.mark.parametrize("opener", [LongMemForCausalLM, AutoModelForCausalLM])
@torch.no_grad()
def test_a_model_with_lora_is_saved_without_its_base(lora_folders, input_ids, document, opener):
    model, saved = lora_folders
    names = {name.removeprefix("side_network.") for name in load_file(saved / "model.safetensors")}
    assert names == set(model.side_network.trained_parameters())
    assert not any("base_layer" in name or "norm" in name for name in names)
    assert not (saved / "adapter_config.json").exists()  # AutoModel would take the folder for an adapter of peft
    reloaded = opener.from_pretrained(saved)
    assert reloaded.config.lora == model.config.lora
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, document_id="a")
    expected = model(input_ids, memory=bank).logits
    assert torch.equal(reloaded(input_ids, memory=bank).logits, expected)
    new = LongMemForCausalLM.from_backbone(model.backbone, **SETTINGS, memory_layers=[1, 2], lora=model.config.lora)
    assert (new(input_ids, memory=bank).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("damage", ["missing", "unexpected", "another shape"])
def test_loading_lora_refuses_any_other_weights(lora_folders, damage):
    _, saved = lora_folders
    weights = load_file(saved / "model.safetensors")
    name = next(name for name in sorted(weights) if "lora_A" in name)
    if damage == "missing":
        del weights[name]
    elif damage == "unexpected":
        name = name.replace("q_proj", "k_proj")
        weights[name] = torch.zeros(2, 32)
    else:
        weights[name] = torch.zeros(3, 32)
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{damage} \['{name.removeprefix('side_network.')}'\] \(1\)"):
        LongMemForCausalLM.from_pretrained(saved)


def test_what_was_unfrozen_by_hand_is_saved_too(lora_folders, tmp_path):
    model, saved = lora_folders
    norm = "layers.0.layer.input_layernorm.weight"
    model.side_network.get_parameter(norm).requires_grad_(True).data.add_(1.0)
    model.save_pretrained(saved)
    again = LongMemForCausalLM.from_pretrained(saved)
    again.save_pretrained(tmp_path / "again")
    last = LongMemForCausalLM.from_pretrained(tmp_path / "again").side_network
    assert torch.equal(last.get_parameter(norm), model.side_network.get_parameter(norm))
    assert last.get_parameter(norm).requires_grad
    assert not last.get_parameter(norm.replace("layers.0", "layers.1")).requires_grad


def test_a_merged_model_is_saved_as_a_whole(lora_folders, input_ids, tmp_path):
    model, _ = lora_folders
    model.merge_lora().save_pretrained(tmp_path / "merged")
    again = LongMemForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config.lora is None
    assert torch.equal(again(input_ids).logits, model(input_ids).logits)


def test_a_page_of_somebody_else_stays(folders, tmp_path):
    model, saved = folders[0], tmp_path / "project"
    saved.mkdir()
    (saved / "README.md").write_text("# My project\n")
    model.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "# My project\n"
    (saved / "README.md").write_text("---\nlibrary_name: longmem\n---\nan earlier card")
    model.save_pretrained(saved)
    assert "arXiv 2306.07174" in (saved / "README.md").read_text()


@pytest.mark.parametrize("saved_model", ["folders", "lora_folders"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_weights_can_be_saved_in_half_precision(saved_model, dtype, input_ids, tmp_path, request):
    model, saved = request.getfixturevalue(saved_model)
    model.save_pretrained(tmp_path / "half", dtype=dtype)
    expected = torch.bfloat16 if dtype is torch.bfloat16 else torch.float16
    weights, full = load_file(tmp_path / "half" / "model.safetensors"), load_file(saved / "model.safetensors")
    assert weights.keys() == full.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, full[name].to(expected))
    again = LongMemForCausalLM.from_pretrained(tmp_path / "half")
    assert again.side_network.dtype == torch.float32
    with torch.no_grad():
        difference = (again(input_ids).logits - model(input_ids).logits).abs()
    assert 0 < difference.max() < 0.2
    with pytest.raises(ValueError, match="`dtype` must be one of float32, bfloat16, float16, got 'int8'"):
        model.save_pretrained(tmp_path / "half", dtype="int8")


def test_the_model_card_says_what_was_trained(folders, lora_folders):
    for model, saved in (folders, lora_folders):
        count = sum(weight.numel() for name, weight in load_file(saved / "model.safetensors").items())
        words = "LoRA of rank 2 (alpha 4) on q_proj" if model.config.lora else "every weight of the side network"
        assert f"Trained: {words}, {count:,} parameters." in (saved / "README.md").read_text()
