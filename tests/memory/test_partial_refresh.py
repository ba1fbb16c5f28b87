"""A refresh that brings a part of a bank up to date: what it leaves stale is never read."""

from __future__ import annotations

import pytest
import torch
from changed_encoder import changed, tiny_longmem

from longmem.memory import MemoryBank


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
