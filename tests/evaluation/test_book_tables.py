from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from longmem.evaluation.book_files import BookScores
from longmem.evaluation.book_plan import BookPlan, Cut
from longmem.evaluation.book_tables import markdown, sections, summarize_books
from longmem.evaluation.intervals import resamples
from longmem.evaluation.perplexity import WindowScores
from longmem.plots import plot_books

PLAN = BookPlan(cuts=(Cut(8, 8), Cut(16, 8)), memory_tokens=32, windows=6, contexts=(32,), context_windows=2)
EVERY = np.arange(5)
LOSSES = {"backbone": 3.0, "off": 2.9, "on": 2.8, "wrong": 2.95, "context-32": 2.5}
SECONDS = {"backbone": 2.0, "off": 2.5, "on": 3.0, "wrong": 3.0, "context-32": 4.0}


def books(count: int) -> dict[str, BookScores]:
    generator = torch.Generator().manual_seed(0)

    def scores(system: str, cut: Cut) -> WindowScores:
        windows = 2 if system.startswith("context") else 6
        losses = LOSSES[system] + torch.randn(windows, cut.scored, generator=generator) / 5
        return WindowScores(losses, SECONDS[system], losses.numel())

    return {
        f"book {number}": BookScores(
            {str(cut): {system: scores(system, cut) for system in PLAN.systems} for cut in PLAN.cuts},
            encoding_seconds=0.01,
        )
        for number in range(count)
    }


def test_the_metrics_are_those_of_naive_formulas():
    found = books(5)
    metrics = json.loads(json.dumps(summarize_books(found, PLAN, seed=3)))  # nothing that JSON does not know
    picks = resamples(5, 10_000, seed=3).numpy()
    for cut in ("8/8", "16/8"):
        for part, windows in (("all_windows", 6), ("context_windows", 2)):
            values = metrics["cuts"][cut][part]
            assert values["windows"] == windows
            means = {
                system: np.array(
                    [book.cuts[cut][system].losses[:windows].double().mean().item() for book in found.values()]
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
                assert list(own["books"].values()) == pytest.approx(np.exp(means[system]))
        means_of_on, long = means["on"], means["context-32"]
        samples = [
            100 * (means["backbone"][pick] - means_of_on[pick]).mean() / (means["backbone"][pick] - long[pick]).mean()
            for pick in picks
        ]
        share = values["share_of_gain_percent"]["context-32"]
        expected = 100 * (means["backbone"] - means_of_on).mean() / (means["backbone"] - long).mean()
        assert share["value"] == pytest.approx(expected)
        assert share["interval"] == pytest.approx(np.quantile(samples, [0.025, 0.975]))
        assert "context-32" not in metrics["cuts"][cut]["all_windows"]["systems"]


def test_cost_is_seconds_per_scored_token_in_those_of_the_backbone():
    cost = summarize_books(books(3), PLAN)["cuts"]["16/8"]["cost"]
    assert cost["backbone"] == {"seconds_per_token": pytest.approx(2 / 48), "relative": 1.0}
    assert cost["on"]["relative"] == pytest.approx(1.5)
    assert cost["on"]["relative_with_encoding"] == pytest.approx((3.0 + 0.01 * 32) / 2.0)  # 32 tokens in memory
    assert cost["context-32"]["relative"] == pytest.approx((4.0 / 16) / (2.0 / 48))


def test_intervals_of_a_single_book_are_over_its_windows():
    (book,) = books(1).values()
    part = summarize_books({"book": book}, PLAN, seed=1)["cuts"]["8/8"]["all_windows"]
    differences = (book.cuts["8/8"]["on"].losses - book.cuts["8/8"]["off"].losses).double().mean(dim=1).numpy()
    samples = [100 * (1 - np.exp(differences[pick].mean())) for pick in resamples(6, 10_000, seed=1).numpy()]
    assert part["reductions_percent"]["on/off"]["interval"] == pytest.approx(np.quantile(samples, [0.025, 0.975]))


def test_the_tables_have_all_systems_of_their_windows():
    found = sections(summarize_books(books(3), PLAN))
    assert len(found) == 4
    assert "3 books, the first 6 windows of each, after 40 memorized tokens" in found[0][0]
    assert "Windows of 16 tokens, the last 8 of each scored" in found[2][0]
    assert [len(systems) for _, systems, _ in found] == [5, 6, 5, 6]
    assert found[1][1][-1][0] == "backbone, window 32"
    assert found[1][2][-1][0] == "gain of memory on, as a share of the gain of a window of 32"
    text = markdown(summarize_books(books(3), PLAN))
    assert text.count("| LongMem, memory on |") == 4
    everywhere = BookPlan(cuts=PLAN.cuts, memory_tokens=32, windows=2, contexts=(32,))
    assert len(sections(summarize_books(books(3), everywhere))) == 2  # one table holds everything


def test_a_window_that_gains_nothing_has_no_share(tmp_path: Path):
    found = books(3)
    for book in found.values():
        for group in book.cuts.values():
            group["context-32"] = group["backbone"]
    metrics = summarize_books(found, PLAN)
    assert metrics["cuts"]["8/8"]["context_windows"]["share_of_gain_percent"] == {"context-32": None}
    assert "the longer window may gain nothing" in markdown(metrics)


@pytest.mark.parametrize("count", [1, 10])
def test_a_figure_is_drawn(tmp_path: Path, count: int):
    plot_books(tmp_path / "all.png", summarize_books(books(count), PLAN), title="tiny")
    short = BookPlan(cuts=PLAN.cuts[:1], memory_tokens=32, windows=6)
    plot_books(tmp_path / "one.png", summarize_books(books(count), short), title="tiny")
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 5_000
