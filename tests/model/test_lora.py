"""LoRA on the side network: starts as the model without it, trains only what it adds, and can be folded in."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from model.architectures import ARCHITECTURES, build
from model.conftest import SETTINGS, build_backbone
from torch import nn

from longmem import LongMemForCausalLM, MemoryBank
from longmem.model.lora import adapted_layers, add_adapters
from longmem.training.setup import select_trained

RANK = {"rank": 4}
# One of each: transposed weights (gpt2), experts with a router that is a linear layer (phimoe), layers of several kinds.
VARIED = ["falcon", "gpt2", "llama", "phimoe", "qwen3_next"]
PAPER = dict(residual="paper", init="identity", fusion="gated", final_norm="side")


def make(backbone, document, **fields):
    model = LongMemForCausalLM.from_backbone(backbone, **{**SETTINGS, "lora": RANK, **fields}).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, document_id="a")
    return model, bank


@torch.no_grad()
def change_adapters(model, size=0.1):
    """Stand in for training: B, which starts at zero, takes any other value."""
    for name, weight in model.side_network.named_parameters():
        if ".lora_B." in name:
            weight.normal_(std=size)


def changed_by_a_step(model, bank, input_ids):
    """Return the names of all parameters that one training step changes."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(input_ids, memory=bank, labels=input_ids).loss.backward()
    optimizer.step()
    model.eval()
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize("model_type", VARIED)
@torch.no_grad()
def test_a_new_model_is_exactly_the_one_without(model_type, input_ids, document):
    backbone = build(model_type)
    model, bank = make(backbone, document)
    plain = LongMemForCausalLM.from_backbone(backbone, **SETTINGS).eval()
    expected = plain(input_ids, memory=bank).logits
    assert torch.equal(model(input_ids, memory=bank).logits, expected)
    change_adapters(model)
    assert (model(input_ids, memory=bank).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", VARIED)
def test_every_adapter_gets_a_gradient_and_nothing_else(model_type, input_ids, document):
    model, bank = make(build(model_type), document)
    change_adapters(model)  # while B is zero, A has no gradient
    model(input_ids, memory=bank, labels=input_ids).loss.backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert reached == {f"side_network.{name}" for name in model.side_network.trained_parameters()}
    assert any(".lora_A." in name for name in reached)
    assert sum(name.endswith("memory_bias") for name in reached) == len(model.config.memory_layers)


@pytest.mark.parametrize("form", [{}, PAPER, {"lora": {"rank": 4, "dropout": 0.1}}], ids=str)
def test_a_step_changes_the_output_and_nothing_of_the_base(form, input_ids, document):
    model, bank = make(build_backbone("llama"), document, **form)
    with torch.no_grad():
        before = model(input_ids, memory=bank).logits
    if form is PAPER:
        with torch.no_grad():
            for layer in model.side_network.layers:  # a scale of zero passes no gradient to what it scales
                layer.output_scale.fill_(0.1)
            before = model(input_ids, memory=bank).logits
    changed = changed_by_a_step(model, bank, input_ids)
    assert {name.split(".lora_")[-1].split(".")[0] for name in changed if ".lora_" in name} == {"B"}
    others = {name.rpartition(".")[2] for name in changed if ".lora_" not in name}
    assert others == ({"memory_bias", "output_scale"} if form is PAPER else {"memory_bias"})
    with torch.no_grad():
        assert (model(input_ids, memory=bank).logits - before).abs().max() > 1e-3


def test_the_base_stays_frozen_whatever_is_asked_of_the_model(document):
    model, _ = make(build_backbone("llama"), document, **PAPER)
    trained = {f"side_network.{name}" for name in model.side_network.trained_parameters()}
    assert not any(name.endswith(("norm.weight", "base_layer.weight")) for name in trained)

    def trainable():
        return {name for name, weight in model.named_parameters() if weight.requires_grad}

    assert trainable() == trained
    model.requires_grad_(False)
    assert trainable() == set()
    model.train().requires_grad_(True)
    assert trainable() == trained
    attention = {f"side_network.{name}" for name in select_trained(model, "reading_attention", reads_memory=True)}
    assert attention < trained
    assert any(".q_proj.lora_A." in name for name in attention)


@pytest.mark.parametrize("form", [{}, PAPER], ids=str)
def test_checkpointing_gives_the_same_gradients(form, input_ids, document):
    model, bank = make(build_backbone("llama"), document, **form)
    change_adapters(model)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model.train()(input_ids, memory=bank, labels=input_ids).loss.backward()
        gradients.append({name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None})
        model.activation_checkpointing_enable()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_half_precision_side_network_are_float32(dtype, input_ids, document):
    model, bank = make(build_backbone("llama").to(dtype), document)
    kinds = {name: weight.dtype for name, weight in model.side_network.named_parameters()}
    assert {kind for name, kind in kinds.items() if "lora_" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "base_layer" in name} == {dtype}
    assert model.side_network.dtype == dtype
    assert model(input_ids, memory=bank).logits.dtype == dtype
    assert any(".lora_B." in name for name in changed_by_a_step(model, bank, input_ids))


class Int8Linear(nn.Module):
    """A linear layer quantized as libraries do: integer weights and a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().max() / 127)
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.weight * self.scale)


def test_copies_of_a_quantized_backbone_get_adapters(input_ids, document):
    backbone = build_backbone("llama")
    for layer in backbone.model.layers:
        layer.mlp.up_proj = Int8Linear(layer.mlp.up_proj)
    model, bank = make(backbone, document)
    changed = changed_by_a_step(model, bank, input_ids)
    assert any("up_proj.lora_B" in name for name in changed)
    assert all(".lora_B." in name or name.endswith("memory_bias") for name in changed)


def test_target_modules_rank_and_alpha(document):
    lora = {"rank": 3, "alpha": 12, "target_modules": ["q_proj", "mlp.up_proj"]}
    model, _ = make(build_backbone("llama"), document, lora=lora)
    adapted = {name: weight for name, weight in model.side_network.named_parameters() if ".lora_A." in name}
    assert {name.split(".")[4] for name in adapted} == {"q_proj", "up_proj"}
    assert len(adapted) == 2 * len(model.side_network.layers)
    assert {weight.shape[0] for weight in adapted.values()} == {3}
    assert model.side_network.layers[0].layer.self_attn.q_proj.scaling == {"default": 4.0}
    assert model.config.lora == {**lora, "alpha": 12.0, "dropout": 0.0}


LORA_ROWS = [
    ({"rnak": 4}, ["rank, alpha, target_modules, dropout", "Did you mean `rank`"]),
    ({}, ["rank", "1 or more", "got None"]),
    ({"rank": 0}, ["rank", "1 or more", "got 0"]),
    ({"rank": True}, ["rank", "integer", "got True"]),
    ({"rank": 4, "alpha": -1}, ["alpha", "above 0", "got -1", "leave it out for 8"]),
    ({"rank": 4, "dropout": 1.0}, ["dropout", "below 1", "got 1.0"]),
    ({"rank": 4, "target_modules": []}, ["target_modules", "at least one", "got []"]),
    ({"rank": 4, "target_modules": "q_proj"}, ["target_modules", "list", "'all-linear'", "got 'q_proj'"]),
    ({"rank": 4, "target_modules": ["q_porj"]}, ["q_porj", "linear layers", "down_proj", "Did you mean `q_proj`"]),
    ({"rank": 4, "target_modules": ["input_layernorm"]}, ["input_layernorm", "linear layers"]),
    (4, ["lora", "dict"]),
]


@pytest.mark.parametrize(("lora", "words"), LORA_ROWS, ids=str)
def test_settings_that_break_a_rule(llama, lora, words):
    with pytest.raises(Exception) as caught:
        LongMemForCausalLM.from_backbone(llama, **SETTINGS, lora=lora)
    for word in words:
        assert word in str(caught.value)


def test_layers_with_weights_of_their_own_are_refused(llama):
    with pytest.raises(Exception, match="leave one of the two out"):
        LongMemForCausalLM.from_backbone(
            llama, **SETTINGS, residual="paper", side_layer_options={"intermediate_size": 8}, lora=RANK
        )


@pytest.mark.parametrize("model_type", VARIED)
def test_merging_keeps_the_logits_and_frees_the_weights(model_type, input_ids, document):
    model, bank = make(build(model_type), document)
    plain = LongMemForCausalLM.from_backbone(model.backbone, **SETTINGS)
    change_adapters(model)
    with torch.no_grad():
        before = model(input_ids, memory=bank).logits
        assert model.merge_lora() is model
        torch.testing.assert_close(model(input_ids, memory=bank).logits, before, rtol=1e-4, atol=1e-4)
    assert model.config.lora is None
    assert model.side_network.state_dict().keys() == plain.side_network.state_dict().keys()
    trainable = {name for name, weight in model.side_network.named_parameters() if weight.requires_grad}
    assert trainable == {name for name, weight in plain.side_network.named_parameters() if weight.requires_grad}
    with pytest.raises(ValueError, match="nothing to merge"):
        model.merge_lora()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@torch.no_grad()
def test_every_architecture_can_have_adapters_and_lose_them(model_type, input_ids):
    options = dict(SETTINGS, memory_layers=[3]) if model_type == "llama4_text" else SETTINGS
    model = LongMemForCausalLM.from_backbone(build(model_type), **options, lora=RANK).eval()
    before = model(input_ids).logits
    change_adapters(model)
    changed = model(input_ids).logits
    assert (changed - before).abs().max() > 1e-3
    torch.testing.assert_close(model.merge_lora()(input_ids).logits, changed, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", VARIED)
@torch.no_grad()
def test_without_gradients_layers_give_what_peft_gives(model_type, dtype, input_ids, document):
    model, bank = make(build(model_type).to(dtype), document)
    change_adapters(model)
    with torch.enable_grad():
        expected = model(input_ids, memory=bank).logits.detach()
    found = model(input_ids, memory=bank).logits
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected)
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()  # routers of experts may choose another one
    with torch.inference_mode():
        assert torch.equal(model(input_ids, memory=bank).logits, found)


@torch.no_grad()
def test_one_layer_computes_what_peft_does_in_every_state():
    plain = nn.ModuleList([nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False))])
    add_adapters(plain, {"rank": 3, "alpha": 6, "dropout": 0.5, "target_modules": "all-linear"})
    for layer in (layer for _, layer in adapted_layers(plain)):
        layer.lora_B["default"].weight.normal_()
        inputs = torch.randn(2, 40, layer.in_features, generator=torch.Generator().manual_seed(1))
        assert type(layer).__name__ == "InferenceLinear"
        expected = layer.base_layer(inputs) + 2 * layer.lora_B["default"](layer.lora_A["default"](inputs))
        layer.eval()
        kept = inputs.clone()
        torch.testing.assert_close(layer(inputs), expected)
        assert torch.equal(inputs, kept)
        torch.testing.assert_close(layer(inputs.transpose(0, 1)), expected.transpose(0, 1))
        torch.testing.assert_close(layer(inputs[0, 0]), expected[0, 0])
        torch.testing.assert_close(layer(inputs[:, :3]), expected[:, :3])
        assert (layer.train()(inputs) - expected).abs().max() > 1e-3  # dropout
        layer.eval().enable_adapters(False)
        torch.testing.assert_close(layer(inputs), layer.base_layer(inputs))
        layer.enable_adapters(True)
        layer.merge()
        torch.testing.assert_close(layer(inputs), expected)
        layer.unmerge()
        torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(inputs), expected)
        torch.testing.assert_close(copy.deepcopy(layer)(inputs), expected)
