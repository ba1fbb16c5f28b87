from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from tiny_models import some_text

SCRIPT = Path(__file__).parents[2] / "eval" / "eval_books.py"


@pytest.mark.slow
def test_one_command_leaves_a_result_folder(backbone_folder, tmp_path, monkeypatch, capsys):
    for seed, name in enumerate("ab"):
        (tmp_path / f"{name}.txt").write_text(some_text(60, seed))
    entries = [{"file": f"{name}.txt", "split": "test"} for name in "ab"]
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    output = tmp_path / "results"
    options = "segment_length=16 num_retrieved_tokens=8 --memory-tokens 48 --windows 2 --cut 16/16 32/16 --grow"
    longer = "--context 40 --context-windows 1 --dtype bfloat16"
    places = ["--books-from", tmp_path / "manifest.json", "--model", backbone_folder, "--output", output]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *options.split(), *longer.split(), *map(str, places)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    first = capsys.readouterr().out
    assert first.count("memory on below") == 12  # three comparisons, two cuts, all windows and the first
    names = {"config.json", "environment.json", "metrics.json", "table.md", "perplexity.png", "books"}
    assert {file.name for file in output.iterdir()} == names
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["books"] == ["a", "b"]
    assert list(metrics["cuts"]) == ["16/16", "32/16"]
    assert json.loads((output / "config.json").read_text())["dtype"]["side_network"] == "torch.bfloat16"
    runpy.run_path(str(SCRIPT), run_name="__main__")  # all books are finished
    assert "books to score" not in capsys.readouterr().out
    assert json.loads((output / "metrics.json").read_text()) == metrics
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *options.split(), *map(str, places)])
    with pytest.raises(ValueError, match="Name another folder"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
