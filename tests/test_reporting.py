"""Reports: what finished runs say stands on one page, and what is not finished is refused."""

from __future__ import annotations

import base64
import json
import os
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
    parity = {
        "of": "all",
        "measure": "accuracy, %",
        "system": "context-8192",
        "window_gain": 20.0,
        "memory_gain": value / 5,
    }
    parity["share_percent"] = {"value": value, "interval": [value - 5, value + 5]}
    with RunFolder(folder, {"settings": {"model": "tiny", "limit": 7, "dtype": None}}) as run:
        run.write([{"id": "a", "right": 1}, {"id": "b", "right": 0}])
        plot_accuracies(folder / "accuracy.png", {"all": {"systems": systems}}, title="Accuracy", chance=10)
        run.finish(
            title=title,
            metrics={"summary": {"measure": "accuracy", "chance": 10, "systems": systems}, "parity": [parity]},
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
        "| Recall one: all: accuracy, % | 8,192 | +20 | +10 | 50 (45 to 55) |",
        "| Recall two: all: accuracy, % | 8,192 | +20 | +10.2 | 51 (46 to 56) |",
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


PIXEL = b"\x89PNG\r\n\x1a\nof mine"


@pytest.mark.parametrize("name", ["table.md", "metrics.json", "environment.json", "config.json", "accuracy.png"])
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_no_file_of_the_run_itself_is_refused(tmp_path, name, kind):
    finished(tmp_path / "one")
    secret, path = tmp_path / "secret", tmp_path / "one" / name
    secret.write_bytes(path.read_bytes())
    path.unlink()
    {"link": lambda: path.symlink_to(secret), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(ValueError, match=f"files of their own, but .*{name.replace('.', '[.]')}"):
        write_report([tmp_path / "one"], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_figures_go_into_a_folder_of_the_report(tmp_path):
    finished(tmp_path / "run")
    (tmp_path / "outside").mkdir()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "figures").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="figures' must be of its own folder alone"):
        write_report([tmp_path / "run"], tmp_path / "report")
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("where", ["table", "title", "model"])
@pytest.mark.parametrize(
    "text",
    [
        "![x]({secret})",
        "![x][ref]\n\n[ref]: {secret}",
        "![x](figures/../../secret.png)",
        "![x](https://example.org/seen.png)",
        "<img src='{secret}'>",
        "<script>alert(1)</script>",
        "[![x]({secret})](https://example.org)",
        "```\n![x]({secret})",
    ],
)
def test_a_page_embeds_no_file_but_the_figures_of_its_runs(tmp_path, where, text):
    secret = tmp_path / "secret.png"
    secret.write_bytes(PIXEL)
    hostile = text.format(secret=secret)
    finished(tmp_path / "one", title=hostile if where == "title" else "Title")
    if where == "table":
        (tmp_path / "one" / "table.md").write_text(hostile)
    if where == "model":
        (tmp_path / "one" / "config.json").write_text(json.dumps({"settings": {"model": hostile}}))
    write_report([tmp_path / "one"], tmp_path / "report")
    page, source = ((tmp_path / "report" / name).read_text() for name in ("report.html", "report.md"))
    assert base64.b64encode(PIXEL).decode() not in page
    assert page.count("<img") == page.count("data:image/png;base64,") <= 2
    assert "<script" not in page + source
    assert set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", source)) <= {"figures/overview.png", "figures/one-accuracy.png"}
    assert not re.search(r"<img", source)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", []),
        ("metrics.json", {"summary": 3}),
        ("metrics.json", {"parity": 3}),
        ("metrics.json", {"parity": [{"of": "all"}]}),
        ("metrics.json", {"summary": {"measure": "a", "systems": {"on": {}}}}),
        ("metrics.json", {"summary": {"measure": "a", "systems": {str(number): {} for number in range(10_000)}}}),
        ("environment.json", {"versions": 3}),
        ("environment.json", {"wall_seconds": "long"}),
        ("config.json", {"settings": [1]}),
    ],
)
def test_other_values_than_an_evaluation_writes_are_refused(tmp_path, name, content):
    finished(tmp_path / "one")
    (tmp_path / "one" / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="results of finished evaluations|can't be read"):
        write_report([tmp_path / "one"], tmp_path / "report")
    assert not (tmp_path / "report").exists()
