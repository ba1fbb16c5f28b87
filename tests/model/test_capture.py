"""The frozen backbone: what it yields, where it stops, that it stays frozen."""

import pytest
import torch
from model.conftest import build_backbone
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, StaticCache

from longmem.backbone.capture import Backbone
from longmem.backbone.structure import UnsupportedBackboneError


def test_hidden_states_are_the_models_own(backbone, input_ids):
    expected = backbone(input_ids, output_hidden_states=True).hidden_states
    states = Backbone(backbone).run(input_ids, hidden_layers=[0, 2, 4], with_final_states=True)
    assert sorted(states.hidden_states) == [0, 2, 4]
    for layer in (0, 2):
        torch.testing.assert_close(states.hidden_states[layer], expected[layer], rtol=0, atol=0)
    torch.testing.assert_close(states.final_states, expected[4], rtol=0, atol=0)
    assert (states.hidden_states[4] - states.final_states).abs().max() > 1e-3  # before the norm is not after it


def test_logits_of_the_last_state_are_the_models_own(backbone, input_ids):
    expected = backbone(input_ids).logits
    captured = Backbone(backbone)
    states = captured.run(input_ids, hidden_layers=[4])
    torch.testing.assert_close(captured.logits(states.hidden_states[4]), expected, rtol=0, atol=0)
    torch.testing.assert_close(captured.logits(states.hidden_states[4], 3), expected[:, -3:], rtol=0, atol=1e-6)


def test_keys_do_not_depend_on_where_the_text_stands(backbone, input_ids):
    captured = Backbone(backbone)
    if captured.structure.layers[0].rotary is None:
        pytest.skip("absolute positions: keys hold them")
    positions = torch.arange(24)[None]
    keys, values = captured.encode(input_ids, [1, 3], position_ids=positions)
    moved_keys, moved_values = captured.encode(input_ids, [1, 3], position_ids=positions + 40)
    for one, other in zip([*keys, *values], [*moved_keys, *moved_values], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_keys_are_the_projections_before_rotation(llama, input_ids):
    seen = {}
    attention = llama.model.layers[2].self_attn
    attention.k_proj.register_forward_hook(lambda module, args, output: seen.update(keys=output))
    attention.v_proj.register_forward_hook(lambda module, args, output: seen.update(values=output))
    (keys,), (values,) = Backbone(llama).encode(input_ids, [2])
    torch.testing.assert_close(keys, seen["keys"].view(2, 24, 2, 8).transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, seen["values"].view(2, 24, 2, 8).transpose(1, 2), rtol=0, atol=0)


def test_scaled_rotary_embeddings_are_undone_too(input_ids):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    llama = build_backbone("llama", rope_parameters=rope, max_position_embeddings=256)
    seen = {}
    llama.model.layers[2].self_attn.k_proj.register_forward_hook(lambda m, a, output: seen.update(keys=output))
    assert llama.model.rotary_emb.attention_scaling != 1
    (keys,), _ = Backbone(llama).encode(input_ids, [2])
    torch.testing.assert_close(keys, seen["keys"].view(2, 24, 2, 8).transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_encoding_stops_at_the_highest_memory_layer(llama, input_ids):
    calls: list[str] = []
    captured = Backbone(llama)
    for name, module in llama.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    captured.encode(input_ids, [0, 2])
    assert "model.layers.2.self_attn.k_proj" in calls
    assert "model.layers.2.self_attn.o_proj" not in calls
    assert not [name for name in calls if name.startswith(("model.layers.3", "lm_head"))]


def test_run_and_encode_agree(backbone, input_ids):
    captured = Backbone(backbone)
    states = captured.run(input_ids, hidden_layers=[], memory_layers=[1, 2])
    keys, values = captured.encode(input_ids, [1, 2])
    for layer, key, value in zip([1, 2], keys, values, strict=True):
        torch.testing.assert_close(states.keys[layer], key, rtol=0, atol=0)
        torch.testing.assert_close(states.values[layer], value, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])  # the last with layers that slide
def test_keys_of_new_tokens_are_theirs_also_in_a_cache_of_fixed_size(model_type, input_ids):
    captured = Backbone(build_backbone(model_type))
    layers = {"hidden_layers": [4], "memory_layers": [1, 2]}
    whole = captured.run(input_ids, **layers)
    cache = StaticCache(config=captured.model.config, max_cache_len=64)
    parts = []
    for start, stop in ((0, 3), (3, 15), (15, 16), (16, 24)):
        inputs = {"use_cache": True, "cache": cache}
        parts.append(captured.run(input_ids[:, start:stop], **layers, **inputs))
    for name in ("keys", "values"):
        for layer, expected in getattr(whole, name).items():
            found = torch.cat([getattr(part, name)[layer] for part in parts], dim=2)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_it_stays_frozen_whatever_the_caller_does(input_ids):
    gpt2 = build_backbone("gpt2")  # has dropout
    captured = Backbone(gpt2)
    before, _ = captured.encode(input_ids, [2])
    gpt2.train().requires_grad_(True)
    after, _ = captured.encode(input_ids, [2])
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert not gpt2.training
    assert not any(parameter.requires_grad for parameter in gpt2.parameters())


def test_the_backbone_still_works_on_its_own(backbone, input_ids):
    expected = backbone(input_ids).logits
    Backbone(backbone)
    torch.testing.assert_close(backbone(input_ids).logits, expected, rtol=0, atol=0)
    Backbone(backbone)  # a second model may share it
    torch.testing.assert_close(backbone(input_ids).logits, expected, rtol=0, atol=0)


def test_attention_outside_the_registry_is_refused():
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(UnsupportedBackboneError, match="Bloom"):
        Backbone(bloom)
