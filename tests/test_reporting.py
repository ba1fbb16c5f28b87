"""Reports: what finished runs say stands on one page, and what is not finished is refused."""

from __future__ import annotations

import json
import re

import pytest

from longmem.cli.report import read_run, write_report
from longmem.evaluation.folder import RunFolder
from longmem.plots import plot_accuracies


def finished(folder, value: float = 50.0, title: str = "Recall of passkeys") -> None:
    systems = {
        name: {"title": f"LongMem, memory {name}", "value": value + 5 * number, "interval": [value - 5, value + 15]}
        for number, name in enumerate(("off", "on"))
    }
    with RunFolder(folder, {"settings": {"model": "tiny", "limit": 7, "dtype": None}}) as run:
        run.write([{"id": "a", "right": 1}, {"id": "b", "right": 0}])
        plot_accuracies(folder / "accuracy.png", {"all": {"systems": systems}}, title="Accuracy", chance=10)
        run.finish(
            title=title,
            metrics={"summary": {"measure": "accuracy", "chance": 10, "systems": systems}},
            table="## All items\n\n| | accuracy |\n|---|---:|\n| on & off | 55.0 |\n",
            seed=3,
        )


def test_the_page_holds_tables_figures_and_what_is_needed_to_repeat(tmp_path, run):
    for number, name in enumerate(("one", "two")):
        finished(tmp_path / name, 50 + number, f"Recall {name}")
    code, out, _ = run("report", tmp_path / "one", tmp_path / "two", "--output", tmp_path / "report", "--title", "Mine")
    assert code == 0
    assert "2 runs" in out
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.startswith("# Mine\n")
    for part in (
        "## Recall one",
        "### All items",
        "model = tiny, limit = 7",
        "seed 3, commit ",
        "| Recall two | tiny | 2 |",
    ):
        assert part in text
    assert text.index("## Recall one") < text.index("## Recall two")
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert links == ["figures/overview.png", "figures/one-accuracy.png", "figures/two-accuracy.png"]
    assert all((tmp_path / "report" / link).is_file() for link in links)
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "<td>on &amp; off</td>" in page
    assert 'src="figures' not in page


def test_runs_of_one_title_are_both_drawn(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("longmem.plots.plot_summaries", lambda path, panels: drawn.update(panels) or path.touch())
    for name in ("one", "two"):
        finished(tmp_path / name)
    (tmp_path / "report" / "figures").mkdir(parents=True)
    write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "report")
    assert list(drawn) == ["Recall of passkeys (one)", "Recall of passkeys (two)"]


def test_a_run_that_is_not_finished_is_refused_and_nothing_is_written(tmp_path, run):
    finished(tmp_path / "one")
    with RunFolder(tmp_path / "two", {}) as unfinished:
        unfinished.write([{"id": "a"}])
    code, _, error = run("report", tmp_path / "one", tmp_path / "two", "--output", tmp_path / "report")
    assert code == 2
    assert "two has no environment.json, metrics.json, table.md" in error
    assert not (tmp_path / "report").exists()
    with pytest.raises(ValueError, match="each of another name"):
        write_report([tmp_path / "one", tmp_path / "one"], tmp_path / "report")


def test_results_of_earlier_versions_can_be_reported(tmp_path):
    for name in ("config", "environment", "metrics"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"seed": 0} if name == "environment" else {}))
    (tmp_path / "table.md").write_text("| a |\n|---|\n")
    found = read_run(tmp_path)
    assert (found.title, found.summary) == (tmp_path.name, None)
    write_report([tmp_path], tmp_path / "report")
    assert "overview.png" not in (tmp_path / "report" / "report.md").read_text()
