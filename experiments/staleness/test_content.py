"""Superseded content: what is drawn, what is read, and that a trained model needs age or supersession."""

import pytest
import torch

from experiments.learned_recall.check import RecallSettings, add_side_network, train_backbone, train_side_network
from experiments.learned_recall.task import RecallTask
from experiments.staleness.content import PRIORS, GrowingWeights, draw_versions, label, superseded_content
from longmem.memory import AgePrior, MemoryBank

TASK = RecallTask(num_keys=12, num_values=8, num_words=16, distractor_share=0.2)
DAY = 86_400.0


@pytest.fixture(scope="module")
def untrained():
    return add_side_network(train_backbone(TASK, 2, 0), residual="substitute", init="backbone")


def test_versions_give_every_key_another_value_each_time():
    versions = draw_versions(TASK, 4, 6, 100, torch.Generator().manual_seed(0))
    values = torch.stack([version.values for version in versions])
    assert all(len(set(of_key)) == 4 for of_key in values.T.tolist())
    for version in versions:
        assert torch.equal(version.keys, versions[0].keys)
        for key, value in zip(version.keys.tolist(), version.values.tolist(), strict=True):
            (place,) = (version.token_ids == key).nonzero().flatten().tolist()  # never among the distractors
            assert version.token_ids[place + 1] == value
    assert len({version.token_ids.numpy().tobytes() for version in versions}) == 4


def test_rows_are_those_that_were_asked_for_and_the_ways_to_drop_old_texts_agree(untrained):
    options = dict(num_banks=1, num_versions=3, num_pairs=8, distance=20)
    priors = (AgePrior("exp", a=1e-9), AgePrior("exp", a=1e6))
    rows = superseded_content(untrained, TASK, 1, priors=priors, **options)
    names = [
        "no prior",
        "exp a=1e-09",
        "exp a=1e+06",
        "wrong sign of poly a=0.5",
        "superseded",
        "deleted",
        "fresh bank",
    ]
    assert [row.name for row in rows] == names
    none, weak, strong, _, superseded, deleted, fresh = rows
    for row in rows:
        assert row.answers.shape == row.got_older.shape == (8,)
        assert not (row.answers & row.got_older).any()
        assert row.seconds > 0
    assert torch.equal(none.answers, weak.answers)
    for row in (strong, deleted, fresh):  # the newest text weighs all: the same as no other text
        assert torch.equal(row.answers, superseded.answers)
        assert torch.equal(row.got_older, superseded.got_older)
    again = superseded_content(untrained, TASK, 1, priors=(), **options)
    assert torch.equal(again[0].answers, none.answers)


def test_the_lower_control_counts_age_the_wrong_way_round():
    bank = MemoryBank(memory_layers=[1], chunk_size=1, age_prior="poly:a=0.5")
    keys = torch.ones(1, 1, 4)
    bank.add("old", [keys], [keys], dated=0)
    bank.add("new", [keys * 1.01], [keys], dated=3 * DAY)
    wrong = GrowingWeights(bank)
    found = wrong.search(1, keys, 2, scaling=0.5)
    torch.testing.assert_close(found.log_weights, torch.tensor([[[2.0, 1.0]]]).log())  # (3 + 1)^0.5, 1
    assert bank.search(1, keys, 2, scaling=0.5).rows.tolist() == [[[1, 0]]]
    assert found.rows.tolist() == [[[0, 1]]]
    assert wrong.chunk_size == 1  # whatever else is asked, the bank answers


def test_labels_of_priors_differ():
    assert label(AgePrior("exp", a=0.5, floor=0.1)) == "exp a=0.5 floor=0.1"
    assert len({label(prior) for prior in PRIORS}) == len(PRIORS)


@pytest.mark.slow
def test_a_trained_model_needs_age_or_supersession_to_find_what_is_new():
    task, sizes = RecallTask(), RecallSettings()
    model = add_side_network(train_backbone(task, sizes.backbone_steps, 0))
    train_side_network(model, task, sizes.side_steps, sizes.practice_distance, 1)
    accuracy = {row.name: row.answers.double().mean().item() for row in superseded_content(model, task, 2)}
    assert accuracy["no prior"] < 0.6
    assert accuracy["wrong sign of poly a=0.5"] < accuracy["no prior"] < accuracy["poly a=1"]
    assert min(accuracy[name] for name in ("exp a=4", "superseded", "deleted", "fresh bank")) >= 0.95
