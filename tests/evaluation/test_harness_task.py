"""eval/eval_harness.py: three tasks under three systems in one folder, which goes on where it stopped."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from harness_tasks import write_tasks
from tiny_models import save_tiny_backbone
from transformers import AutoTokenizer

from longmem.evaluation.registry import default_settings
from longmem.evaluation.settings import load_evaluation

TASKS = ("choose", "continue", "roll")
SCRIPT = Path(__file__).parents[2] / "eval" / "eval_harness.py"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the script on a tiny model and tasks, with changes to its settings."""
    folder = save_tiny_backbone(tmp_path / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "~"
    tokenizer.save_pretrained(folder)
    tasks = write_tasks(tmp_path / "tasks")
    settings = [f"model={folder}", "dtype=float32", "window=16", "local_tokens=null", "batch_size=3"]
    settings += ["tasks=[choose, continue, roll]", f"include_path={tasks}"]
    settings += ["config={segment_length: 16, num_retrieved_tokens: 8}", f"output={tmp_path / 'results'}"]
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks the system for a second

    def run(*changes: str) -> Path:
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *settings, *changes])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return tmp_path / "results"

    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def without_seconds(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the only cell of every measure, without times."""
    found = {}
    for name, measure in metrics["measures"].items():
        (found[name],) = measure["cells"].values()
        for values in found[name]["systems"].values():
            del values["seconds_per_item"]
    return found


def test_one_command_leaves_a_result_folder_and_goes_on(command, capsys):
    output = command()
    shown = capsys.readouterr().out
    assert sum(f"{task}, {system}: 6 items" in shown for task in TASKS for system in ("backbone", "off", "on")) == 9
    assert {"config.json", "metrics.json", "table.md", "predictions.jsonl", "accuracy.png"} <= {
        file.name for file in output.iterdir()
    }
    metrics = read(output / "metrics.json")
    assert metrics["summary"]["measure"] == "acc_norm, %"
    assert list(metrics["summary"]["systems"]) == ["backbone", "off", "on"]
    found = without_seconds(metrics)
    assert list(found) == [
        "choose: acc_norm", "choose: acc", "continue: exact_match", "roll: word_perplexity", "roll: byte_perplexity"
    ]  # fmt: skip
    choose, roll = found["choose: acc"], found["roll: byte_perplexity"]["systems"]
    assert choose["groups"] == 3
    assert choose["systems"]["off"]["value"] == choose["systems"]["backbone"]["value"]
    assert choose["systems"]["off"]["interval"][0] < choose["systems"]["off"]["interval"][1]
    # A new side network is the backbone until it reads memory.
    assert roll["off"]["value"] == pytest.approx(roll["backbone"]["value"], rel=1e-4)
    assert abs(roll["on"]["value"] / roll["off"]["value"] - 1) > 1e-3
    assert roll["on"]["above_baseline"] == roll["on"]["value"] - roll["backbone"]["value"]
    assert "interval" not in roll["on"]  # of what is no mean over items there is lm-eval's value alone
    tables = (output / "table.md").read_text()
    assert "## choose\n" in tables
    assert "| acc_norm, % (6 items) | acc, % (6 items) |" in tables
    assert f"| LongMem, memory on | {found['roll: word_perplexity']['systems']['on']['value']:.3f} |" in tables
    lines = (output / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 54
    picked = [json.loads(line) for line in lines if '"choose/on/' in line]
    right = [record["metrics"]["acc"] for record in picked]
    assert choose["systems"]["on"]["value"] == pytest.approx(100 * sum(right) / 6)
    for record in picked:
        values = [answer[0][0] for answer in record["resps"]]
        assert record["metrics"]["acc"] == float(values.index(max(values)) == record["target"])

    encoded = {system: own["encoded_tokens"] for system, own in metrics["costs"]["systems"].items()}
    assert encoded["on"] > 100
    assert encoded["backbone"] == encoded["off"] == 0

    (output / "predictions.jsonl").write_text("\n".join(lines[:-8]) + "\n")  # stopped while writing the last but one
    command()
    again = capsys.readouterr().out
    assert sum(f"{task}, on: 6 items" in again for task in TASKS) == 2
    assert "backbone: 6 items" not in again
    assert without_seconds(read(output / "metrics.json")) == found
    with pytest.raises(SystemExit, match="Name another folder"):
        command("num_fewshot=1")


def test_tasks_without_a_share_of_right_answers_are_told_but_not_drawn(command):
    output = command("tasks=[roll]", "systems=[backbone, on]")
    metrics = read(output / "metrics.json")
    assert "summary" not in metrics
    assert list(metrics["measures"]) == ["roll: word_perplexity", "roll: byte_perplexity"]
    assert "byte_perplexity" in (output / "table.md").read_text()
    assert not (output / "accuracy.png").exists()


def test_a_part_of_the_items_by_some_systems(command):
    output = command("systems=[on]", "tasks=[choose]", "limit=3")
    records = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [record["doc_id"] for record in records] == [0, 2, 4]
    assert [record["group"] for record in records] == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("systems=[on, wrong]", "`systems` must be among backbone, off, on, got 'wrong'"),
        ("tasks=[]", "`tasks` must be at least one"),
        ("tasks=[choose, choose]", "none twice"),
    ],
)
def test_wrong_settings_are_refused(command, change, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        command(change)


def test_missing_folders_are_refused(command):
    with pytest.raises(SystemExit, match="`data` must be a folder"):
        command("data=nowhere")


@pytest.mark.slow
def test_an_unknown_task_is_refused(command):  # lm-eval's own index takes seconds
    with pytest.raises(SystemExit, match=r"got 'chose'. Did you mean `choose`"):
        command("tasks=[chose]")


def test_the_tasks_that_come_along_ask_what_the_data_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # wherever one is
    quality = {"text": "Once.", "question": "When?", "options": ["now", "then", "never", "always"], "answer": 1}
    babi = {"text": "Mary left.", "question": "Where is Mary?", "answer": "hallway"}
    for name, item in (("quality", quality), ("babi", babi)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(item) + "\n")
    from longmem.evaluation.harness.task import Harness

    overrides = [f"output={tmp_path}", f"data={tmp_path}"]
    tasks = Harness(load_evaluation(Harness.kind, default_settings("harness"), overrides)).tasks
    choice = tasks["quality"]
    assert choice.doc_to_text(quality) == "Once.\n\nQuestion: When?\nAnswer:"
    assert (choice.doc_to_choice(quality), choice.doc_to_target(quality)) == (quality["options"], 1)
    question = tasks["babi"]
    assert question.doc_to_text(babi).startswith("Mary left.\n\n")
    assert question.doc_to_text(babi).endswith("\n\nQuestion: Where is Mary?\nAnswer:")
    question.build_all_requests(rank=0, world_size=1)
    (instance,) = question.instances
    instance.resps.append(" Hallway. He")
    question.apply_filters()
    assert question.process_results(babi, [instance.filtered_resps["none"]]) == {"exact_match": 1.0}
