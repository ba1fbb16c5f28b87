"""Pictures over several runs show the figures in their files, each where it belongs."""

from __future__ import annotations

from pathlib import Path

import pytest

from longmem.files import read_json
from longmem.plots import cost, plot_cost, plot_runs

pytest.importorskip("matplotlib")

RUNS = Path(__file__).parent.parent / "docs" / "results" / "smollm2-parity" / "runs"


def lines_of(axes, label):
    """Return what is drawn under a label, as pairs."""
    found = [line for line in axes.get_lines() if line.get_label() == label]
    found += [each.lines[0] for each in axes.containers if each.get_label() == label]
    return [pair for line in found for pair in zip(line.get_xdata(), line.get_ydata(), strict=True)]


@pytest.fixture
def figures(monkeypatch):
    kept = []
    for module in ("accuracy", "cost"):
        monkeypatch.setattr(f"longmem.plots.{module}.save_figure", lambda figure, path: kept.append(figure))
    return kept


def test_runs_of_several_sizes_are_one_line(figures):
    runs = [read_json(RUNS / name / "metrics.json") for name in ("recall-65k", "recall-4k")]
    plot_runs("recall.png", runs, title="Recall")
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["passkey", "key-value", "needle"]
    for axes in figure.axes:
        for name, system in (("LongMem, memory on", "on"), ("LongMem, memory off", "off")):
            expected = [
                (size, run["measures"]["accuracy"]["cells"][f"{axes.get_title()}, {size}"]["systems"][system]["value"])
                for run in reversed(runs)
                for size in run["axes"][1]["values"]
            ]
            drawn = lines_of(axes, name)
            assert [value for _, value in drawn] == [value for _, value in expected]
            assert [x for x, _ in drawn] == pytest.approx([size for size, _ in expected], rel=0.1)


def run_of(stored, factor):
    names = {
        "memory off / backbone, forward": 1.5,
        "(memory on - off) / backbone, forward; auto index": 0.5 * factor,
        "(memory on - off) / backbone, forward; flat index": 4.0 * factor,
        "speed of generating / backbone's with the window of 1,024; auto index": 0.5,
        "speed of generating / backbone's with the window of 1,024; flat index": 0.25,
        "speed of generating / backbone's with all in its window; auto index": 2.0 * factor,
        "speed of generating / backbone's with all in its window; flat index": 1.0 * factor,
    }
    return {
        "setup": {"stored": stored, "segment": 1024},
        "result": {name: {"median": value} for name, value in names.items()},
        "sizes": {"bytes stored per token": 100, "bytes per token in the backbone's cache": 400},
    }


def test_costs_are_multiples_of_the_backbone_with_its_own_window(figures):
    plot_cost("cost.png", [run_of(8192, 4), run_of(2048, 1)], title="Cost")
    token, prompt, size = figures[0].axes
    assert lines_of(token, "LongMem, approximate search") == [(2048, 2.0), (8192, 2.0)]
    assert lines_of(token, "LongMem, exact search") == [(2048, 4.0), (8192, 4.0)]
    assert lines_of(token, "backbone, all in its window") == [(2048, 4.0), (8192, 16.0)]
    assert lines_of(prompt, "LongMem, approximate search") == [(2048, 2.0), (8192, 3.5)]
    assert lines_of(size, "LongMem, memory bank") == [(2048, 0.2048), (8192, 0.8192)]
    assert lines_of(size, "backbone, cache of its window") == [(2048, 0.8192), (8192, 3.2768)]


def test_what_the_benchmark_writes_has_the_names_that_are_drawn():
    source = (Path(__file__).parent.parent / "benchmarks" / "bench_cost.py").read_text(encoding="utf-8")
    for name in (*run_of(1, 1)["result"], *run_of(1, 1)["sizes"]):
        fixed = (
            name.replace("1,024", "{given.segment:,}")
            .replace("auto index", "{name} index")
            .replace("flat index", "{name} index")
        )
        assert f'"{fixed}"' in source
    assert cost.INDEX_STYLES.keys() == {"auto", "flat"}
