"""A writer that is trained along: where gradients go, what stays detached, what is saved, copied and refused."""

from __future__ import annotations

import copy

import pytest
import torch
from model.conftest import BACKBONES, SETTINGS, build_backbone

from experiments.coupled_writer.writer import couple, decouple
from longmem import LongMemForCausalLM, MemoryBank
from longmem.backbone.cache_names import cache_of
from longmem.backbone.capture import Backbone
from longmem.errors import StaleMemoryError
from longmem.memory.refresh import UNBOUNDED

FORMS = {
    "paper": {"residual": "paper", "fusion": "gated", "layer_reduction_factor": 2},
    "upper half": {},
    "all layers, R = 2": {"layer_reduction_factor": 2, "memory_layers": [2]},
    "post_norm": {
        "residual": "paper",
        "residual_states": "post_norm",
        "layer_reduction_factor": 2,
        "final_norm": "side",
    },
}


def make(model_type="llama", **fields):
    model = LongMemForCausalLM.from_backbone(build_backbone(model_type), **{**SETTINGS, **fields}).eval()
    with torch.no_grad():  # or nothing of a new side network with residual="paper" differs from the backbone
        for weight in model.side_network.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    return model


def memorized(model, document, refresh=UNBOUNDED):
    bank = MemoryBank.for_model(model, refresh=refresh)
    model.memorize(bank, document, "a")
    return bank


def gradients(model):
    return {name for name, weight in model.backbone.named_parameters() if weight.grad is not None and weight.grad.any()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", sorted(BACKBONES))
def test_gradients_reach_what_is_said_to_be_trained_and_nothing_else(model_type, form, input_ids, document):
    model = make(model_type, **FORMS[form])
    model(input_ids, memory=memorized(model, document), labels=input_ids).loss.backward()
    assert gradients(model) == set()
    trained = couple(model).parameters
    model(input_ids, memory=memorized(model, document), labels=input_ids).loss.backward()
    # A bias of keys shifts all scores of a softmax alike: its gradient is rounding at most.
    without = {name for name in trained if name.endswith(("k_proj.bias", "query_key_value.bias", "c_attn.bias"))}
    assert gradients(model) - without == set(trained) - without
    assert all(weight.requires_grad == (name in trained) for name, weight in model.backbone.named_parameters())
    assert len(trained) > 2


def test_gradients_are_those_of_a_finite_difference(input_ids, document):
    model = make(memory_layers=[2])
    name = "model.layers.0.mlp.up_proj.weight"
    weight = couple(model).parameters[name]
    bank = memorized(model, document[:16])  # all of it is retrieved: no step from one choice to another
    direction = torch.randn_like(weight)
    probe = torch.randn(*input_ids.shape, model.config.get_text_config().vocab_size)

    def projected():
        return (model(input_ids, memory=bank).logits * probe).double().sum()

    projected().backward()
    assert weight.grad is not None
    with torch.no_grad():
        weight.add_(direction, alpha=1e-3)
        above = projected()
        weight.add_(direction, alpha=-2e-3)
        below = projected()
    assert ((above - below) / 2e-3).item() == pytest.approx((weight.grad * direction).sum().item(), rel=1e-3)


@pytest.mark.parametrize("average", [None, 0.9])
def test_what_is_stored_has_no_gradient(average, input_ids):
    model = make()
    couple(model, average=average)
    output = model(input_ids, output_memory_keys=True)
    assert output.logits.requires_grad
    keys, values = model.encode(input_ids)
    assert len(keys) == len(output.memory_keys) > 0
    for tensor in (*output.memory_keys, *output.memory_values, *keys, *values):
        assert not tensor.requires_grad
    with torch.no_grad():
        assert not model(input_ids).logits.requires_grad


@torch.no_grad()
def test_coupling_changes_no_number_until_the_writer_moves(input_ids, document):
    model = make()
    bank = memorized(model, document)
    expected = model(input_ids, memory=bank, output_memory_keys=True)
    couple(model)
    again = model(input_ids, memory=memorized(model, document), output_memory_keys=True)
    assert torch.equal(again.logits, expected.logits)
    assert all(map(torch.equal, again.memory_keys, expected.memory_keys))
    move(model)
    moved = model(input_ids, memory=memorized(model, document), output_memory_keys=True)
    assert not torch.equal(moved.logits, expected.logits)
    assert not torch.equal(moved.memory_keys[0], expected.memory_keys[0])


def test_the_side_network_is_trained_by_the_same_gradients(input_ids, document):
    model = make()

    def side_gradients():
        model.zero_grad()
        model(input_ids, memory=memorized(model, document), labels=input_ids).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.side_network.named_parameters()}

    frozen = side_gradients()
    couple(model)
    coupled = side_gradients()
    move(model)
    moved = side_gradients()
    assert all(torch.equal(gradient, frozen[name]) for name, gradient in coupled.items())
    assert not any(torch.equal(gradient, frozen[name]) for name, gradient in moved.items())


