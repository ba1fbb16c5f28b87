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


def test_a_task_that_makes_its_data_measures_with_the_models_tokenizer(command, capsys):
    changes = ("tasks=[made]", "metadata={max_seq_lengths: [12, 40]}", "systems=[context-64, on]")
    output = command(*changes)
    metrics = read(output / "metrics.json")
    # Of the lengths that were not asked for there is nothing, whatever lm-eval's own value is.
    assert [(name, own["unit"]) for name, own in metrics["measures"].items()] == [("made: 12", "%"), ("made: 40", "%")]
    systems = metrics["measures"]["made: 40"]["cells"]["made"]["systems"]
    assert list(systems) == ["context-64", "on"]
    assert all("interval" in own for own in systems.values())
    records = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    shares = [record["metrics"]["40"] for record in records if record["system"] == "on" and "40" in record["metrics"]]
    assert len(shares) == 3
    assert systems["on"]["value"] == pytest.approx(100 * sum(shares) / 3)
    capsys.readouterr()
    command(*changes)  # the same seed makes the same data, so the run is known
    assert "items" not in capsys.readouterr().out.partition("\n\n")[0]
    with pytest.raises(SystemExit, match="Name another folder"):
        command(*changes, "metadata={max_seq_lengths: [12, 80]}")


def loaded(*overrides: str, tokenizer: Any = None) -> dict[str, Any]:
    """Return the tasks of a run, with their data."""
    from longmem.evaluation.harness.task import Harness, load_tasks

    harness = Harness(load_evaluation(Harness.kind, default_settings("harness"), overrides))
    if tokenizer is not None:
        tokenizer.save_pretrained(harness.manager.metadata["tokenizer"])
    return load_tasks(harness.manager, harness.settings)


@pytest.mark.parametrize(
    "asks",
    [
        "dataset_path: nobody/none\ntest_split: test",
        "dataset_path: nobody/none\ndataset_name: hotpotqa\ntest_split: test",
        "dataset_path: nobody/none\ntest_split: qa1\ndataset_kwargs: {qa_split: qa1}",
        "dataset_path: nobody/none\ntraining_split: train\nvalidation_split: validation",
        "dataset_path: ''\ntest_split: test\ncustom_dataset: !function made.items",
    ],
)
def test_data_of_ones_own_stand_for_whatever_a_task_would_read(asks, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = write_tasks(tmp_path / "tasks")
    fields = "output_type: generate_until\ndoc_to_text: '{{input}}'\ndoc_to_target: '{{target}}'"
    (tasks / "own.yaml").write_text(f"task: own\n{fields}\n{asks}\n")
    (tmp_path / "own.jsonl").write_text(json.dumps({"input": "Mary left.", "target": "hall"}) + "\n")
    found = loaded(f"output={tmp_path}", f"data={tmp_path}", f"include_path={tasks}", "tasks=[own]")
    assert list(found["own"].eval_docs) == [{"input": "Mary left.", "target": "hall"}]


def own_tasks(name: str) -> Path:
    """Return the folder of a benchmark in lm-eval."""
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks" / name


def test_the_task_of_babilong_asks_stories_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    item = {"input": "Mary went to the hall.", "question": "Where is Mary?", "target": "hall"}
    (tmp_path / "babilong_qa1.jsonl").write_text(json.dumps(item) + "\n")
    changes = (f"data={tmp_path}", f"include_path={own_tasks('babilong')}", "tasks=[babilong_qa1]")
    task = loaded(f"output={tmp_path}", *changes)["babilong_qa1"]
    task.build_all_requests(rank=0, world_size=1)
    prompt = task.instances[0].args[0]
    assert "The most recent location of Charlie is balcony." in prompt  # lm-eval's own examples
    assert prompt.endswith("Mary went to the hall.\nWhere is Mary?")
    assert task.process_results(item, ["The most recent location of Mary is hall."]) == {"acc": 1.0}


@pytest.mark.slow
def test_rulers_tasks_that_make_all_their_data_are_asked_whole(command):
    """500 prompts each, of which two are asked; with memory no token of them is cut off."""
    pytest.importorskip("wonderwords")
    output = command(
        "tasks=[niah_single_1, niah_multikey_2]", f"include_path={own_tasks('ruler')}", "metadata={max_seq_lengths: [4096]}",
        "systems=[on]", "limit=2", "window=256", "local_tokens=64", "config={segment_length: 256, num_retrieved_tokens: 8}",
    )  # fmt: skip
    assert list(read(output / "metrics.json")["measures"]) == ["niah_single_1: 4096", "niah_multikey_2: 4096"]
    records = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert len(records) == 4
    assert all(record["encoded_tokens"] > 1000 for record in records)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("systems=[on, wrong]", "`systems` must be among backbone, off, on, context-N, got 'wrong'"),
        ("systems=[on, context-16]", "`context` must be longer than the window of 16 tokens, got 16"),
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
    tasks = loaded(f"output={tmp_path}", f"data={tmp_path}")
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
