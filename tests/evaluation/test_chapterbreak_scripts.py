from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from experiments.chapterbreak.test_building import book

ROOT = Path(__file__).parents[2]
RULES = "context_words=40 slack_words=10 suffix_words=10 shortest_suffix=7 longest_suffix=13 negatives=5 boundaries=2"


def test_books_to_results_with_a_stop_between(backbone_folder, tmp_path, monkeypatch, capsys):
    def call(script: str, *arguments: str | Path) -> str:
        path = ROOT / script
        monkeypatch.setattr("sys.argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    for seed, name in enumerate("ab"):
        (tmp_path / f"{name}.txt").write_text(book(9, seed), encoding="utf-8")
    out = call(
        "experiments/chapterbreak/build_chapterbreak.py", tmp_path, *RULES.split(), "--output", tmp_path / "data.json"
    )
    assert "4 examples of 2 of 2 books" in out
    config = {"segment_length": 32, "num_retrieved_tokens": 8}
    options = [
        "window=32",
        "dtype=float32",
        "contexts=[16,100]",
        "suffix_tokens=8",
        "limit=3",
        f"data={tmp_path / 'data.json'}",
    ]
    options += [
        f"model={backbone_folder}",
        f"config={json.dumps(config)}",
        "systems=[backbone,context-64,bm25,off,on,wrong]",
    ]
    evaluate = ["eval/eval_chapterbreak.py", *options]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with pytest.raises(SystemExit, match="leave out the systems"):
        call(*evaluate, f"output={whole}", "contexts=[16]")
    assert not whole.exists()  # the folder is free for settings that go together
    out = call(*evaluate, f"output={whole}")
    parts = (whole / "table.md").read_text().split("\n\n")
    tables = {heading: table for heading, table in zip(parts[::2], parts[1::2], strict=False) if heading[0] == "#"}
    for measure in ("accuracy, per token", "accuracy, summed", "margin"):
        (table, _) = (own for heading, own in tables.items() if heading.startswith(f"## {measure}"))
        (row,) = (line for line in table.splitlines() if "LongMem, memory on" in line)
        assert row.split("|")[2].strip() == ""  # no memory where the context fits the window
        # A terminal gets means alone.
        cells = [cell.strip() for line in table.splitlines()[2:] for cell in line.strip("|").split("|")[1:]]
        assert all(cell.partition(" (")[0] in out for cell in cells)
    assert {file.name for file in whole.iterdir()} == {
        *("config.json", "environment.json", "metrics.json", "predictions.jsonl", "sessions.jsonl", "table.md"),
        "accuracy.png",
    }
    lines = (whole / "predictions.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 3 * (3 + 2 + 6)
    stopped.mkdir()
    (stopped / "config.json").write_text((whole / "config.json").read_text())
    (stopped / "predictions.jsonl").write_text("".join([*lines[:20], lines[20][:30]]))
    call(*evaluate, f"output={stopped}")
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, stopped)]
    for metrics in found:
        del metrics["costs"]
        for measure in metrics["measures"].values():
            for comparison in measure["cells"].values():
                for system in comparison["systems"].values():
                    system.pop("seconds_per_item", None)
    assert found[0] == found[1]
    before = (stopped / "predictions.jsonl").read_text()
    call(*evaluate, f"output={stopped}")  # everything is there
    assert (stopped / "predictions.jsonl").read_text() == before
    with pytest.raises(SystemExit, match="Name another folder"):
        call(*evaluate, f"output={stopped}", "suffix_tokens=7")
    with pytest.raises(SystemExit, match="`scoring` must be one of"):
        call(*evaluate, f"output={stopped}", "scoring=best")
