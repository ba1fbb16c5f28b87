"""One command from a folder of texts to a folder of results, stopped and gone on, or refused."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import some_text

from longmem.evaluation.perplexity import running

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "window=32 stride=16 memory_tokens=64 windows_per_document=2 systems=[backbone,context-48,bm25,off,on,wrong] "
    "dtype=null config.segment_length=16 config.num_retrieved_tokens=8"
)


@pytest.fixture
def start(backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "texts"
    folder.mkdir()
    for seed, name in enumerate("abc"):
        (folder / f"{name}.txt").write_text(some_text(60, seed))
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path / "cache"))
    script = ROOT / "eval" / "eval_perplexity.py"

    def command(output: Path, *changes: str, name: str = "perplexity", options: str = OPTIONS) -> None:
        places = [f"model={backbone_folder}", f"data={folder}", f"output={output}"]
        monkeypatch.setattr("sys.argv", [str(script), name, *options.split(), *places, *changes])
        runpy.run_path(str(script), run_name="__main__")

    return command


def without_seconds(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: without_seconds(value) for name, value in content.items() if "seconds" not in name}
    return content


def test_a_stopped_run_goes_on_to_the_same_losses(start, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    start(whole)
    printed, table = capsys.readouterr().out, (whole / "table.md").read_text()
    assert "\nNats per token saved against LongMem, memory off" in printed
    assert "| under 5k tokens: 3 documents, " in table
    assert "| LongMem, memory on | " in table
    names = {"config.json", "environment.json", "metrics.json", "table.md", "predictions.jsonl", "sessions.jsonl"}
    assert {file.name for file in whole.iterdir()} == {*names, "documents", "perplexity.png", "distances.png"}

    score_text, scored = running.score_text, []

    def interrupted(model: Any, text: Any, *rest: Any) -> Any:
        if len(scored) == 1:
            raise KeyboardInterrupt
        scored.append(text.name)
        return score_text(model, text, *rest)

    monkeypatch.setattr(running, "score_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(stopped)
    assert scored == ["a"]
    assert not (stopped / "metrics.json").exists()

    def counting(model: Any, text: Any, *rest: Any) -> Any:
        scored.append(text.name)
        return score_text(model, text, *rest)

    monkeypatch.setattr(running, "score_text", counting)
    start(stopped)
    assert scored == ["a", "b", "c"]
    files = sorted((whole / "documents").iterdir())
    assert [file.name for file in files] == [f"0000{number}-{name}.safetensors" for number, name in enumerate("abc")]
    for file in files:
        one, two = load_file(file), load_file(stopped / "documents" / file.name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one if "seconds" not in name)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, stopped)]
    assert without_seconds(metrics[0]) == without_seconds(metrics[1])
    assert set(metrics[0]["summary"]["systems"]) == {"backbone", "context-48", "bm25", "off", "on", "wrong"}
    losses = {system: load_file(files[0])[f"32/16/{system}/losses"] for system in ("backbone", "on", "wrong")}
    assert not torch.equal(losses["on"], losses["wrong"])
    assert not torch.equal(losses["on"], losses["backbone"])


def test_other_settings_are_refused_for_the_folder_of_a_run(start, tmp_path):
    start(tmp_path / "run", "limit=1", "systems=[off]", "windows_per_document=1")
    assert not (tmp_path / "run" / "perplexity.png").exists()  # one system: nothing to compare
    with pytest.raises(SystemExit, match="Name another folder"):
        start(tmp_path / "run", "limit=1", "systems=[off]", "windows_per_document=1", "ngram=2")
    with pytest.raises(SystemExit, match="the nearest below is 12"):
        start(tmp_path / "other", "stride=14")
    assert not (tmp_path / "other").exists()
    with pytest.raises(SystemExit, match=r"`strid` is not a setting of this run. Did you mean `stride`\?"):
        start(tmp_path / "other", "strid=16")


@pytest.mark.slow
def test_books_leave_a_result_folder_too(start, tmp_path, capsys):
    output = tmp_path / "results"
    options = (
        "window=16 stride=16 other_cuts=[32/16] memory_tokens=48 windows_per_document=2 grow=true context_windows=1 "
        "systems=[backbone,off,on,wrong,context-40] dtype=bfloat16 config.segment_length=16 config.num_retrieved_tokens=8"
    )
    books = {"name": "perplexity-books", "options": options}
    start(output, **books)
    first = capsys.readouterr().out
    assert first.count("memory on below") == 12  # three comparisons, two cuts, all windows and the first
    names = {"config.json", "environment.json", "metrics.json", "table.md", "predictions.jsonl", "sessions.jsonl"}
    assert {file.name for file in output.iterdir()} == {*names, "perplexity.png", "documents"}
    drawn = {file.stem for file in (output / "documents").glob("*.png")}
    assert drawn == {f"0000{number}-{name}-{cut}" for number, name in enumerate("abc") for cut in ("16-16", "32-16")}
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics["parts"]["16/16"]["systems"]["on"]["documents"]) == ["a", "b", "c"]
    assert list(metrics["parts"]) == ["16/16", "16/16, first 1 windows", "32/16", "32/16, first 1 windows"]
    assert json.loads((output / "config.json").read_text())["dtype"]["side_network"] == "torch.bfloat16"
    start(output, **books)  # all books are finished
    assert "scored" not in capsys.readouterr().out.partition("Windows of")[0]
    assert json.loads((output / "metrics.json").read_text()) == metrics
    with pytest.raises(SystemExit, match="Name another folder"):
        start(output, "dtype=null", **books)
