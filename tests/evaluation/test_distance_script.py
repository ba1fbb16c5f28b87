"""One command from settings to tables and figures, stopped and gone on with."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from tiny_models import some_text

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "tasks=[needle,longeval-topics]",
    "sizes=[256,512]",
    "depths=[1]",
    "items=1",
    "num_choices=3",
    "window=256",
    "max_new_tokens=2",
    "systems=[context-300,bm25,on,wrong]",
    "dtype=float32",
    "config={segment_length: 128, num_retrieved_tokens: 8}",
)


def run(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    config = str(ROOT / "configs" / "eval" / "recall.yaml")
    monkeypatch.setattr("sys.argv", ["eval_recall.py", config, *OPTIONS, *overrides])
    runpy.run_path(str(ROOT / "eval" / "eval_recall.py"), run_name="__main__")


def without_seconds(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: without_seconds(each) for name, each in content.items() if name != "seconds_per_item"}
    return content


def test_one_command_leaves_a_result_folder(backbone_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("bm25s")
    (tmp_path / "text.txt").write_text(some_text(200))
    (tmp_path / "longeval").mkdir()
    rows = [
        {
            "prompt": f"The topic of {topic}. Then the topic of soup. Now the record ends. The first?",
            "topics": [topic, "Soup"],
        }
        for topic in ("Rome", "chess")
    ]
    (tmp_path / "longeval" / "topics_2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, bank = tmp_path / "results", tmp_path / "bank"
    places = [f"model={backbone_folder}", f"haystack={tmp_path / 'text.txt'}", f"longeval={tmp_path / 'longeval'}"]
    places += [f"output={output}", f"bank_folder={bank}"]
    run(monkeypatch, *places)
    assert "needle: accuracy, %, of 2 trials (a guess: 33.3)" in capsys.readouterr().out
    figures = {"needle.png", "longeval-topics.png"}
    files = {"config.json", "environment.json", "metrics.json", "table.md", "predictions.jsonl", "sessions.jsonl"}
    assert {file.name for file in output.iterdir()} == figures | files
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics["tasks"]["needle"]["parts"]) == ["256", "512"]
    assert set(metrics["summary"]["systems"]) == {"context-300", "bm25", "on", "wrong"}

    lines = (output / "predictions.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 2 + 2
    (output / "predictions.jsonl").write_text("".join([lines[0], lines[3], lines[1][:20]]))  # stopped
    run(monkeypatch, *places)
    again = (output / "predictions.jsonl").read_text().splitlines()
    assert len(again) == len(lines)
    assert without_seconds(json.loads((output / "metrics.json").read_text())) == without_seconds(metrics)
    capsys.readouterr()
    run(monkeypatch, *places, f"bank_folder={tmp_path / 'other'}")  # where the bank is changes nothing; all is there
    assert "facts in" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="Name another folder"):
        run(monkeypatch, *places, "seed=1")


def test_wrong_settings_end_the_script_before_any_work(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, f"output={tmp_path / 'results'}", "longeval=null")
    assert "`longeval` must name a folder" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
