from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from in_context_data import save_sets, save_squad
from kept_fast import fast

SCRIPT = Path(__file__).parents[2] / "eval" / "eval_in_context.py"
FILES = (
    "config.json",
    "environment.json",
    "metrics.json",
    "table.md",
    "accuracy.png",
    "predictions.jsonl",
    "sessions.jsonl",
)


def without_times(metrics):
    """Leave out seconds, and tokens encoded, some of which a run that goes on must encode again."""
    if isinstance(metrics, dict):
        left_out = ("seconds", "encoded_tokens")
        return {key: without_times(each) for key, each in metrics.items() if not any(word in key for word in left_out)}
    return metrics


@pytest.mark.parametrize("name", fast(1, ["squad", "in-context"]))
def test_one_command_and_the_same_again_after_a_stop(backbone_folder, tmp_path, monkeypatch, capsys, name):
    data = save_sets(tmp_path / "sets") if name == "in-context" else save_squad(tmp_path / "squad.json")
    own = {
        "in-context": {"sets": "[sst-2, sst-5]", "demonstrations": 2, "memory_demonstrations": 5},
        "squad": {"demonstrations": 1, "memory_demonstrations": 4, "max_new_tokens": 2},
    }

    def run(output, *more):
        values = {
            "model": backbone_folder,
            "dtype": "float32",
            "config": "{segment_length: 64, num_retrieved_tokens: 8}",
            "data": data,
            "systems": "[backbone, context-400, bm25, off, on, wrong]",
            "seeds": "[1, 2]",
            "limit": 2,
            "window": 200,
            **own[name],
            "output": tmp_path / output,
        }
        monkeypatch.setattr(
            "sys.argv", [str(SCRIPT), name, *(f"{key}={value}" for key, value in values.items()), *more]
        )
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return json.loads((tmp_path / output / "metrics.json").read_text())

    whole = run("whole")
    assert "Demonstrations before a question" in capsys.readouterr().out
    held = "as many of the next" if name == "in-context" else "its own, labels or answers shuffled"
    assert f"The wrong memory of a set holds {held}" in (tmp_path / "whole" / "table.md").read_text(encoding="utf-8")
    assert {file.name for file in (tmp_path / "whole").iterdir()} == set(FILES)
    lines = (tmp_path / "whole" / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    count = (
        2 * 2 * (6 * (2 + 1) + 2) if name == "in-context" else 2 * 6 * (2 + 1)
    )  # the most frequent label guesses, too
    assert len(lines) == count
    assert len({json.loads(line)["id"] for line in lines}) == len(lines)

    stopped, done = tmp_path / "stopped", len(lines) // 2
    stopped.mkdir()
    (stopped / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    (stopped / "predictions.jsonl").write_text("\n".join(lines[:done]) + '\n{"id": "half', encoding="utf-8")
    assert without_times(run("stopped")) == without_times(whole)
    after = (stopped / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert after[:done] == lines[:done]
    assert len(after) == len(lines)

    with pytest.raises(SystemExit, match="Name another folder"):
        run("whole", "memory_demonstrations=3")
    if name == "in-context":
        (data / "SST-2" / "dev.tsv").write_text("sentence\tlabel\nother texts\t1\n")
    else:
        data.write_text(data.read_text().replace("the cat", "the dog"))
    with pytest.raises(SystemExit, match=r"data.(sst-2|squad) = "):
        run("whole")
    with pytest.raises(SystemExit, match="`sets` must be one of sst-2" if name == "in-context" else "`sets` is not"):
        run("none", "sets=[sst-3]")
    assert not (tmp_path / "none").exists()
