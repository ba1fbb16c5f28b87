"""The kinds of staleness S1 to S9: each is noticed or impossible, and what makes nothing stale is let through."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from model.architectures import ARCHITECTURES, FORMS, build
from model.conftest import SETTINGS, build_backbone
from tiny_models import save_tiny_backbone
from torch import nn

from longmem import LongMemForCausalLM, MemoryBank, StaleMemoryError

LAYER = 2  # the memory layer of these models, which have four
CHANGES = dict(memory_layers=[LAYER], chunk_size=4)


@functools.cache
def original(**backbone_changes) -> LongMemForCausalLM:
    backbone = build_backbone("llama", **backbone_changes)
    return LongMemForCausalLM.from_backbone(backbone, **SETTINGS, **CHANGES).eval()


def model_of(backbone=None, **fields) -> LongMemForCausalLM:
    """Return a model of its own, with the same backbone unless another one is given."""
    if backbone is None and not fields:
        return copy.deepcopy(original())
    backbone = build_backbone("llama") if backbone is None else backbone
    return LongMemForCausalLM.from_backbone(backbone, **{**SETTINGS, **CHANGES, **fields}).eval()


def read(model: LongMemForCausalLM, bank: MemoryBank) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 29)[None], memory=bank).logits


def bank_of(model: LongMemForCausalLM, **options) -> MemoryBank:
    bank = MemoryBank.for_model(model, **{"storage_dtype": "float32", **options})
    model.memorize(bank, torch.arange(80) % 90, "d")
    return bank


def layer_of(model: LongMemForCausalLM, number: int) -> nn.Module:
    return model.backbone.model.layers[number]


# What a user does to the model of a bank.


def fused_adamw(model):
    parameters = [each.requires_grad_() for each in model.backbone.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    model.backbone(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    for each in parameters:
        each.requires_grad_(False)
    return model


def write_through_data(model):
    layer_of(model, 1).mlp.down_proj.weight.data.mul_(1.01)
    return model


def merge_in_place(model):
    weight = layer_of(model, 0).self_attn.v_proj.weight
    weight.data += 0.01 * torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])
    return model


class Adapter(nn.Module):
    """A linear layer with a low-rank addition that starts at zero, as LoRA's does."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.requires_grad_(False)

    def forward(self, states):
        return self.base(states) + self.up(self.down(states))


def put_adapter(model):
    layer = layer_of(model, 1).self_attn
    layer.k_proj = Adapter(layer.k_proj).eval()
    return model


def train_adapter(model):
    with torch.no_grad():
        layer_of(model, 1).self_attn.k_proj.up.weight.add_(0.01)
    return model


def load_other_weights(model):
    model.backbone.load_state_dict({name: each * 1.01 for name, each in model.backbone.state_dict().items()})
    return model


def replace_a_parameter(model):
    embedding = model.backbone.get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight * 1.01, requires_grad=False)
    return model


def the_memory_layers_own(name):
    def change(model):
        with torch.no_grad():
            layer_of(model, LAYER).get_submodule(name).weight.mul_(1.01)
        return model

    return change


def train_mode(model):
    model.backbone.train()
    return model


def train_mode_of_one_module(model):
    layer_of(model, 0).self_attn.train()
    return model


def require_a_gradient(model):
    model.backbone.get_input_embeddings().weight.requires_grad_()
    return model


S1 = {
    "one step of fused AdamW": fused_adamw,
    "a write through .data": write_through_data,
    "LoRA merged in place": merge_in_place,
    "an adapter put into the backbone": put_adapter,
    "load_state_dict": load_other_weights,
    "a parameter put in another's place": replace_a_parameter,
    "key projection of the memory layer": the_memory_layers_own("self_attn.k_proj"),
    "value projection of the memory layer": the_memory_layers_own("self_attn.v_proj"),
    "norm of the memory layer": the_memory_layers_own("input_layernorm"),
}
S3 = {
    "training mode": train_mode,
    "training mode of one module": train_mode_of_one_module,
    "a weight of the path requires a gradient": require_a_gradient,
}


