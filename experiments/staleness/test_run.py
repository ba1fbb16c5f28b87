"""The script of the experiments on staleness: it runs, goes on where it was, and its tables and figures say what was found."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from experiments.staleness.accuracy_tables import DECOUPLED
from experiments.staleness.figures import plot_experiment
from experiments.staleness.running import sections, summarize_staleness
from experiments.staleness.settings import StalenessSettings
from longmem.evaluation.settings import load_evaluation

HERE = Path(__file__).parent
TINY = {
    "num_keys": 40,
    "readers": {
        "backbone_steps": 2,
        "side_steps": 1,
        "practice_distance": 64,
        "tune_steps": 1,
        "side_tune_steps": 1,
    },
    "library": {
        "num_documents": 3,
        "num_pairs": 6,
        "min_tokens": 300,
        "max_tokens": 520,
        "num_windows": 2,
        "num_questions": 2,
    },
    "learning": {"steps": 2, "distance": 32, "num_documents": 1},
    "decoupled_steps": 2,
}


def run_script(monkeypatch, tmp_path, *overrides):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "output": str(tmp_path / "run")}))
    monkeypatch.setattr(sys, "argv", ["run.py", str(path), *overrides])
    runpy.run_path(str(HERE / "run.py"), run_name="__main__")
    return tmp_path / "run"


def records_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_policy_table_is_made_and_goes_on(monkeypatch, tmp_path, capsys):
    arguments = ["systems=[never, eager, lazy]", "regimes=[fine-tune]"]
    folder = run_script(monkeypatch, tmp_path, *arguments, "seeds=[0]")
    first = records_of(folder)
    assert len(first) == 6
    models = {path: path.stat().st_mtime_ns for path in folder.glob("models/*/*")}
    run_script(monkeypatch, tmp_path, *arguments, "seeds=[0, 1]")
    assert records_of(folder)[:6] == first
    assert len(records_of(folder)) == 12
    assert all(path.stat().st_mtime_ns == changed for path, changed in models.items())
    names = {"config.json", "environment.json", "metrics.json", "table.md", "policies.png"}
    assert names <= {path.name for path in folder.iterdir()}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["tables"]["fine-tune/shared"]["systems"]["eager"]["cost"] == [1, 1, 1]
    assert "the document named (2 seeds)" in (folder / "table.md").read_text() + capsys.readouterr().out
    with pytest.raises(ValueError, match=r"library.num_windows = 2 and not 3"):
        run_script(monkeypatch, tmp_path, *arguments, "library.num_windows=3")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["learning", "content"])
def test_learning_and_content_have_a_record_for_every_row(monkeypatch, tmp_path, experiment):
    folder = run_script(
        monkeypatch, tmp_path, f"experiment={experiment}", "seeds=[0]", "learning_systems=[frozen, coupled]"
    )
    records = records_of(folder)
    rows = [record["system"] for record in records]
    assert rows == [DECOUPLED, "frozen", "coupled"] if experiment == "learning" else "superseded" in rows
    assert (folder / f"{experiment}.png").stat().st_size > 10_000
    for name in rows:
        assert name == DECOUPLED or f"| {name} |" in (folder / "table.md").read_text()
    if experiment == "learning":
        assert records[0]["same_encoder"]
        assert records[0]["changed_numbers"] == 0
        assert "After 2 steps of the side network: 0 of " in (folder / "table.md").read_text()
    run_script(monkeypatch, tmp_path, f"experiment={experiment}", "seeds=[0]", "learning_systems=[frozen, coupled]")
    assert records_of(folder) == records


def test_the_settings_file_is_that_of_the_defaults():
    assert load_evaluation(StalenessSettings, HERE / "staleness.yaml") == StalenessSettings(output="results/staleness")


def learning_records():
    def record(system, seed, right, curve):
        kinds = dict.fromkeys(("fresh", "aged", "first", "off", "windowed"), [False, False])
        answers = {**kinds, "fresh": right}
        return {"system": system, "seed": seed, "answers": answers, "curve": curve, "drift": 0.5}

    decoupled = {"same_encoder": True, "changed_numbers": 0, "stored_numbers": 10, "steps": 7}
    losses = {"before": 2.0, "after": 1.0, "anew": 1.0}
    return [
        {"system": DECOUPLED, "seed": 0, "losses": losses, **decoupled},
        record("frozen", 0, [True, True], [0.0, 1.0]),
        record("coupled", 0, [True, False], [0.0, 0.0]),
        record("frozen", 1, [True, False], [0.5, 1.0]),
        record("coupled", 1, [False, False], [0.0, 0.5]),
    ]


def test_learning_is_summarized_over_seeds(tmp_path):
    settings = StalenessSettings(output="x", experiment="learning")
    metrics = summarize_staleness(settings, learning_records())
    frozen = metrics["summary"]["systems"]["frozen"]
    assert frozen["fresh"] == (75.0, 50.0, 100.0)
    assert frozen["curve"] == [0.25, 1.0]
    (_, rows), (heading, losses) = sections(settings, metrics, intervals=False)
    assert rows[1] == ["frozen", "75.0", "0.0", "0.0", "0.0", "0.0", "0.500"]
    assert rows[2][1] == "25.0"
    assert "After 7 steps" in heading
    assert "0 of 10 stored numbers" in heading
    assert [row[1] for row in losses[1:]] == ["2.0000", "1.0000", "1.0000"]
    plot_experiment(tmp_path / "learning.png", metrics, title="learning")
    assert (tmp_path / "learning.png").stat().st_size > 10_000


def test_content_is_summarized_over_seeds(tmp_path):
    settings = StalenessSettings(output="x", experiment="content")
    records = [
        {"system": name, "seed": seed, "right": right, "older": [False, True]}
        for seed in (0, 1)
        for name, right in (("no prior", [False, bool(seed)]), ("superseded", [True, True]))
    ]
    metrics = summarize_staleness(settings, records)
    assert metrics["summary"]["systems"]["no prior"]["interval"] == (0.0, 50.0)
    ((_, rows),) = sections(settings, metrics)
    assert rows[1:] == [["no prior", "25.0 (0.0 to 50.0)", "50.0"], ["superseded", "100.0", "50.0"]]
    plot_experiment(tmp_path / "content.png", metrics, title="content")
    assert (tmp_path / "content.png").stat().st_size > 5_000
