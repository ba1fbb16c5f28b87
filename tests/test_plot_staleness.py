"""The figure of what is stale in a bank."""

from __future__ import annotations

import pytest
import torch
from changed_encoder import changed, tiny_longmem

from longmem.memory import MemoryBank
from longmem.memory.refresh import VersionStaleness

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from longmem.plots import plot_staleness
from longmem.plots.banks import BEHIND, FRESH, MOST_DOCUMENTS, UNKNOWN, color_of_version


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_longmem(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw a report, and return the figure."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (figures.append(self), save(self, *args, **options))
    )

    def draw(report):
        plot_staleness(tmp_path / "staleness.png", report, title="Staleness of a bank")
        assert (tmp_path / "staleness.png").stat().st_size > 5_000
        return figures[-1]

    return draw


def bars(figure):
    """Return for each encoder, by its label, the tokens of the documents."""
    (axes,) = figure.axes
    return {group.get_label(): [bar.get_width() for bar in group] for group in axes.containers}


def test_each_document_has_a_bar_of_tokens_by_encoder(model, drawn):
    bank = MemoryBank.for_model(model)
    model.memorize(bank, range(64), "one")
    model.memorize(bank, range(32), "two")
    first = model.encoder_fingerprint()[:8]
    assert bars(drawn(bank.freshness.report())) == {f"{first}: fresh": [64, 32]}
    bank.freshness.reencode(changed(model, 0.1), budget_tokens=64)
    report = bank.freshness.report()
    found = bars(drawn(report))
    second = report.versions[1].digest[:8]
    assert list(found.values()) == [[0, 64], [32, 0]], "fresh first; the most stale document on top"
    assert list(found) == [f"{second}: fresh", f"{first}: 1 change behind, gap {report.gap_max:.3g}"]
    bank.freshness.read_as_is(model)
    known, unknown = bars(drawn(bank.freshness.report())).items()  # what this very encoder wrote is not made unknown
    assert (known[0], unknown[0]) == (f"{first}: fresh", "nobody knows which encoder")


def test_of_many_documents_the_most_stale_are_drawn(drawn):
    bank = MemoryBank(memory_layers=[0], chunk_size=4, fingerprint="1f")
    for number in range(MOST_DOCUMENTS + 3):
        bank.add(f"document {number}", [torch.randn(1, 4, 4)], [torch.randn(1, 4, 4)])
    figure = drawn(bank.freshness.report())
    assert [len(each) for each in bars(figure).values()] == [MOST_DOCUMENTS]
    assert figure.axes[0].get_title().startswith(f"{MOST_DOCUMENTS} of {MOST_DOCUMENTS + 3} documents")


def test_an_empty_bank_is_drawn_too(model, drawn):
    assert bars(drawn(MemoryBank.for_model(model).freshness.report())) == {}


def test_colors_tell_how_far_an_encoder_is_behind():
    lags = (0, 1, 2, 5, 50, None)
    versions = [VersionStaleness(0, "1f", 4, lag, None, None, ()) for lag in lags]
    assert [color_of_version(each) for each in versions] == [FRESH, BEHIND[0], BEHIND[1], BEHIND[4], BEHIND[4], UNKNOWN]