@pytest.mark.parametrize("change", [pytest.param(each, id=name) for name, each in {**S1, **S3}.items()])
def test_a_changed_encoder_is_noticed_at_the_next_read(change):
    model = model_of()
    bank = bank_of(model)
    read(model, bank)  # negative control: nothing was changed
    changed = change(model)
    for _ in range(2):  # it is not forgotten, either
        with pytest.raises(StaleMemoryError):
            read(changed, bank)
    with pytest.raises(StaleMemoryError):
        changed.memorize(bank, torch.arange(40), "second")
    assert "second" not in bank


@pytest.mark.parametrize("change", [pytest.param(each, id=name) for name, each in S1.items()])
@pytest.mark.parametrize("refresh", ["eager", "lazy"])
def test_a_changed_encoder_is_followed_by_other_policies(change, refresh):
    model = model_of()
    bank = bank_of(model, refresh=refresh)
    read(model, bank)
    changed = change(model)
    logits = read(changed, bank)
    torch.testing.assert_close(logits, read(changed, bank_of(changed)), rtol=0, atol=0)
    assert bank.freshness.refreshed.tokens == 80


def test_an_adapter_is_noticed_when_it_is_put_in_and_when_it_moves():
    model = put_adapter(model_of())
    bank = bank_of(model)
    read(model, bank)
    with pytest.raises(StaleMemoryError, match="weights"):
        read(train_adapter(model), bank)


def test_a_tied_head_that_is_tuned_is_noticed_before_the_next_step_and_after_it():
    model = LongMemForCausalLM.from_backbone(build_backbone("llama", tie_word_embeddings=True), **SETTINGS, **CHANGES)
    bank = bank_of(model.eval())
    head = model.backbone.get_output_embeddings().weight
    assert head is model.backbone.get_input_embeddings().weight
    optimizer = torch.optim.SGD([head.requires_grad_()], lr=0.1)
    with pytest.raises(StaleMemoryError, match=r"embed_tokens.weight` requires a gradient"):
        read(model, bank)
    assert head.requires_grad, "the refusal changes nothing"
    nn.functional.linear(torch.ones(1, 32), head).sum().backward()
    optimizer.step()
    with pytest.raises(StaleMemoryError, match="requires a gradient"):
        read(model, bank)
    head.requires_grad_(False)
    with pytest.raises(StaleMemoryError, match="weights"):
        read(model, bank)


def untied_head(model):
    with torch.no_grad():
        model.backbone.get_output_embeddings().weight.add_(0.1)
    return model


def layers_above(model):
    with torch.no_grad():
        for weight in layer_of(model, LAYER + 1).parameters():
            weight.add_(0.1)
        model.backbone.model.norm.weight.add_(0.1)
    return model


def rest_of_the_memory_layer(model):
    with torch.no_grad():
        layer = layer_of(model, LAYER)
        for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp, layer.post_attention_layernorm):
            for weight in module.parameters():
                weight.add_(0.1)
    return model


def a_step_of_the_side_network(model):
    model.train()
    optimizer = torch.optim.AdamW(model.side_network.parameters(), lr=1e-2)
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    return model.eval()


def layers_above_trained(model):
    layer_of(model, LAYER + 1).requires_grad_()
    return model


HARMLESS = [untied_head, layers_above, rest_of_the_memory_layer, a_step_of_the_side_network, layers_above_trained]


@pytest.mark.parametrize("change", HARMLESS)
def test_what_nothing_stored_depends_on_may_change(change):
    model = model_of()
    bank = bank_of(model)
    keys = [layer.clone() for layer in model.encode(torch.arange(20)[None])[0]]
    digest = bank.fingerprint
    before = read(model, bank), model.backbone(torch.arange(20)[None]).logits
    changed = change(model)
    after = read(changed, bank), model.backbone(torch.arange(20)[None]).logits
    assert changed.encoder_stamp(exact=True).digest == digest
    assert all(torch.equal(*pair) for pair in zip(keys, changed.encode(torch.arange(20)[None])[0], strict=True))
    same = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert all(same) == (change is layers_above_trained), "something else has changed"


