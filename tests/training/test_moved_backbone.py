"""A backbone that moves by mistake while its reader is trained: noticed at the next step, or at the end at the latest."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import make_files, make_trainer

from longmem import StaleMemoryError
from longmem.memory import MemoryBank


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def trainer(files, tmp_path):
    return make_trainer(files, output=tmp_path / "run", data__validation="null")


def below_memory(trainer) -> torch.nn.Parameter:
    return trainer.model.backbone.model.layers[0].mlp.up_proj.weight


def test_a_weight_that_asks_for_a_gradient_is_named_before_it_moves(trainer):
    trainer.train_step()
    before = below_memory(trainer).clone()
    below_memory(trainer).requires_grad_(True)
    with pytest.raises(StaleMemoryError, match=r"`model\.layers\.0\.mlp\.up_proj\.weight` requires a gradient"):
        trainer.train_step()
    assert torch.equal(below_memory(trainer), before)


def test_a_step_of_another_optimizer_is_noticed_at_the_next_read(trainer):
    trainer.train_step()
    with torch.no_grad():
        below_memory(trainer).mul_(1.01)
    with pytest.raises(StaleMemoryError, match="differ in weights"):
        trainer.train_step()


def test_what_no_look_can_see_is_found_at_the_end_and_nothing_is_saved(trainer, monkeypatch):
    bank_reads = MemoryBank.ready_for
    steps = []

    def ready_for(bank, model):
        bank_reads(bank, model)
        if len(steps) == 2:  # one number of many, past the version counter
            below_memory(trainer).data.view(-1)[1] += 1.0
        steps.append(bank)

    monkeypatch.setattr(MemoryBank, "ready_for", ready_for)
    with pytest.raises(StaleMemoryError, match="when the run began"):
        trainer.run()
    assert not (trainer.folder / "side-network").exists()


def test_a_run_that_leaves_the_backbone_alone_ends_well(trainer):
    trainer.run()
    assert (trainer.folder / "side-network").is_dir()
