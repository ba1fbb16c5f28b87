"""What one site sends another: the side network's own tensors, the same that a saved folder holds."""

from __future__ import annotations

import re

import pytest
import torch
from model.conftest import SETTINGS, build_backbone
from safetensors.torch import load_file

from longmem import LongMemForCausalLM, MemoryBank

LORA = {"rank": 4}
FORMS = {"plain": {}, "lora": {"lora": LORA}, "own norm": {"residual": "paper", "final_norm": "side"}}


def make(backbone=None, seed=None, **fields):
    """A model on a backbone with tied embeddings, its trained weights moved at random."""
    backbone = build_backbone("llama", tie_word_embeddings=True) if backbone is None else backbone
    model = LongMemForCausalLM.from_backbone(backbone, **SETTINGS, **fields).eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.side_network.trained_parameters().values():
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("form", FORMS)
def test_it_holds_the_side_network_alone(form, tmp_path):
    model = make(**FORMS[form])
    assert model.backbone.lm_head.weight is model.backbone.model.embed_tokens.weight
    state = model.side_state_dict()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert state.keys() == saved.keys() != set()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    assert all(name.startswith("side_network.") for name in state)
    assert not storages(state.values()) & storages([*model.backbone.parameters(), *model.backbone.buffers()])
    vocabulary = model.config.get_text_config().vocab_size
    assert all(vocabulary not in tensor.shape for tensor in state.values())
    if form == "lora":
        assert all(".lora_" in name or name.endswith("memory_bias") for name in state)


def test_a_tensor_in_memory_of_the_backbone_is_never_sent():
    model = make(residual="paper", final_norm="side")
    norm = model.backbone.model.norm
    model.side_network.final_modules[0].weight = torch.nn.Parameter(norm.weight.data)  # the same memory, another object
    shares = (
        "`side_network.final_modules.0.weight` must have memory of its own, but shares that of `backbone.model.norm"
    )
    with pytest.raises(ValueError, match=re.escape(shares)):
        model.side_state_dict()


def test_it_is_a_copy():
    model = make()
    state = model.side_state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for weight in model.side_network.parameters():
            weight.add_(1)
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.side_state_dict().items())


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_mean_of_two_sites(form, input_ids, document):
    """All of federated averaging: two states, their mean, loaded by both; the bank of either stays valid."""
    backbone = build_backbone("llama", tie_word_embeddings=True)
    one, other, expected = (make(backbone, seed, **FORMS[form]) for seed in (1, 2, None))
    bank = MemoryBank.for_model(one)
    one.memorize(bank, document, document_id="a")
    apart = [model(input_ids, memory=bank).logits for model in (one, other)]
    states = [model.side_state_dict() for model in (one, other)]
    mean = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    for model in (one, other):
        model.load_side_state_dict(mean)
    # The same by hand: weights of the one, moved halfway to those that the other had.
    trained = expected.side_network.trained_parameters()
    for name, weight in trained.items():
        weight.copy_((states[0]["side_network." + name] + states[1]["side_network." + name]) / 2)
    together = [model(input_ids, memory=bank).logits for model in (one, other, expected)]
    assert torch.equal(together[0], together[1])
    assert torch.equal(together[0], together[2])
    for logits in apart:
        assert (together[0] - logits).abs().max() > 1e-3
    assert one.encoder_fingerprint() == other.encoder_fingerprint()


def broken(state, damage):
    name = sorted(state)[1]
    if damage == "missing":
        del state[name]
    elif damage == "unexpected":
        state["side_network.surplus"] = torch.zeros(1)
        name = "side_network.surplus"
    elif damage == "shape":
        state[name] = torch.zeros(3)
    elif damage == "finite":
        state[name] = state[name] * float("nan")
    else:
        state[name] = 7
    return name


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "finite", "tensor"])
def test_any_other_state_is_refused_whole(damage):
    model, state = make(seed=1), make(seed=2).side_state_dict()
    before = model.side_state_dict()
    name = broken(state, damage)
    with pytest.raises(ValueError, match=f"(?s){damage}") as caught:
        model.load_side_state_dict(state)
    assert f"`{name}`" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.side_state_dict().items())


def test_frozen_copies_under_lora_are_not_taken_from_another_site():
    model = make(lora=LORA)
    state = {"side_network." + name: tensor for name, tensor in model.side_network.state_dict().items()}
    with pytest.raises(ValueError, match="unexpected `side_network"):
        model.load_side_state_dict(state)


def test_the_mode_of_the_backbone_is_never_touched():
    """Another thread may run it while this one switches the side network's mode."""
    model, seen = make(), []
    layer = model.backbone.model.layers[0]
    layer.train = lambda mode=True: seen.append(mode)  # type: ignore[method-assign]
    model.train().eval().train()
    assert model.side_network.layers[0].training
    assert set(seen) == {False}