# S2: a bank of one encoder, read with another.


def with_tokenizer(folder, letters):
    """Return a model whose tokenizer knows one more token, where `letters` says so, and whose weights are the same."""
    backbone = build_backbone("llama")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_backbone(folder))
    if letters:
        tokenizer.add_tokens([letters])
    return LongMemForCausalLM.from_backbone(backbone, tokenizer=tokenizer, **SETTINGS, **CHANGES).eval()


S2: dict[str, tuple[Callable[..., LongMemForCausalLM], str]] = {
    "another checkpoint": (lambda: load_other_weights(model_of()), "weights"),
    "another dtype": (lambda: model_of(build_backbone("llama").to(torch.bfloat16)), "dtype"),
    "another memory layer": (lambda: model_of(memory_layers=[1]), "memory.layers"),
    "another chunk size": (lambda: model_of(chunk_size=8), "chunk"),
    "another segment length": (lambda: model_of(segment_length=64), "segment_length"),
    "another rope_theta": (
        lambda: model_of(build_backbone("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
        "backbone.rope_parameters",
    ),
}


@pytest.mark.parametrize("kind", S2)
def test_a_bank_of_another_encoder_is_refused(kind, tmp_path):
    make, field = S2[kind]
    model = model_of()
    bank = bank_of(model)
    bank.save(tmp_path / "bank")
    other = make()
    for opened in (
        lambda: read(other, bank),
        lambda: MemoryBank.load(tmp_path / "bank", other),
        lambda: MemoryBank.open(tmp_path / "bank", other),
        lambda: other.memorize(bank, torch.arange(30), "second"),
    ):
        with pytest.raises(ValueError, match=field):
            opened()
    assert bank.documents()[0].document_id == "d"
    same = model_of()  # negative control
    torch.testing.assert_close(read(same, MemoryBank.load(tmp_path / "bank", same)), read(model, bank), rtol=0, atol=0)


def test_another_tokenizer_over_the_same_weights_is_refused(tmp_path):
    models = [with_tokenizer(tmp_path / "tokenizer", letters) for letters in ("", "", "zebra")]
    assert len({model.encoder_fingerprint() for model in models}) == 1
    bank = bank_of(models[0])
    bank.save(tmp_path / "bank")
    read(models[1], bank)
    for opened in (
        lambda: read(models[2], bank),
        lambda: MemoryBank.load(tmp_path / "bank", models[2]),
        lambda: models[2].memorize(bank, "some text", "second"),
    ):
        with pytest.raises(StaleMemoryError, match="tokenizer"):
            opened()
    MemoryBank.load(tmp_path / "bank", models[1])


def test_a_bank_is_read_as_it_is_where_its_owner_says_so(tmp_path):
    model, other = model_of(), load_other_weights(model_of())
    bank = bank_of(model)
    bank.save(tmp_path / "bank")
    as_it_is = MemoryBank.load(tmp_path / "bank", other, strict=False)
    assert [each.version for each in as_it_is.segments("d")] == [-1] * 3
    assert not torch.equal(read(other, as_it_is), read(other, bank_of(other)))
    same = MemoryBank.load(tmp_path / "bank", model, strict=False)
    assert all(each.version == 0 for each in same.segments("d"))
    # Nothing of it is taken for what the model would write.
    before = as_it_is.freshness.refreshed.tokens
    assert as_it_is.update("d", torch.arange(80) % 90, model=other) == 80
    torch.testing.assert_close(read(other, as_it_is), read(other, bank_of(other)), rtol=0, atol=0)
    assert as_it_is.freshness.refreshed.tokens == before


# S4 to S9.


def test_s4_what_was_replaced_or_deleted_is_never_found():
    model = model_of()
    bank = bank_of(model)
    model.memorize(bank, torch.arange(40, 80), "other")
    bank.update("d", torch.arange(20, 60), model=model)
    assert bank.token_ids("d").tolist() == list(range(20, 60))
    bank.delete("other")
    found = bank.locate(bank.search(LAYER, torch.ones(2, 1, 8), bank.num_chunks).rows)
    assert {place.document_id for place in found} == {"d"}
    assert max(place.stop for place in found) == 40


def test_s5_an_edit_changes_what_was_encoded_behind_it_to_the_end_of_its_window():
    model = model_of()
    ids = torch.arange(96) % 90
    edited = ids.clone()
    edited[34] = 7
    bank, fresh = (MemoryBank.for_model(model, storage_dtype="float32") for _ in range(2))
    model.memorize(bank, ids, "d")
    old = bank.gather(LAYER, torch.arange(24).expand(2, -1), bank.generation)[0].clone()
    assert bank.update("d", edited, model=model) == 32  # its window, and no other
    model.memorize(fresh, edited, "d")
    new = bank.gather(LAYER, bank._table.ledger.documents["d"].rows.values.expand(2, -1), bank.generation)[0]
    assert torch.equal(new, fresh.gather(LAYER, torch.arange(24).expand(2, -1), fresh.generation)[0])
    differs = (new != old).flatten(2).any(dim=2).any(dim=0)
    assert not differs[:8].any()
    assert differs[8:16].all()
    assert not differs[16:].any()


def test_s6_a_row_reads_its_own_bank_and_a_view_its_own_documents():
    model = model_of()
    banks = [bank_of(model), MemoryBank.for_model(model, storage_dtype="float32")]
    model.memorize(banks[1], torch.arange(89, 9, -1), "other")
    ids = torch.arange(5, 29).repeat(2, 1)
    with torch.no_grad():
        both = model(ids, memory=banks).logits
        alone = [model(ids[:1], memory=bank).logits for bank in banks]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    model.memorize(banks[0], torch.arange(89, 9, -1), "other")
    assert not torch.equal(read(model, banks[0]), alone[0])
    torch.testing.assert_close(read(model, banks[0].select("d")), alone[0], rtol=1e-4, atol=1e-4)


def test_s8_nothing_is_visible_before_it_has_been_read():
    """A forward writes nothing, and what a stream predicts does not depend on what follows."""
    model = model_of()
    bank = bank_of(model)
    version = bank.version
    read(model, bank)
    assert bank.num_chunks == 20
    assert bank.version == version
    ids = torch.randint(0, 90, (120,), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[70:] = 3
    losses = []
    for tokens in (ids, changed):
        losses.append(model.stream(MemoryBank.for_model(model)).score(tokens))
    assert torch.equal(losses[0][1:70], losses[1][1:70])
    assert not torch.equal(losses[0][70:], losses[1][70:])


def test_s9_nothing_of_a_search_is_kept_between_calls():
    """A reader whose queries have moved finds what a new reader with these queries finds."""
    model = model_of()
    bank = bank_of(model)
    before = model(torch.arange(5, 29)[None], memory=bank, output_memory_reads=True).memory_reads[0].rows
    with torch.no_grad():
        for name, weight in model.side_network.named_parameters():
            if "q_proj" in name:
                weight.copy_(torch.randn_like(weight))
    found = model(torch.arange(5, 29)[None], memory=bank, output_memory_reads=True).memory_reads[0].rows
    new = model_of()
    new.side_network.load_state_dict(model.side_network.state_dict())
    again = new(torch.arange(5, 29)[None], memory=bank_of(new), output_memory_reads=True).memory_reads[0].rows
    assert torch.equal(found, again)
    assert not torch.equal(before, found)


def test_s9_a_backward_pass_reads_what_its_forward_read():
    model = model_of().train()
    bank = bank_of(model, refresh="lazy")
    trained = [each for each in model.side_network.parameters() if each.requires_grad]
    gradients = []
    for is_refreshed in (False, True):
        loss = model(torch.arange(5, 29)[None], labels=torch.arange(5, 29)[None], memory=bank).loss
        if is_refreshed:  # as another thread does
            bank.freshness.reencode(load_other_weights(model_of()))
        gradients.append(torch.autograd.grad(loss, trained, allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_outputs_with_frozen_are_those_of_an_unchecked_bank():
    model = model_of()
    checked, unchecked = bank_of(model), MemoryBank(storage_dtype="float32", **CHANGES)
    model.memorize(unchecked, torch.arange(80) % 90, "d")
    assert unchecked.fingerprint is None
    assert torch.equal(read(model, checked), read(model, unchecked))
    assert not torch.equal(read(model, checked), model(torch.arange(5, 29)[None]).logits)
    assert checked.freshness.refreshed.tokens == 0


def test_everything_masked_is_as_without_memory():
    model = model_of()
    bank = bank_of(model, refresh="bounded:max_lag=0,on_violation=mask")
    write_through_data(model)
    assert torch.equal(read(model, bank), read(model, bank.empty_like()))
    assert not torch.equal(read(model, bank), read(model, bank_of(model)))


def test_a_stream_does_not_write_under_the_name_of_an_encoder_that_is_gone():
    model = model_of()
    bank = MemoryBank.for_model(model, storage_dtype="float32")
    stream = model.stream(bank)
    stream.read(torch.arange(60))
    chunks = bank.num_chunks
    write_through_data(model)
    with pytest.raises(StaleMemoryError):
        stream.read(torch.arange(30))
    assert bank.num_chunks == chunks


def test_the_documents_of_streams_come_out_as_if_written_fresh():
    models = [model_of(), write_through_data(model_of())]
    banks = []
    for model in models:
        bank = MemoryBank.for_model(model, storage_dtype="float32", refresh="eager")
        model.stream(bank, window=30, keep=10).read(torch.arange(89))
        banks.append(bank)
    old, fresh = banks
    assert len(old.segments("stream")) > 2
    read(models[1], old)
    rows = torch.arange(old.num_chunks).expand(2, -1)
    for pair in zip(old.gather(LAYER, rows, old.generation), fresh.gather(LAYER, rows, fresh.generation), strict=True):
        assert torch.equal(*pair)


# The path itself.


def stored_of(model: LongMemForCausalLM) -> list[torch.Tensor]:
    keys, values = model.encode(torch.arange(20)[None])
    return [*keys, *values]


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(each, marks=() if each in ("llama", "gpt2", "gemma2", "mixtral") else pytest.mark.slow)
        for each in sorted(ARCHITECTURES)
    ],
)
def test_the_encoder_path_leaves_out_nothing_that_matters(model_type):
    backbone = build(model_type)
    model = LongMemForCausalLM.from_backbone(backbone, **SETTINGS, **FORMS.get(model_type, {})).eval()
    path = {id(getattr(module, leaf)): getattr(module, leaf) for _, module, leaf in model.encoder.path.leaves}
    before = [each.clone() for each in stored_of(model)]
    outside = [each for each in (*backbone.parameters(), *backbone.buffers()) if id(each) not in path]
    own = {id(each) for each in backbone.state_dict(keep_vars=True).values()}
    with torch.no_grad():
        for tensor in outside:
            if tensor.is_floating_point() and id(tensor) in own:
                tensor.mul_(1.5).add_(0.25)
    assert all(torch.equal(*pair) for pair in zip(before, stored_of(model), strict=True))
    with torch.no_grad():
        for tensor in path.values():
            if tensor.is_floating_point():
                tensor.mul_(1.05)
    assert not all(torch.equal(*pair) for pair in zip(before, stored_of(model), strict=True))
