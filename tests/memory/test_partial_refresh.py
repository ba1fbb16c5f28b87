"""A refresh that brings a part of a bank up to date: what it leaves stale is never read."""

from __future__ import annotations

import pytest
import torch
from changed_encoder import changed, tiny_longmem

from longmem.memory import MemoryBank
from longmem.memory.refresh import Refresher
from longmem.memory.refresh.drift_map import DriftMap
from longmem.memory.refresh.mapped import move_segments


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    model = tiny_longmem(tmp_path_factory.mktemp("backbone"))
    return model, changed(model, 0.05)


def rows_found(bank, model):
    queries = torch.randn(2, 5, 8)
    found = bank.search(model.config.memory_layers[0], queries, bank.num_chunks).rows
    return set(found.unique().tolist()) - {-1}


@pytest.mark.parametrize("refresh", ["frozen", "eager", "bounded:max_lag=0", "lazy"])
def test_what_a_budget_leaves_is_masked_under_every_policy(models, refresh):
    before, after = models
    bank = MemoryBank.for_model(before, refresh=refresh)
    before.memorize(bank, torch.arange(64), "one")
    before.memorize(bank, torch.arange(64, 128), "two")
    assert len(rows_found(bank, before)) == 32
    bank.freshness.reencode(after, budget_tokens=64)
    assert [{each.version for each in bank.segments(name)} for name in ("one", "two")] == [{1}, {0}]
    assert rows_found(bank, after) == set(bank._table.ledger.documents["one"].rows.values.tolist())
    bank.freshness.reencode(after)
    assert len(rows_found(bank, after)) == 32


def test_what_can_never_be_encoded_again_is_masked_even_where_the_policy_is_frozen(models):
    before, after = models
    bank = MemoryBank.for_model(before)
    before.memorize(bank, torch.arange(64), "known")
    keys, values = before.encode(torch.arange(64)[None])
    bank.add("without ids", [key[0] for key in keys], [value[0] for value in values])
    bank.freshness.reencode(after)
    bank.ready_for(after)
    assert rows_found(bank, after) == set(bank._table.ledger.documents["known"].rows.values.tolist())


def test_read_as_it_is_a_frozen_bank_masks_nothing(models):
    before, after = models
    bank = MemoryBank.for_model(before)
    before.memorize(bank, torch.arange(64), "one")
    bank.freshness.read_as_is(after)
    assert len(rows_found(bank, after)) == 16


@pytest.mark.parametrize("fallback", ["eager", "lazy", "mask"])
def test_a_fallback_does_not_encode_what_a_map_has_moved(models, fallback):
    before, after = models
    settings = f"mapped:sample_share=0.25,min_gain=0,min_recall=0,ridge=0.1,fallback={fallback}"
    bank = MemoryBank.for_model(before, refresh=settings)
    for number in range(8):
        before.memorize(bank, torch.randint(0, 250, (32,)), str(number))
    after_move = changed(before, 0.5)  # so far that a map wins
    bank.ready_for(after_move)
    assert bank.freshness.refreshed.mapped == 6
    assert bank.freshness.refreshed.tokens == 64


def test_a_tail_that_waits_is_moved_with_its_segment(models):
    before, after = models
    bank = MemoryBank.for_model(before)
    before.memorize(bank, torch.arange(30), "one")
    document = bank._table.ledger.documents["one"]
    ((keys, values),) = [[each.clone() for each in pair] for pair in document.waiting]
    doubled = DriftMap(2 * torch.eye(8).expand(2, 8, 8), torch.ones(2, 1, 8))
    turned = DriftMap(-torch.eye(8).expand(2, 8, 8), torch.zeros(2, 1, 8))
    bank.freshness._enter(after.encoder)
    move_segments(Refresher(bank, [after]), document, list(document.segments), {(0, 0): doubled, (0, 1): turned})
    ((new_keys, new_values),) = document.waiting
    torch.testing.assert_close(new_keys, 2 * keys + 1)
    torch.testing.assert_close(new_values, -values)
