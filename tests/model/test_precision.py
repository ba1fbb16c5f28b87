"""Half precision, recomputation, compilation, quantized and placed backbones."""

from __future__ import annotations

from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from kept_fast import fast
from model.architectures import build
from model.conftest import SETTINGS, build_backbone
from torch import nn
from transformers import BitsAndBytesConfig

from longmem import LongMemForCausalLM, MemoryBank
from longmem.backbone.cache_names import cache_of
from longmem.backbone.structure import UnsupportedBackboneError


def make(backbone, document, **fields):
    model = LongMemForCausalLM.from_backbone(backbone, **{**SETTINGS, **fields}).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, document_id="a")
    return model, bank


def close(found, expected, tolerance):
    return (found.float() - expected).abs().max() < tolerance * expected.abs().max()


# Half precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", fast(3, ["llama", "gemma2", "gpt2", "falcon", "qwen3_next", "olmo2"]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_backbone_with_a_float32_side_network(model_type, dtype, input_ids, document):
    backbone = build(model_type).to(dtype)
    with torch.no_grad():
        plain = backbone(input_ids).logits.float()
        expected = make(build(model_type), document)[0]
    model, bank = make(backbone, document, side_network_dtype="float32")
    assert {parameter.dtype for parameter in model.side_network.parameters()} == {torch.float32}
    assert model.backbone.dtype == dtype
    with torch.no_grad():
        off, on = model(input_ids).logits, model(input_ids, memory=bank).logits
        full_bank = MemoryBank.for_model(expected)
        expected.memorize(full_bank, document, document_id="a")
        full = expected(input_ids, memory=full_bank).logits
    assert off.dtype == dtype
    assert close(off, plain, 0.05)
    assert (on.float() - full).abs().mean() < 0.1 * full.abs().mean()
    assert (on - off).abs().max() > 0.05 * off.abs().max()
    cache, parts = None, []
    with torch.no_grad():
        for part in (input_ids[:, :10], *input_ids[:, 10:].split(1, dim=1)):
            output = model(part, memory=bank, cache=cache, use_cache=True)
            cache = cache_of(output)
            parts.append(output.logits)
    assert (torch.cat(parts, dim=1).float() - on.float()).abs().mean() < 0.05 * on.float().abs().mean()
    model.train()
    model(input_ids, memory=bank, labels=input_ids).loss.backward()
    gradients = [parameter.grad for parameter in model.side_network.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "ernie4_5", "newgpt"])  # the last three keep parts in float32
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_half_precision_model_without_memory_is_its_backbone(model_type, dtype, input_ids, document):
    backbone = (build_backbone if model_type == "newgpt" else build)(model_type).to(dtype)
    plain = backbone(input_ids).logits
    model, bank = make(backbone, document)
    assert torch.equal(model(input_ids).logits, plain)
    assert (model(input_ids, memory=bank).logits - plain).abs().max() > 1e-2
    mixed, bank = make(build("llama"), document, side_network_dtype="bfloat16")
    assert close(mixed(input_ids).logits, mixed.backbone(input_ids).logits, 0.1)


@torch.no_grad()
def test_the_dtype_of_the_side_network_is_saved_with_it(input_ids, document, tmp_path):
    model, bank = make(build_backbone("llama").to(torch.bfloat16), document, side_network_dtype="float32")
    model.save_pretrained(tmp_path)
    again = LongMemForCausalLM.from_pretrained(tmp_path, backbone=model.backbone)
    assert again.side_network.dtype == torch.float32
    assert torch.equal(again(input_ids, memory=bank).logits, model(input_ids, memory=bank).logits)


