from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from longmem.evaluation.intervals import resamples
from longmem.evaluation.perplexity import PerplexitySettings
from longmem.evaluation.perplexity.scoring import Cut, WindowScores
from longmem.evaluation.perplexity.summary import markdown, sections, summarize_texts
from longmem.evaluation.perplexity.texts import TextScores
from longmem.plots import plot_ratios, plot_scores

LOSSES = {"backbone": 3.0, "off": 2.9, "on": 2.8, "wrong": 2.95, "context-32": 2.5}
SECONDS = {"backbone": 2.0, "off": 2.5, "on": 3.0, "wrong": 3.0, "context-32": 4.0}
SETTINGS = PerplexitySettings(
    data="none",
    output="none",
    plan="books",
    systems=tuple(LOSSES),
    window=8,
    stride=8,
    other_cuts=("16/8",),
    memory_tokens=32,
    windows_per_document=6,
    context_windows=2,
)
EVERY = np.arange(5)


def books(count: int, settings: PerplexitySettings = SETTINGS) -> list[dict[Cut, TextScores]]:
    generator = torch.Generator().manual_seed(0)

    def scores(system: str, cut: Cut) -> WindowScores:
        sizes = [window.num_scored for window in settings.windows(cut, 0, system)]
        losses = tuple(LOSSES[system] + torch.randn(size, generator=generator) / 5 for size in sizes)
        encoding = 0.01 * settings.memorized(cut) if system in ("on", "wrong") else 0.0
        return WindowScores(losses, SECONDS[system], encoding)

    def book(number: int, cut: Cut) -> TextScores:
        windows = tuple(settings.windows(cut, 0))
        distances = tuple(torch.zeros(window.num_scored, dtype=torch.int64) for window in windows)
        num_bytes = torch.tensor([4 * window.num_scored for window in windows])
        systems = {system: scores(system, cut) for system in settings.systems}
        return TextScores(f"book {number}", settings.needed_tokens, windows, distances, num_bytes, systems)

    return [{cut: book(number, cut) for cut in settings.cuts} for number in range(count)]


def test_the_metrics_are_those_of_naive_formulas():
    found, settings = books(5), dataclasses.replace(SETTINGS, seed=3)
    metrics = json.loads(json.dumps(summarize_texts(found, settings)))  # nothing that JSON does not know
    assert list(metrics["parts"]) == ["8/8", "8/8, first 2 windows", "16/8", "16/8, first 2 windows"]
    assert metrics["distances"] is None
    picks = torch.cat([*resamples(5, seed=3)]).numpy()
    for cut in settings.cuts:
        for name, windows in ((f"{cut}", 6), (f"{cut}, first 2 windows", 2)):
            values = metrics["parts"][name]
            assert (values["cut"], values["windows"]) == (str(cut), windows)
            means = {
                system: np.array(
                    [torch.stack(book[cut].systems[system].losses[:windows]).double().mean().item() for book in found]
                )
                for system in values["systems"]
            }

            def reduction(better: str, worse: str, pick: np.ndarray = EVERY, means: dict = means) -> float:
                return 100 * (1 - np.exp(means[better][pick].mean()) / np.exp(means[worse][pick].mean()))

            assert list(values["reductions_percent"]) == ["on/backbone", "on/off", "on/wrong", "wrong/off"]
            for pair, estimate in values["reductions_percent"].items():
                samples = [reduction(*pair.split("/"), pick) for pick in picks]
                assert estimate["value"] == pytest.approx(reduction(*pair.split("/")))
                assert estimate["interval"] == pytest.approx(np.quantile(samples, [0.025, 0.975]))
            for system, own in values["systems"].items():
                assert own["perplexity"]["value"] == pytest.approx(np.exp(means[system].mean()))
                assert own["reduction_percent"]["value"] == pytest.approx(reduction(system, "backbone"))
                assert own["bits_per_byte"]["value"] == pytest.approx(means[system].mean() / np.log(2) / 4)
                assert list(own["documents"].values()) == pytest.approx(np.exp(means[system]))
        memory, window = means["off"] - means["on"], means["backbone"] - means["context-32"]
        samples = [100 * memory[pick].mean() / window[pick].mean() for pick in picks]
        parity = values["parity"]["context-32"]
        assert parity["share_percent"]["value"] == pytest.approx(100 * memory.mean() / window.mean())
        assert parity["share_percent"]["interval"] == pytest.approx(np.quantile(samples, [0.025, 0.975]))
        assert (parity["memory_gain"], parity["window_gain"]) == pytest.approx((memory.mean(), window.mean()))
        assert "context-32" not in metrics["parts"][str(cut)]["systems"]
    shown = metrics["summary"]["systems"]
    assert shown["on"]["value"] == metrics["parts"]["8/8"]["systems"]["on"]["perplexity"]["value"]
    assert list(shown) == ["backbone", "off", "on", "wrong"]


