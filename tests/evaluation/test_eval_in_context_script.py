from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from in_context_data import save_sets, save_squad

ROOT = Path(__file__).parents[2]
SCRIPT, CONFIG = ROOT / "eval" / "eval_in_context.py", ROOT / "configs" / "eval" / "in-context.yaml"


def without_times(metrics):
    if isinstance(metrics, dict):
        return {name: without_times(value) for name, value in metrics.items() if "seconds" not in name}
    return metrics


def test_one_command_and_the_same_again_after_a_stop(backbone_folder, tmp_path, monkeypatch, capsys):
    save_sets(tmp_path / "sets")
    save_squad(tmp_path / "squad.json")

    def run(output, *more):
        values = {
            "model": backbone_folder,
            "dtype": "float32",
            "config": "{segment_length: 64, num_retrieved_tokens: 8}",
            "data": tmp_path / "sets",
            "sets": "[sst-2, sst-5, squad]",
            "systems": "[backbone, context-400, bm25, off, on, wrong]",
            "seeds": "[1, 2]",
            "limit": 2,
            "window": 200,
            "demonstrations": 2,
            "memory_demonstrations": 5,
            "squad.data": tmp_path / "squad.json",
            "squad.demonstrations": 1,
            "squad.memory_demonstrations": 4,
            "squad.max_new_tokens": 2,
            "output": tmp_path / output,
        }
        arguments = [str(SCRIPT), str(CONFIG), *(f"{name}={value}" for name, value in values.items()), *more]
        monkeypatch.setattr("sys.argv", arguments)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return json.loads((tmp_path / output / "metrics.json").read_text())

    whole = run("whole")
    assert "the wrong memory holds as many demonstrations of sst-5" in capsys.readouterr().out
    names = {"config.json", "environment.json", "metrics.json", "table.md", "accuracy.png", "predictions.jsonl"}
    assert {file.name for file in (tmp_path / "whole").iterdir()} == names | {"sessions.jsonl"}
    lines = (tmp_path / "whole" / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == 2 * 3 * 6 * (2 + 1)
    assert len({json.loads(line)["id"] for line in lines}) == len(lines)

    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    (stopped / "predictions.jsonl").write_text("\n".join(lines[:43]) + '\n{"id": "half', encoding="utf-8")
    assert without_times(run("stopped")) == without_times(whole)
    after = (stopped / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert after[:43] == lines[:43]
    assert len(after) == len(lines)

    with pytest.raises(ValueError, match="Name another folder"):
        run("whole", "memory_demonstrations=6")
    (tmp_path / "sets" / "SST-2" / "dev.tsv").write_text("sentence\tlabel\nother texts\t1\n")
    with pytest.raises(ValueError, match=r"data.sst-2 = "):
        run("whole")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("none", "sets=[sst-3]")
    assert "`sets` must be one of sst-2" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
