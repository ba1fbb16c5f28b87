"""What `bank.staleness` says, and that saying it changes nothing."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from changed_encoder import changed, tiny_longmem

from longmem.errors import StaleMemoryError
from longmem.memory import MemoryBank


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    model = tiny_longmem(tmp_path_factory.mktemp("backbone"))
    return model, changed(model, 0.05), changed(model, 0.5)


@pytest.fixture
def bank(models):
    return filled(models[0])


def filled(model, **options):
    """Return a bank with a document of 64 tokens and one of 34, whose last chunk has two."""
    bank = MemoryBank.for_model(model, **options)
    model.memorize(bank, torch.arange(64), "one")
    model.memorize(bank, torch.arange(100, 134), "two")
    return bank


def state(bank):
    """Return all of a bank that a report could have changed, in a form that can be compared."""
    ledger = bank._table.ledger
    segments = {name: document.segments.to_json() for name, document in ledger.documents.items()}
    layers = bank._table.storage.select(torch.arange(bank.num_chunks))
    tensors = [tensor.tolist() for layer in layers for tensor in (layer.keys, layer.values, layer.search_keys)]
    numbers = ledger.version, ledger.generation, ledger.versions.tolist()
    return copy.deepcopy(
        (
            bank.encoders.to_json(),
            segments,
            tensors,
            numbers,
            bank.refresh,
            bank.freshness.state.probed,
            bank.freshness.state.wanted,
        )
    )


def test_a_bank_of_one_encoder_is_fresh(models, bank):
    for report in (bank.freshness.report(), bank.freshness.report(models[0])):
        assert report.is_fresh
        assert (report.entries, report.tokens) == (25, 98)
        assert (report.stale_share, report.unknown_share, report.masked, report.unreachable) == (0, 0, 0, 0)
        assert (report.lag_mean, report.lag_max, report.gap_max, report.tokens_to_encode) == (0, 0, 0.0, 0)
        assert (report.differs, report.differs_for_good) == ((), ())
        assert [(each.version, each.tokens, each.lag) for each in report.versions] == [(0, 98, 0)]
        assert [(each.document_id, each.tokens, each.tokens_of) for each in report.documents] == [
            ("one", 64, {0: 64}),
            ("two", 34, {0: 34}),
        ]
        assert (report.probe_drift, report.map_gain) == (None, None)


@pytest.mark.parametrize("refresh", ["frozen", "eager", "lazy", "bounded:max_lag=1", "bounded:clock=gap,max_lag=0.01"])
@pytest.mark.parametrize("probe", [False, True])
def test_a_report_for_another_encoder_changes_nothing(models, refresh, probe):
    bank = filled(models[0], refresh=refresh)
    before = state(bank)
    report = bank.freshness.report(models[1], probe=probe)
    assert state(bank) == before
    assert not report.is_fresh
    assert (report.stale_share, report.lag_mean, report.lag_max, report.tokens_to_encode) == (1, 1, 1, 98)
    assert report.differs == ("weights",)
    assert report.masked == (0 if refresh == "bounded:max_lag=1" else 25)
    assert bank.freshness.report(models[0]).is_fresh
    assert bank.freshness.refreshed.tokens == 0
    assert bank.freshness.refreshed.probed_tokens == (64 if probe else 0)


def test_a_report_on_a_folder_changes_no_byte(models, tmp_path):
    with MemoryBank.for_model(models[0], folder=tmp_path / "bank") as bank:
        models[0].memorize(bank, torch.arange(64), "one")

    def files():
        return {path: path.read_bytes() for path in sorted((tmp_path / "bank").rglob("*")) if path.is_file()}

    before = files()
    with MemoryBank.open(tmp_path / "bank", read_only=True) as bank:
        assert bank.freshness.report(models[1], probe=True).stale_share == 1
    assert files() == before
    with MemoryBank.open(tmp_path / "bank") as bank:
        bank.freshness.report(models[1], probe=True)
        assert len(bank.encoders.versions) == 1
    with MemoryBank.open(tmp_path / "bank", models[0]) as bank:  # frozen, and still the first encoder's
        assert bank.freshness.report().is_fresh


def test_what_a_refresh_has_done_and_left_is_told(models, bank):
    bank.freshness.reencode(models[1], budget_tokens=64)
    report = bank.freshness.report()
    assert (report.stale_share, report.masked, report.tokens_to_encode) == (9 / 25, 9, 34)
    assert (report.tokens_reencoded, report.seconds) == (64, bank.freshness.refreshed.seconds)
    assert report.lag_mean == pytest.approx(9 / 25)
    assert [each.tokens_of for each in report.documents] == [{1: 64}, {0: 34}]
    assert [each.stale_share for each in report.documents] == [0, 1]
    bank.freshness.reencode(models[2])
    report = bank.freshness.report(models[0])  # the first encoder has come back: nothing of it is left
    assert (report.lag_max, [each.version for each in report.versions]) == (1, [2])
    report = bank.freshness.report(models[2])
    assert (report.is_fresh, report.tokens_reencoded) == (True, 64 + 98)


def test_the_clocks_agree_with_the_weights(models):
    model = models[0]
    bank = filled(model)
    bank.ready_for(model)  # sketches the encoder
    gaps, drifts = [], []
    for other in models[1:]:
        report = bank.freshness.report(other, probe=True)
        path = model.encoder.path.tensors()
        pairs = [(old, new) for (_, old), (_, new) in zip(path, other.encoder.path.tensors(), strict=True)]
        moved = sum(float((new - old).square().sum()) for old, new in pairs) ** 0.5
        assert report.gap_max == pytest.approx(
            moved / sum(float(old.square().sum()) for old, _ in pairs) ** 0.5, rel=0.2
        )
        gaps.append(report.gap_max)
        drifts.append(report.probe_drift)
        assert report.versions[0].drift == report.probe_drift
    assert gaps[1] > 5 * gaps[0]
    assert drifts[1] > 2 * drifts[0] > 0
    silent = MemoryBank.for_model(model)
    silent.add("a", *([each[0] for each in part] for part in model.encode(torch.arange(8)[None])))
    assert silent.freshness.report(models[1]).gap_max is None  # nobody sketched the encoder while it was there


def test_what_cannot_be_encoded_again_is_counted(models, bank):
    keys, values = models[0].encode(torch.arange(32)[None])
    tensors = [key[0] for key in keys], [value[0] for value in values]
    bank.add("no ids", *tensors, segment="new")
    bank.add("no context", *tensors, torch.arange(32))
    assert bank.freshness.report().unreachable == 0
    report = bank.freshness.report(models[1])
    assert (report.unreachable, report.tokens_to_encode) == (2, 98)
    assert [each.is_unreachable for each in report.documents] == [False, False, True, True]
    bank.freshness.reencode(models[1])
    report = bank.freshness.report()
    assert (report.unreachable, report.masked, report.stale_share) == (2, 16, 16 / 41)


def test_unknown_encoders_are_counted_apart(models, bank):
    bank.freshness.read_as_is(models[1])
    report = bank.freshness.report(models[1])
    assert (report.unknown_share, report.stale_share, report.masked) == (1, 0, 0)
    assert (report.gap_max, report.lag_mean, report.is_fresh) == (None, 0, False)
    assert [(each.version, each.digest, each.lag) for each in report.versions] == [(-1, None, None)]
    nameless = MemoryBank(memory_layers=[0], chunk_size=4)
    nameless.add("a", [torch.randn(1, 8, 4)], [torch.randn(1, 8, 4)])
    for report in (nameless.freshness.report(), nameless.freshness.report(models[0])):
        assert (report.unknown_share, report.masked, report.is_fresh) == (1, 0, False)
    assert nameless.encoders.stamp is None


def test_what_differs_for_good_is_named_and_not_probed(models, tmp_path, bank):
    other = tiny_longmem(tmp_path, chunk_size=8)
    report = bank.freshness.report(other)
    assert report.differs_for_good == ("chunk_size",)
    assert (report.masked, report.tokens_to_encode, report.is_fresh) == (25, 0, False)
    with pytest.raises(StaleMemoryError, match="`chunk_size` 4 and 8"):
        bank.freshness.report(other, probe=True)
    with pytest.raises(ValueError, match="`probe` needs a model"):
        bank.freshness.report(probe=True)


def test_sizes_that_differ_are_said_by_a_probe(models, bank, tmp_path):
    other = tiny_longmem(tmp_path, num_key_value_heads=4)
    with pytest.raises(StaleMemoryError, match="another architecture"):
        bank.freshness.report(other, probe=True)


def test_age_is_of_writing(models, bank, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100)
    assert bank.freshness.report().age_mean == pytest.approx(100, abs=20)
    assert bank.freshness.report().documents[0].age == pytest.approx(100, abs=20)


def test_of_an_empty_bank_there_is_nothing_to_say(models):
    report = MemoryBank.for_model(models[0]).freshness.report(models[0])
    assert (report.entries, report.is_fresh, report.age_mean, report.gap_max) == (0, True, 0, 0.0)
    assert (report.versions, report.documents) == ((), ())
