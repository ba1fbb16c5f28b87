"""Another view of the backbone: what it computes is what the model reads and stores, and the model's own is the default."""

from __future__ import annotations

import pytest
import torch
from model.conftest import SETTINGS, build_backbone

from longmem import LongMemForCausalLM, MemoryBank
from longmem.backbone.capture import Backbone


class Louder(Backbone):
    """A view that stores values twice as large."""

    def run(self, input_ids, **options):
        states = super().run(input_ids, **options)
        states.values = {layer: 2 * values for layer, values in states.values.items()}
        return states

    def encode(self, input_ids, memory_layers, **inputs):
        keys, values = super().encode(input_ids, memory_layers, **inputs)
        return keys, [2 * each for each in values]


@pytest.fixture
def model():
    return LongMemForCausalLM.from_backbone(build_backbone("llama"), **SETTINGS).eval()


@torch.no_grad()
def test_what_a_view_gives_is_what_is_stored(model, input_ids, document):
    plain, values = model(input_ids, output_memory_keys=True), model.encode(input_ids)[1]
    model.backbone_view = Louder(model.backbone)
    louder = model(input_ids, output_memory_keys=True)
    assert torch.equal(louder.logits, plain.logits)
    for one, other in zip(louder.memory_keys, plain.memory_keys, strict=True):
        assert torch.equal(one, other)
    for found in (louder.memory_values, model.encode(input_ids)[1]):
        assert all(torch.equal(one, 2 * other) for one, other in zip(found, values, strict=True))
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, "a")
    stored = bank.gather(model.config.memory_layers[0], torch.zeros(2, 1, dtype=torch.int64), bank.generation)[1]
    model.backbone_view = Backbone(model.backbone)
    ordinary = MemoryBank.for_model(model)
    model.memorize(ordinary, document, "a")
    expected = ordinary.gather(
        model.config.memory_layers[0], torch.zeros(2, 1, dtype=torch.int64), ordinary.generation
    )[1]
    assert torch.equal(stored, 2 * expected)
    assert torch.equal(model(input_ids).logits, plain.logits)


def test_the_encoder_watches_over_the_new_view(model):
    before = model.encoder
    model.backbone_view = view = Louder(model.backbone)
    assert model.encoder is not before
    assert model.encoder.backbone is model.backbone_view is view


def test_a_view_of_another_model_is_refused(model):
    with pytest.raises(
        ValueError, match="`backbone_view` must be a view of this model's own `backbone`, got one of another"
    ):
        model.backbone_view = Backbone(build_backbone("gpt2"))
    assert model.backbone_view.model is model.backbone


def test_a_backbone_that_is_said_to_be_changed_is_saved_or_saving_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "named")
    model.backbone_was_trained = True
    with pytest.raises(ValueError, match=r"`save_backbone` must be True .* `save_pretrained\(folder, save_bac"):
        model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    model.save_pretrained(tmp_path / "saved", save_backbone=True)
    assert not LongMemForCausalLM.from_pretrained(tmp_path / "saved").backbone_was_trained
