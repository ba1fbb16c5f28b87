"""Learning with a writer that moves or does not: who is trained, what is written when, and the two results in full."""

from __future__ import annotations

import copy

import pytest
import torch

from experiments.learned_recall.check import add_side_network, make_schedule, train_backbone, update
from experiments.learned_recall.task import RecallTask
from experiments.staleness import learning
from experiments.staleness.decoupled import check_decoupled, measure_freshness
from experiments.staleness.learning import (
    STILL,
    SYSTEMS,
    LearningSettings,
    LearningSystem,
    ask,
    learn,
    make_optimizer,
)
from longmem.errors import StaleMemoryError
from longmem.evaluation.intervals import bootstrap_interval
from longmem.memory.refresh import UNBOUNDED

TASK = RecallTask(num_keys=40, num_values=8, num_words=16)
SHORT = LearningSettings(steps=4, distance=64, num_documents=1)


@pytest.fixture(scope="module")
def backbone():
    return train_backbone(TASK, 2, seed=0)


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.slow
def test_the_given_backbone_stays_and_a_frozen_writer_repeats_itself_whatever_the_lag(backbone):
    before = weights_of(backbone)
    results = [learn(backbone, LearningSystem(lag), SHORT, TASK, seed=1) for lag in (0, 2)]
    for result in results:
        assert torch.equal(result.curve, results[0].curve)
        assert torch.equal(result.losses, results[0].losses)
        assert (result.drift, result.aged_drift) == pytest.approx((0, 0), abs=1e-5)
        assert all(torch.equal(result.answers["fresh"], result.answers[kind]) for kind in ("aged", "first"))
        assert {kind: len(right) for kind, right in result.answers.items()} == {
            **dict.fromkeys(("fresh", "aged", "first", "off"), 32),
            "windowed": 24,
        }
    learn(backbone, LearningSystem(0, 1.0), SHORT, TASK, seed=1)
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.named_parameters())
    other = learn(backbone, LearningSystem(), SHORT, TASK, seed=2)
    assert not torch.equal(other.losses, results[0].losses)


@pytest.mark.slow
def test_a_moving_writer_moves_keys_and_a_still_one_does_not(backbone):
    coupled, still, frozen = (
        learn(backbone, system, SHORT, TASK, seed=1)
        for system in (LearningSystem(0, 1.0), LearningSystem(0, 1.0, STILL), LearningSystem())
    )
    assert coupled.drift > 1e-3 > abs(still.drift)
    assert still.losses[0] == coupled.losses[0] == frozen.losses[0]
    assert len({result.losses[-1].item() for result in (coupled, still, frozen)}) == 3


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_document_is_as_many_versions_old_as_the_lag_says(backbone, monkeypatch, lag):
    written, ages, model = {}, [], None

    def memorized(given, document, refresh):
        nonlocal model
        model = given
        bank = original(given, document, refresh)
        written[id(bank)] = given.backbone_view.version, bank
        return bank

    def asking(given, task, document, bank, generator):
        ages.append(given.backbone_view.version - written[id(bank)][0])
        return ask(given, task, document, bank, generator)

    original = learning.memorized
    monkeypatch.setattr(learning, "memorized", memorized)
    monkeypatch.setattr(learning, "ask", asking)
    learn(backbone, LearningSystem(lag, 1.0), SHORT, TASK, seed=0)
    assert ages == [min(lag, step) for step in range(4)]
    assert model.backbone_view.version == 4


def test_rates_are_shares_of_the_side_networks(backbone):
    optimizer, writer = make_optimizer(add_side_network(copy.deepcopy(backbone)), LearningSystem(0, 0.1), 5e-3)
    assert writer is not None
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-3, 5e-4])
    optimizer, writer = make_optimizer(add_side_network(backbone), LearningSystem(), 5e-3)
    assert (len(optimizer.param_groups), writer) == (1, None)


def test_systems_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="`average` needs a backbone that is trained"):
        LearningSystem(0, None, 0.9)
    with pytest.raises(ValueError, match="`lag` must be at least 0"):
        LearningSystem(-1)
    assert len({str(system) for system in SYSTEMS.values()}) == len(SYSTEMS)


def test_training_the_reader_leaves_memory_as_it_is(backbone):
    result = check_decoupled(steps=3, task=TASK, backbone=copy.deepcopy(backbone))
    assert result.same_encoder
    assert (result.changed_numbers, result.stored_numbers) == (0, 8 * (256 + 1024) * 2 * 64)
    assert torch.equal(result.losses["after"], result.losses["anew"])
    assert not torch.equal(result.losses["after"], result.losses["before"])


def test_training_the_writer_does_not(backbone):
    model = add_side_network(copy.deepcopy(backbone))
    optimizer, writer = make_optimizer(model, LearningSystem(0, 1.0), 5e-3)

    def train():
        schedule = make_schedule(optimizer, 2, warmup=1)
        for _ in range(2):
            update(optimizer, schedule, model(windows, labels=windows).loss)
            writer.moved()

    windows = torch.randint(TASK.vocab_size, (4, 32))
    result = measure_freshness(model, TASK, train, num_documents=1, distance=64, refresh=UNBOUNDED)
    assert not result.same_encoder
    assert result.changed_numbers > 0.9 * result.stored_numbers
    assert not torch.equal(result.losses["after"], result.losses["anew"])
    with pytest.raises(StaleMemoryError):
        measure_freshness(model, TASK, train, num_documents=1, distance=64)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_reader_learns_beside_a_frozen_writer_and_not_beside_a_moving_one(seed, one_thread):
    task = RecallTask()
    trained = train_backbone(task, 1000, 3 * seed)
    frozen, coupled = (learn(trained, SYSTEMS[name], LearningSettings(), task, seed) for name in ("frozen", "coupled"))
    assert frozen.accuracy["fresh"] >= 0.95
    assert frozen.accuracy["first"] == frozen.accuracy["fresh"]
    assert coupled.accuracy["fresh"] <= 0.2
    low, _ = bootstrap_interval(frozen.answers["fresh"].double() - coupled.answers["fresh"].double())
    assert low > 0.7


@pytest.mark.slow
def test_after_300_steps_of_the_reader_memory_is_fresh(one_thread):
    result = check_decoupled()
    assert result.same_encoder
    assert result.changed_numbers == 0
    losses = result.mean_losses
    assert losses["after"] == losses["anew"] <= losses["before"] + 0.02