def test_the_paper_form_works_in_two_dtypes(input_ids, document):
    options = dict(residual="paper", residual_states="post_norm", fusion="gated", final_norm="side")
    model, bank = make(build_backbone("llama").to(torch.bfloat16), document, side_network_dtype="float32", **options)
    reference, full_bank = make(build_backbone("llama"), document, **options)
    with torch.no_grad():
        found, expected = model(input_ids, memory=bank).logits, reference(input_ids, memory=full_bank).logits
    assert (found.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


# Gradient checkpointing ----------------------------------------------------------------------------------------------------


def loss_gradients_and_bytes(model, bank, input_ids):
    """Return loss, gradients and the bytes that autograd keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids, memory=bank, labels=input_ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.side_network.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "falcon", "qwen3_next"])
@pytest.mark.parametrize("form", [dict(), dict(fusion="gated", residual="paper")], ids=str)
def test_checkpointing_gives_the_same_gradients_for_less_memory(model_type, form, input_ids, document):
    form = {"memory_layers": [3]} if model_type == "qwen3_next" else {"memory_layers": [1, 2], **form}
    model, bank = make(build(model_type), document, **form)
    model.train()
    loss, gradients, much = loss_gradients_and_bytes(model, bank, input_ids)
    model.activation_checkpointing_enable()
    again, same_gradients, little = loss_gradients_and_bytes(model, bank, input_ids)
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    torch.testing.assert_close(same_gradients, gradients)
    assert little < 0.7 * much


def test_checkpointing_searches_once(input_ids, document, monkeypatch):
    model, bank = make(build_backbone("llama"), document)
    model.train()
    model.activation_checkpointing_enable()
    searches = []
    search = bank.search
    monkeypatch.setattr(bank, "search", lambda *args, **options: searches.append(1) or search(*args, **options))
    loss = model(input_ids, memory=bank, labels=input_ids).loss
    model.memorize(bank, document.flip(0), document_id="added meanwhile")  # adds chunks and moves none
    loss.backward()
    assert len(searches) == 1


def test_with_checkpointing_the_backward_pass_reads_what_the_forward_pass_read(input_ids, document):
    model, bank = make(build_backbone("llama"), document)
    model.train()
    model.activation_checkpointing_enable()
    trained = [each for each in model.side_network.parameters() if each.requires_grad]
    gradients = []
    for is_changed in (False, True, False):
        loss = model(input_ids, memory=bank, labels=input_ids).loss
        if is_changed:
            bank.delete("a")
            model.memorize(bank, document.flip(0), document_id="b")
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        gradients.append([each for each in found if each is not None])
    assert all(map(torch.equal, *gradients[:2]))
    assert not all(map(torch.equal, *gradients[1:]))  # so the change mattered


def test_every_second_layer_can_be_checkpointed_and_none_again(input_ids, document):
    model, _ = make(build_backbone("llama"), document, memory_layers=[0])
    model.activation_checkpointing_enable(every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in model.side_network.layers] == [True, False, True, False]
    model.activation_checkpointing_disable()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_what_checkpointing_refuses(input_ids, document):
    model, bank = make(build_backbone("llama"), document)
    with pytest.raises(ValueError, match="`use_reentrant` must be False"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    model.activation_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="`use_cache` must be False"):
        model(input_ids, memory=bank, use_cache=True)
    model.eval()
    assert model.generate(input_ids, memory=bank, max_new_tokens=2).shape == (2, 26)


# Compilation ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compiler", "trains"),
    [
        pytest.param("eager", False, marks=pytest.mark.slow),
        pytest.param("eager", True, marks=pytest.mark.slow),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_side_network_computes_the_same(compiler, trains, input_ids, document, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # shape checks can't be compiled
    model, bank = make(build_backbone("llama"), document)
    expected = loss_gradients_and_bytes(model.train(), bank, input_ids)[:2] if trains else None
    with torch.no_grad():
        logits = model.eval()(input_ids, memory=bank).logits
    torch._dynamo.reset()
    model.side_network.compile(backend=compiler)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids, memory=bank).logits, logits, rtol=1e-4, atol=1e-5)
    if trains:
        found = loss_gradients_and_bytes(model.train(), bank, input_ids)[:2]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


# Quantized and placed backbones --------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer quantized as libraries do: integer weights, a scale per output, no plain weight to copy."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, (self.weight * self.scale).to(inputs.dtype), self.bias)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])  # without and with biases
def test_quantized_layers_are_copied_as_layers_that_can_be_trained(model_type, input_ids, document):
    backbone = build_backbone(model_type)
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child is not backbone.get_output_embeddings():
                setattr(module, name, Int8Linear(child))
    with torch.no_grad():
        plain = backbone(input_ids).logits
    model, bank = make(backbone, document)
    assert not any(isinstance(module, Int8Linear) for module in model.side_network.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, plain, rtol=1e-4, atol=1e-4)
    model.train()
    model(input_ids, memory=bank, labels=input_ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(name.endswith(("down_proj.weight", "dense.weight")) for name in trained)
    assert all(name.startswith("side_network.") for name in trained)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_backbones(bits, input_ids, document, tmp_path):
    pytest.importorskip("bitsandbytes")
    build_backbone("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    options = {"quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True})}
    model = LongMemForCausalLM.from_backbone(str(tmp_path), backbone_options=options, **SETTINGS).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, document_id="a")
    with torch.no_grad():
        plain, off = model.backbone(input_ids).logits, model(input_ids).logits
        on = model(input_ids, memory=bank).logits
    assert close(off, plain, 0.1)
    assert (on - off).abs().max() > 1e-2


PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


def place(tmp_path, document, **offloaded):
    build_backbone("llama").save_pretrained(tmp_path / "model")
    places = {**PLACES, **{f"model.layers.{n}": offloaded.get(f"layer{n}", "cpu") for n in range(4)}}
    places["model.embed_tokens"] = offloaded.get("embeddings", "cpu")
    options = {"device_map": places, "offload_folder": str(tmp_path / "offloaded")}
    model = LongMemForCausalLM.from_backbone(str(tmp_path / "model"), backbone_options=options, **SETTINGS).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, document_id="a")
    return SimpleNamespace(model=model, bank=bank)


@torch.no_grad()
def test_a_device_map_may_offload_the_lower_layers(input_ids, document, tmp_path):
    placed = place(tmp_path, document, layer0="disk", embeddings="disk")
    model, bank = make(build_backbone("llama"), document)
    assert placed.bank.fingerprint == bank.fingerprint
    expected = model(input_ids, memory=bank).logits
    torch.testing.assert_close(placed.model(input_ids, memory=placed.bank).logits, expected)
    generated = placed.model.generate(input_ids, memory=placed.bank, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(input_ids, memory=bank, max_new_tokens=4, do_sample=False))


def test_a_device_map_may_not_offload_what_is_trained(document, tmp_path):
    with pytest.raises(UnsupportedBackboneError, match="offloaded"):
        place(tmp_path, document, layer3="disk")
