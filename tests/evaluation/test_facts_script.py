"""One command from settings to tables and figures, stopped and gone on with: recall and LongEval."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from tiny_models import some_text

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "num_choices=3",
    "window=256",
    "max_new_tokens=2",
    "systems=[context-300,bm25,on,wrong]",
    "dtype=float32",
    "config={segment_length: 128, num_retrieved_tokens: 8}",
)
FILES = {"config.json", "environment.json", "metrics.json", "table.md", "predictions.jsonl", "sessions.jsonl"}
FIGURES = {"accuracy.png", "accuracy-map.png"}


def run(monkeypatch: pytest.MonkeyPatch, task: str, *overrides: str) -> None:
    monkeypatch.setattr("sys.argv", ["eval_recall.py", task, *OPTIONS, *overrides])
    runpy.run_path(str(ROOT / "eval" / "eval_recall.py"), run_name="__main__")


def without_costs(content: Any) -> Any:
    if isinstance(content, dict):
        return {
            name: without_costs(each) for name, each in content.items() if name not in ("seconds_per_item", "costs")
        }
    return content


def goes_on(monkeypatch: pytest.MonkeyPatch, output: Path, task: str, *overrides: str) -> None:
    """Stop a finished run in the middle of a record and go on with it."""
    metrics = json.loads((output / "metrics.json").read_text())
    lines = (output / "predictions.jsonl").read_text().splitlines(keepends=True)
    (output / "predictions.jsonl").write_text("".join([lines[0], lines[3], lines[1][:20]]))  # stopped
    run(monkeypatch, task, *overrides)
    again = (output / "predictions.jsonl").read_text().splitlines()
    assert len(again) == len(lines)
    assert without_costs(json.loads((output / "metrics.json").read_text())) == without_costs(metrics)


def test_one_command_leaves_a_result_folder(backbone_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("bm25s")
    (tmp_path / "text.txt").write_text(some_text(200))
    output, bank = tmp_path / "results", tmp_path / "bank"
    settings = ["tasks=[needle]", "sizes=[256,512]", "depths=[1]", "items=1", f"model={backbone_folder}"]
    settings += [f"haystack={tmp_path / 'text.txt'}", f"output={output}", f"bank_folder={bank}"]
    run(monkeypatch, "recall", *settings)
    shown = capsys.readouterr().out
    assert "needle: accuracy, %, by tokens in memory, chance 33.3 %" in shown
    assert "all" in shown
    assert "all (2 items)" in (output / "table.md").read_text()  # a terminal gets means alone
    assert {file.name for file in output.iterdir()} == FILES | FIGURES
    metrics = json.loads((output / "metrics.json").read_text())
    assert [axis["values"] for axis in metrics["axes"]] == [["needle"], [256, 512], [1.0]]
    assert set(metrics["summary"]["systems"]) == {"context-300", "bm25", "on", "wrong"}
    assert len((output / "predictions.jsonl").read_text().splitlines()) == 2 * 4

    goes_on(monkeypatch, output, "recall", *settings)
    capsys.readouterr()
    other = tmp_path / "other"  # where the bank is changes nothing; all is there, and no bank is made
    run(monkeypatch, "recall", *settings, f"bank_folder={other}")
    assert "facts in" not in capsys.readouterr().out
    assert not other.exists()
    with pytest.raises(SystemExit, match="Name another folder"):
        run(monkeypatch, "recall", *settings, "seed=1")


def test_longeval_leaves_a_result_folder_as_well(backbone_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("bm25s")
    (tmp_path / "longeval").mkdir()
    rows = [
        {
            "prompt": f"The topic of {topic}. Then the topic of soup. Now the record ends. The first?",
            "topics": [topic, "Soup"],
        }
        for topic in ("Rome", "chess")
    ]
    (tmp_path / "longeval" / "topics_2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "results"
    settings = ["tasks=[topics]", f"model={backbone_folder}", f"data={tmp_path / 'longeval'}", f"output={output}"]
    run(monkeypatch, "longeval", *settings)
    assert "topics: accuracy, %, by file, chance 50.0 %" in capsys.readouterr().out
    assert {file.name for file in output.iterdir()} == FILES | FIGURES
    metrics = json.loads((output / "metrics.json").read_text())
    assert [axis["values"] for axis in metrics["axes"][:2]] == [["topics"], ["topics_2"]]
    assert len((output / "predictions.jsonl").read_text().splitlines()) == 2 * 4
    goes_on(monkeypatch, output, "longeval", *settings)


def test_wrong_settings_end_the_script_before_any_work(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="`sizes` must be at least one, and none twice"):
        run(monkeypatch, "recall", f"output={tmp_path / 'results'}", "sizes=[512, 512]")
    with pytest.raises(SystemExit, match="`data`"):  # which is missing
        run(monkeypatch, "longeval", f"output={tmp_path / 'results'}")
    assert not (tmp_path / "results").exists()