def test_cost_is_seconds_per_scored_token_in_those_of_the_backbone():
    metrics = summarize_texts(books(3), SETTINGS)
    systems = metrics["parts"]["16/8"]["systems"]
    assert systems["backbone"]["seconds_per_token"] == pytest.approx(2 / 48)
    assert systems["on"]["preparing_seconds_per_token"] == pytest.approx(0.01 * 32 / 48)  # 32 tokens in memory
    few = metrics["parts"]["16/8, first 2 windows"]["systems"]
    assert few["backbone"]["seconds_per_token"] == pytest.approx(2 / 48)  # of all windows that it scored
    assert few["context-32"]["seconds_per_token"] == pytest.approx(4 / 16)
    costs = {row[0]: row[-1] for _, tables in sections(metrics) for row in tables[0]}  # of the last part
    assert costs["backbone, same window"] == "1.00"
    assert costs["LongMem, memory off"] == "1.25"
    assert costs["LongMem, memory on"] == "1.50 (1.66)"  # (3 + 0.01 * 32) / 2
    assert costs["backbone, window 32"] == "6.00"


def test_intervals_of_a_single_book_are_over_its_windows():
    (book,) = books(1)
    part = summarize_texts([book], dataclasses.replace(SETTINGS, seed=1))["parts"]["8/8"]
    losses = {system: torch.stack(own.losses) for system, own in book[Cut(8, 8)].systems.items()}
    differences = (losses["on"] - losses["off"]).double().mean(dim=1).numpy()
    samples = [100 * (1 - np.exp(differences[pick].mean())) for pick in torch.cat([*resamples(6, seed=1)]).numpy()]
    assert part["reductions_percent"]["on/off"]["interval"] == pytest.approx(np.quantile(samples, [0.025, 0.975]))


def test_the_tables_have_all_systems_of_their_windows():
    metrics = summarize_texts(books(3), SETTINGS)
    found = list(sections(metrics))
    assert len(found) == 5
    assert "3 books, the first 6 windows of each, after 40 memorized tokens" in found[0][0]
    assert "Windows of 16 tokens, the last 8 of each scored" in found[2][0]
    assert [len(systems) for _, (systems, _) in found[:4]] == [5, 6, 5, 6]
    assert found[1][1][0][-1][0] == "backbone, window 32"
    assert [row[:2] for row in found[4][1][0][1:]] == [
        [f"{cut}, first 2 windows: nats per token", "32"] for cut in ("8/8", "16/8")
    ]
    assert markdown(metrics).count("| LongMem, memory on |") == 4
    everywhere = dataclasses.replace(SETTINGS, windows_per_document=2, context_windows=None)
    assert (
        len(list(sections(summarize_texts(books(3, everywhere), everywhere)))) == 3
    )  # one table holds everything, and parity


def test_systems_without_memory_have_tables_and_a_figure(tmp_path, recwarn):
    without = dataclasses.replace(SETTINGS, systems=("backbone", "off"), context_windows=None, other_cuts=())
    found = books(2, without)
    assert [len(tables) for _, tables in sections(summarize_texts(found, without))] == [1]
    (cut, scores), *_ = found[0].items()
    plot_scores(tmp_path / "book.png", scores.systems, cut=cut, first_token=0, title="tiny")
    assert not recwarn.list


def test_a_window_that_gains_nothing_has_no_share():
    found = [
        {
            cut: dataclasses.replace(own, systems=own.systems | {"context-32": own.systems["backbone"].part(slice(2))})
            for cut, own in book.items()
        }
        for book in books(3)
    ]
    metrics = summarize_texts(found, SETTINGS)
    assert metrics["parts"]["8/8, first 2 windows"]["parity"]["context-32"]["share_percent"] is None
    assert "the window may gain nothing" in markdown(metrics)


@pytest.mark.parametrize("count", [1, 10])
def test_a_figure_is_drawn(tmp_path: Path, count: int):
    plot_ratios(tmp_path / "all.png", summarize_texts(books(count), SETTINGS), title="tiny")
    four = {"systems": SETTINGS.systems[:4], "context_windows": None, "other_cuts": ()}
    short = dataclasses.replace(SETTINGS, **four)
    plot_ratios(tmp_path / "one.png", summarize_texts(books(count, short), short), title="tiny")
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 5_000
