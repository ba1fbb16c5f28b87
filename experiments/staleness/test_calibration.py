"""The gap that a recall allows: measured between two models, and what is refused."""

from __future__ import annotations

import pytest
import torch
from changed_encoder import changed, tiny_longmem

from experiments.staleness.calibration import GapPoint, calibrate_gap, largest_gap
from longmem.memory import MemoryBank
from longmem.memory.refresh import make_policy
from longmem.model.index_queries import recorded_queries

IDS = torch.randint(0, 250, (4 * 32,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    model = tiny_longmem(tmp_path_factory.mktemp("backbone"))
    return model, changed(model, 0.3)


@pytest.fixture(scope="module")
def measured(models):
    return calibrate_gap(*models, IDS, num_chunks=4, steps=3, num_windows=1)


def test_the_last_point_is_what_two_banks_say(models, measured):
    old, new = models
    banks = [MemoryBank.for_model(model, index="exact", capacity_tokens=None) for model in models]
    for bank, model in zip(banks, models, strict=True):
        model.memorize(bank, IDS[:-32], "text")
    layer = old.config.memory_layers[0]
    queries = recorded_queries(new, banks[1], IDS[-32:], layer)
    best = [(queries @ bank.search_keys(layer).transpose(1, 2)).topk(4, dim=2).indices for bank in banks]
    shared = [len(set(a) & set(b)) / 4 for a, b in zip(*(each.flatten(0, 1).tolist() for each in best), strict=True)]
    last = measured.points[-1]
    assert last.share == 1
    assert last.recall == pytest.approx(sum(shared) / len(shared))
    keys = [bank.search_keys(layer) for bank in banks]
    assert last.drift == pytest.approx(float((keys[1] - keys[0]).norm() / keys[1].norm()), rel=1e-4)
    banks[0].ready_for(old)
    assert last.gap == pytest.approx(banks[0].freshness.report(new).gap_max, rel=1e-3)


def test_the_way_is_straight_and_recall_falls_along_it(measured):
    shares, gaps, drifts, recalls = zip(*(vars(each).values() for each in measured.points), strict=True)
    assert shares == (0, 0.25, 0.5, 1)
    assert gaps == pytest.approx([share * gaps[-1] for share in shares], rel=1e-3)
    assert list(drifts) == sorted(drifts)
    assert recalls[0] == 1
    assert recalls[-1] < min(recalls[:-1])
    assert measured.is_reached
    assert 0 < measured.gap < gaps[-1]


def test_a_lower_recall_allows_a_larger_gap(models, measured):
    lower = calibrate_gap(*models, IDS, target_recall=measured.points[-1].recall, num_chunks=4, steps=3, num_windows=1)
    assert (lower.gap, lower.is_reached) == (measured.points[-1].gap, False)
    assert measured.gap < lower.gap


def test_what_it_returns_names_a_policy_that_is_no_laxer(measured):
    bound = make_policy(measured.refresh).chosen
    assert bound["clock"] == "gap"
    assert 0.99 * measured.gap < bound["max_lag"] <= measured.gap


def test_the_models_stay_as_they_are_and_equal_ones_have_no_gap(models):
    before = [model.encoder_stamp(exact=True).digest for model in models]
    done = []
    found = calibrate_gap(
        models[0], models[0], IDS, num_chunks=4, steps=2, num_windows=1, progress=lambda *each: done.append(each)
    )
    assert [(each.gap, each.recall) for each in found.points] == [(0, 1)] * 3
    assert (found.gap, found.is_reached) == (0, False)
    assert done == [(1, 2), (2, 2)]
    calibrate_gap(*models, IDS, num_chunks=4, steps=1, num_windows=1)
    assert [model.encoder_stamp(exact=True).digest for model in models] == before


def test_the_first_fall_counts():
    points = [GapPoint(0, 0, 0, 1.0), GapPoint(0.5, 0.01, 0, 0.9), GapPoint(1, 0.02, 0, 0.99)]
    assert largest_gap(points, 0.95) == (pytest.approx(0.005), True)
    assert largest_gap(points, 0.9) == (0.02, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_recall": 0}, "`target_recall` must be above 0"),
        ({"target_recall": 1.5}, "`target_recall` must be above 0"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"num_chunks": 0}, "`num_chunks` must be at least 1"),
        ({"num_windows": 4}, "`text_or_ids` must hold at least 256 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(models, changes, message):
    with pytest.raises(ValueError, match=message):
        calibrate_gap(*models, IDS, **changes)


def test_models_that_differ_in_more_than_weights_are_refused(models, tmp_path):
    with pytest.raises(ValueError, match="differ in segment_length"):
        calibrate_gap(models[0], tiny_longmem(tmp_path / "a", segment_length=64), IDS)
    with pytest.raises(ValueError, match="weights of the same names and shapes"):
        calibrate_gap(models[0], tiny_longmem(tmp_path / "b", num_key_value_heads=4), IDS)