@torch.no_grad()
def move(model, seed=0):
    """Move the writer as an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.backbone_view.parameters.values():
        weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    model.backbone_view.moved()


def test_the_average_is_the_naive_one_and_it_alone_writes(input_ids):
    model = make()
    naive = copy.deepcopy(model.backbone)
    couple(model, average=0.75)
    for seed in range(4):
        move(model, seed)
        for name, weight in naive.named_parameters():
            now = model.backbone.get_parameter(name)
            weight.data = 0.75 * weight.data + 0.25 * now.data
    assert model.backbone_view.version == 4
    for name, weight in naive.named_parameters():
        torch.testing.assert_close(model.backbone_view.average.model.get_parameter(name), weight, rtol=1e-6, atol=1e-6)
    expected, _ = LongMemForCausalLM.from_backbone(naive, **SETTINGS).encode(input_ids)
    own, _ = Backbone.encode(model.backbone_view, input_ids, model.config.memory_layers)
    for found, written, averaged, trained in zip(
        model.encode(input_ids)[0], model(input_ids, output_memory_keys=True).memory_keys, expected, own, strict=True
    ):
        assert torch.equal(found, written)
        torch.testing.assert_close(found, averaged, rtol=1e-4, atol=1e-4)
        assert (found - trained).abs().max() > 0.1


def test_with_an_average_a_cache_is_refused(input_ids):
    model = make()
    couple(model, average=0.9)
    with pytest.raises(ValueError, match=r"`cache` must be None .* `decouple`"):
        model(input_ids, use_cache=True, output_memory_keys=True)
    decouple(model)
    assert cache_of(model(input_ids, use_cache=True)) is not None


def test_each_move_makes_another_encoder_and_policies_act(input_ids, document):
    model = make()
    stamps, banks = [], []

    def remember():
        stamps.append(model.encoder_fingerprint())
        banks.append(memorized(model, document, "frozen"))
        model(input_ids, memory=banks[-1])

    remember()
    couple(model)
    remember()
    for seed in range(2):
        move(model, seed)
        remember()
    decouple(model)
    remember()
    assert len(set(stamps)) == 5
    for bank in banks[:-1]:
        with pytest.raises(StaleMemoryError):
            model(input_ids, memory=bank)
    assert gradients(model) == set()


@pytest.mark.parametrize("average", [None, 0.5])
@torch.no_grad()
def test_a_bank_is_read_as_it_is_or_encoded_again_as_its_policy_says(average, input_ids, document):
    model = make()
    couple(model, average=average)
    old, eager = memorized(model, document), memorized(model, document, "eager")
    move(model)
    new = memorized(model, document)
    stale, refreshed, fresh = (model(input_ids, memory=bank).logits for bank in (old, eager, new))
    assert torch.equal(refreshed, fresh)
    assert not torch.equal(stale, fresh)
    assert (old.freshness.refreshed.tokens, eager.freshness.refreshed.tokens) == (0, len(document))
    assert old.freshness.lags().values.tolist()[:-1] == [1, 0]


def test_a_decoupled_writer_that_never_moved_is_the_one_it_was(input_ids, document):
    model = make()
    bank = memorized(model, document, "frozen")
    couple(model)
    decouple(model)
    model(input_ids, memory=bank, labels=input_ids).loss.backward()
    assert gradients(model) == set()


def test_a_deep_copy_moves_by_itself(input_ids, document):
    model = make()
    couple(model, average=0.9)
    move(model)
    bank = memorized(model, document)
    expected = model(input_ids, memory=bank).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(input_ids, memory=bank).logits, expected)
    assert all(other.backbone.get_parameter(name) is weight for name, weight in other.backbone_view.parameters.items())
    move(other)
    assert (model.backbone_view.version, other.backbone_view.version) == (1, 2)
    assert not torch.equal(other(input_ids, memory=bank).logits, expected)
    assert not torch.equal(other.encode(input_ids)[0][0], model.encode(input_ids)[0][0])
    assert torch.equal(model(input_ids, memory=bank).logits, expected)
    other(input_ids, labels=input_ids).loss.backward()
    assert gradients(other) == set(other.backbone_view.parameters)
    assert gradients(model) == set()


def test_a_backbone_that_another_model_froze_is_no_longer_trained_in_silence(input_ids):
    model = make()
    couple(model)
    LongMemForCausalLM.from_backbone(model.backbone, **SETTINGS)
    with pytest.raises(ValueError, match="another model that shares the backbone"):
        model(input_ids)
    decouple(model)(input_ids)


def test_a_trained_backbone_is_saved_or_saving_is_refused(input_ids, document, tmp_path):
    model = make()
    couple(model)
    move(model)
    for _ in range(2):  # coupled, and when it no longer is
        with pytest.raises(ValueError, match=r"`save_backbone` must be True .* `save_pretrained\(folder, save_bac"):
            model.save_pretrained(tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        decouple(model)
    model.save_pretrained(tmp_path / "saved", save_backbone=True)
    assert "in `backbone`, the backbone" in (tmp_path / "saved" / "README.md").read_text()
    (tmp_path / "saved").rename(tmp_path / "elsewhere")
    again = LongMemForCausalLM.from_pretrained(tmp_path / "elsewhere")
    bank = memorized(again, document)
    assert torch.equal(again(input_ids, memory=bank).logits, model(input_ids, memory=bank).logits)
    again.save_pretrained(tmp_path / "named")  # frozen, and named by its folder


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: couple(model, average=1.0), "`average` must be above 0 and below 1, got 1.0"),
        (lambda model: couple(model, average=0), "`average` must be above 0 and below 1, got 0"),
        (lambda model: (couple(model), couple(model)), "needs a frozen writer"),
        (lambda model: couple(model.bfloat16()), "must be on its devices in float32"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())
