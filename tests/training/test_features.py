from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny_backbone

from longmem.model.modeling import LongMemForCausalLM
from longmem.training.features import FrozenFeatures, labels_of
from longmem.training.losses import token_losses

LENGTHS = (16, 11, 2)


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone")))


@pytest.fixture(params=[dict(), dict(residual="paper", layer_reduction_factor=2, residual_states="post_norm")])
def model(backbone_folder, request):
    return LongMemForCausalLM.from_backbone(backbone_folder, num_retrieved_tokens=8, **request.param).eval()


@pytest.fixture
def input_ids():
    ids = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(1))
    return ids.masked_fill(torch.arange(16) >= torch.tensor(LENGTHS)[:, None], 0)


def everything(features):
    """Return all tensors of features, but what belongs to padding."""
    states = features.states
    found = {"losses": features.losses}
    for kind in ("hidden_states", "keys", "values"):
        for layer, tensor in getattr(states, kind).items():
            real = torch.arange(16)[:, None] < torch.tensor(LENGTHS)[:, None, None]
            found[f"{kind}.{layer}"] = tensor * (real if tensor.ndim == 3 else real[:, None])
    if states.final_states is not None:
        found["final"] = states.final_states * (torch.arange(16)[:, None] < torch.tensor(LENGTHS)[:, None, None])
    return found


def same(first, second, **tolerance):
    first, second = everything(first), everything(second)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def test_kept_features_are_those_computed(model, input_ids, tmp_path):
    plain = FrozenFeatures(model).of(input_ids, LENGTHS)
    cold = FrozenFeatures(model, tmp_path, torch.float32)
    same(cold.of(input_ids, LENGTHS), plain, rtol=0, atol=0)
    warm = FrozenFeatures(model, tmp_path, torch.float32)
    warm.of(input_ids, LENGTHS)  # finds out how layers are called, once
    calls = []
    model.run_backbone = lambda *a, **k: calls.append(a)  # type: ignore[method-assign]
    same(warm.of(input_ids, LENGTHS), plain, rtol=0, atol=0)
    assert not calls


def test_the_side_network_computes_the_same_from_kept_features(model, input_ids, tmp_path):
    kept = FrozenFeatures(model, tmp_path, torch.float32)
    kept.of(input_ids, LENGTHS)
    hidden_states, _, _ = model.side_network(kept.of(input_ids, LENGTHS).states)
    labels = labels_of(input_ids, LENGTHS)
    losses = token_losses(model, hidden_states, labels)
    for row, length in enumerate(LENGTHS):
        logits = model(input_ids[row : row + 1, :length]).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, input_ids[row, 1:length], reduction="none")
        torch.testing.assert_close(losses[row, : length - 1], expected, rtol=1e-4, atol=1e-5)
    assert (losses[labels[:, 1:] == -100] == 0).all()


def test_numbers_are_rounded_alike_when_new_and_when_read(model, input_ids, tmp_path):
    features = FrozenFeatures(model, tmp_path, torch.bfloat16)
    new, read = features.of(input_ids, LENGTHS), features.of(input_ids, LENGTHS)
    same(new, read, rtol=0, atol=0)
    plain = FrozenFeatures(model).of(input_ids, LENGTHS)
    layer = next(iter(new.states.keys))
    assert not torch.equal(new.states.keys[layer], plain.states.keys[layer])


def test_losses_are_the_backbones_own(model, input_ids):
    losses = FrozenFeatures(model).of(input_ids, LENGTHS).losses
    logits = model.backbone(input_ids).logits
    labels = labels_of(input_ids, LENGTHS)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_losses_after_a_context(model, input_ids, tmp_path):
    context, tokens = input_ids[0], input_ids[1, :11]
    logits = model.backbone(torch.cat([context, tokens])[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[16:-1], tokens[1:], reduction="none")
    features = FrozenFeatures(model, tmp_path)
    torch.testing.assert_close(features.losses_after(context, tokens), expected, rtol=1e-4, atol=1e-5)
    model.run_backbone = None  # type: ignore[method-assign]
    torch.testing.assert_close(features.losses_after(context, tokens), expected, rtol=1e-4, atol=1e-5)


def test_size_is_told_before_it_is_written(model, input_ids, tmp_path):
    features = FrozenFeatures(model, tmp_path, torch.float16)
    features.of(input_ids, LENGTHS)
    tensors = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    header = 2_000
    expected = features.bytes_per_token() * sum(LENGTHS)
    assert expected - 4 * len(LENGTHS) <= tensors <= expected + header * len(LENGTHS)


def test_a_full_folder_takes_no_more(model, input_ids, tmp_path):
    FrozenFeatures(model, tmp_path, max_gigabytes=1e-9).of(input_ids, LENGTHS)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_file_is_computed_again(model, input_ids, tmp_path, damage):
    features = FrozenFeatures(model, tmp_path, torch.float32)
    before = features.of(input_ids, LENGTHS)
    for file in tmp_path.rglob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[:100] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    same(features.of(input_ids, LENGTHS), before, rtol=0, atol=0)


def test_other_backbone_layers_or_dtype_have_other_folders(model, backbone_folder, tmp_path):
    other = LongMemForCausalLM.from_backbone(backbone_folder, memory_layers=[3], num_retrieved_tokens=8)
    folders = {
        FrozenFeatures(each, tmp_path, dtype).folder
        for each in (model, other)
        for dtype in (torch.float16, torch.float32)
    }
    with torch.no_grad():
        other.backbone.lm_head.weight.mul_(2)  # above every memory layer, but in the losses
    folders.add(FrozenFeatures(other, tmp_path).folder)
    assert len(folders) == 5


@pytest.mark.parametrize("final_norm", ["backbone", "side"])
def test_gradients_of_token_losses_are_those_of_plain_logits(backbone_folder, input_ids, final_norm):
    model = LongMemForCausalLM.from_backbone(backbone_folder, residual="paper", final_norm=final_norm)
    labels = labels_of(input_ids, LENGTHS)
    weights = torch.rand(3, 15, generator=torch.Generator().manual_seed(3))
    gradients = []
    for plain in (False, True):
        hidden_states = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(4)).requires_grad_()
        if plain:
            logits = model._backbone.logits(hidden_states, final_modules=model.side_network.final_modules)
            losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        else:
            losses = token_losses(model, hidden_states, labels)
        trained = [] if final_norm == "backbone" else list(model.side_network.final_modules.parameters())
        gradients.append(torch.autograd.grad((losses * weights).sum(), [hidden_states, *trained]))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert found.abs().max() > 0
