"""Questions about long documents: what is in window and memory, what is encoded, other readers, runs that go on."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from longmem.evaluation.qa import run as run_module
from tiny_models import some_text

from longmem import MemoryBank
from longmem.evaluation import qa
from longmem.evaluation.runs import RunFolder
from longmem.evaluation.systems import Banks, make_systems

ROOT = Path(__file__).parents[2]
WINDOW, LOCAL = 128, 40
SYSTEMS = ("backbone", "context-192", "bm25", "off", "on", "wrong")
OPTIONS = ("the cat", "rain fell on it", "a mat", "one dog in this house")


def settings_of(task: str, tmp_path: Path, **changes: Any) -> qa.QASettings:
    common = {"window": WINDOW, "local_tokens": LOCAL, "systems": SYSTEMS, "max_new_tokens": 3}
    return qa.QASettings(task=task, data="-", output=str(tmp_path / "run"), **{**common, **changes})


def quality_documents(count: int = 3) -> list[qa.Document]:
    def items(name: str) -> tuple[qa.Item, ...]:
        return tuple(
            qa.Item(item_id=f"{name}/{n}", question=f"who {n * 'sat '}?", options=OPTIONS, answer=OPTIONS[n])
            for n in (0, 2, 3)
        )

    return [qa.Document(str(seed), (some_text(18, seed),), items(str(seed))) for seed in range(count)]


def locomo_documents(count: int = 2) -> list[qa.Document]:
    answers = {
        "multi-hop": "dog, rain",
        "single-hop": "the old cat",
        "adversarial": "Not mentioned in the conversation",
    }

    def items(name: str) -> tuple[qa.Item, ...]:
        return tuple(
            qa.Item(
                item_id=f"{name}/{kind}",
                question="who sat?",
                answer=answer,
                category=kind,
                trap="rain" * (kind[0] == "a"),
            )
            for kind, answer in answers.items()
        )

    texts = [[f"[8 May] Ann: {some_text(4, 10 * seed + turn)}\n" for turn in range(4)] for seed in range(count)]
    return [qa.Document(f"conv-{seed}", tuple(own), items(f"conv-{seed}")) for seed, own in enumerate(texts)]


def run(model: Any, documents: list[qa.Document], settings: qa.QASettings) -> list[dict[str, Any]]:
    plans = qa.plan_documents(model, documents, settings)
    with RunFolder(settings.output, qa.describe_plans(plans)) as folder:
        qa.evaluate_qa(model, plans, settings, folder)
        return folder.records


@torch.no_grad()
def test_a_question_is_answered_with_the_end_of_the_document_in_the_window_and_the_rest_in_memory(model, tmp_path):
    settings = settings_of("quality", tmp_path, systems=("backbone", "on"), instruction="Tell:")
    (document, *_) = documents = quality_documents(1)
    records = run(model, documents, settings)
    tokens = model.tokenizer(document.passages[0] + "\nTell:")["input_ids"]  # one byte a token: texts can be joined
    cut = len(document.passages[0]) - LOCAL
    bank = MemoryBank.for_model(model)
    model.memorize(bank, torch.tensor(tokens[:cut]), "document")
    for item in document.items:
        before = tokens[cut:] + model.tokenizer(f"\n\nQuestion: {item.question}\nAnswer:")["input_ids"]
        for system, forward in (("backbone", model.backbone), ("on", lambda ids: model(ids, memory=bank))):
            (record,) = (each for each in records if each["id"] == f"{item.item_id}/{system}")
            for number, option in enumerate(item.options):
                own = model.tokenizer(f" {option}")["input_ids"]
                logits = forward(torch.tensor([[*before, *own]])).logits[0, len(before) - 1 : -1]
                expected = logits.log_softmax(-1)[torch.arange(len(own)), torch.tensor(own)].sum().item()
                assert record["logprobs"][number] == pytest.approx(expected, rel=1e-4)
                assert record["tokens"][number] == len(own)


@pytest.mark.parametrize("task", ["quality", "locomo"])
def test_a_document_is_encoded_once_for_all_questions_and_both_memories(model, tmp_path, monkeypatch, task):
    monkeypatch.setattr(run_module, "ASKED_AT_ONCE", 2)  # in several calls, too
    documents = quality_documents() if task == "quality" else locomo_documents()
    settings = settings_of(task, tmp_path, systems=("on", "wrong"))
    plans = qa.plan_documents(model, documents, settings)
    records = run(model, documents, settings)
    encoded = [len(plan.memorized) for plan, _ in plans]
    # Of three documents the first comes again, as the wrong memory of the last; of two, both banks are still there.
    total = sum(encoded) + (encoded[0] if len(documents) > 2 else 0)
    assert sum(record["encoded_tokens"] for record in records) == pytest.approx(total)
    costs = qa.summarize_qa(records, task)["costs"]
    assert costs["on"]["encoded_tokens"] + costs["wrong"]["encoded_tokens"] == total
    assert costs["seconds_per_encoded_token"] > 0


def test_the_longest_question_decides_what_stays_in_the_window(model, tmp_path):
    (document,) = quality_documents(1)
    long = qa.Item(item_id="long", question="who " * 14, options=OPTIONS, answer=OPTIONS[0])
    settings = settings_of("quality", tmp_path, systems=("on",))
    longer = qa.Document("longer", document.passages, (*document.items, long))
    (plan, _), (other, _) = qa.plan_documents(model, [document, longer], settings)
    assert plan.local_tokens == LOCAL
    assert other.local_tokens == WINDOW - other.questions["long"].room < LOCAL
    for each in (plan, other):
        assert len(each.memorized) + each.local_tokens == sum(map(len, each.passages))
    too_long = qa.Item(item_id="too long", question="who " * 40, options=OPTIONS, answer=OPTIONS[0])
    with pytest.raises(ValueError, match=r"`window` must hold .* of question too long"):
        qa.plan_documents(model, [qa.Document("no", document.passages, (too_long,))], settings)


def test_the_wrong_memory_is_the_next_document_that_is_asked_about(model, tmp_path):
    documents = quality_documents(4)
    plans = qa.plan_documents(model, documents, settings_of("quality", tmp_path, limit=2))
    assert [(plan.document.document_id, other.document.document_id) for plan, other in plans] == [
        ("0", "2"),
        ("2", "0"),
    ]
    ((plan, other),) = qa.plan_documents(model, documents, settings_of("quality", tmp_path, limit=1))
    assert (plan.document.document_id, other.document.document_id) == ("0", "1")
    with pytest.raises(ValueError, match="`systems` must be without wrong where the file has one document"):
        qa.plan_documents(model, documents[:1], settings_of("quality", tmp_path))


class LastSentence:
    """A reader that is no model: it answers with the last sentence that it was fed."""

    def __init__(self) -> None:
        self.fed: list[str] = []
        self.queries: list[str] = []
        self.resets = 0

    def reset(self) -> None:
        self.fed = []
        self.resets += 1

    def feed(self, chunk: str) -> None:
        self.fed.append(chunk)

    def answer(self, query: str) -> str:
        self.queries.append(query)
        return self.fed[-1].rpartition(": ")[2].strip()


def test_any_reader_can_be_asked(model):
    documents = locomo_documents()
    reader = LastSentence()
    records = list(qa.answer_documents(reader, qa.choose_items(documents, None), name="last sentence"))
    assert reader.resets == len(documents)
    assert reader.queries[0] == "\nQuestion: who sat?\nAnswer:"
    last = documents[1].passages[-1].rpartition(": ")[2].strip()
    assert [record["prediction"] for record in records if record["document"] == "conv-1"] == [last] * 3
    metrics = qa.summarize_locomo(records)
    assert metrics["summary"]["systems"]["last sentence"]["title"] == "last sentence"
    assert "likelihood" not in metrics
    assert "last sentence" in qa.markdown(metrics)
    chooser = LastSentence()
    chooser.answer = lambda query: "(C)"  # type: ignore[method-assign]
    records = list(qa.answer_documents(chooser, qa.choose_items(quality_documents(), None)))
    accuracy = qa.summarize_quality(records)["accuracy"]["by letter"]["systems"]
    assert accuracy["reader"]["value"] == pytest.approx(100 / 3)  # one of the three right answers is the third option


def test_a_system_is_a_reader_with_the_same_answers(model, tmp_path):
    documents = locomo_documents()
    settings = settings_of("locomo", tmp_path, systems=("on",), instruction="Tell:")
    expected = run(model, documents, settings)
    (system,) = make_systems(("on",), model, window=WINDOW, local_tokens=LOCAL, banks=Banks(model))
    answer = system.answer
    system.answer = lambda query: answer(query, max_new_tokens=3)  # type: ignore[method-assign]
    found = list(qa.answer_documents(system, qa.choose_items(documents, None), name="on", instruction="Tell:"))
    assert [record["id"] for record in found] == [record["id"] for record in expected]
    assert [record["prediction"] for record in found] == [record["prediction"] for record in expected]
    assert any(record["prediction"] for record in found)


def choice(system: str, item: str, logprobs: list[float], tokens: list[int], gold: int) -> dict[str, Any]:
    record = {"id": f"{item}/{system}", "item": item, "document": item[0], "system": system, "seconds": 2.0}
    return {**record, "options": list(OPTIONS), "gold": OPTIONS[gold], "logprobs": logprobs, "tokens": tokens}


def test_a_long_option_may_be_likelier_per_token_and_not_in_all():
    records = [
        choice("off", "a1", [-4.0, -6.0, -5.0, -9.0], [1, 3, 1, 2], gold=1),
        choice("off", "b1", [-4.0, -4.0, -1.0, -9.0], [1, 1, 1, 1], gold=3),
        choice("on", "b1", [-4.0, -4.0, -5.0, -2.0], [1, 1, 1, 1], gold=3),  # another order
        choice("on", "a1", [-4.0, -6.0, -5.0, -9.0], [1, 3, 1, 2], gold=0),
    ]
    with pytest.raises(ValueError, match="must have the same questions"):
        qa.summarize_quality(records[:3])
    metrics = qa.summarize_quality(records)
    values = {
        rule: {name: each["value"] for name, each in found["systems"].items()}
        for rule, found in metrics["accuracy"].items()
    }
    assert values == {
        "per token": {"off": 50, "on": 50, "longest": 50},
        "summed": {"off": 0, "on": 100, "longest": 50},
    }
    assert metrics["chance"] == 25
    assert metrics["costs"]["on"]["seconds_per_question"] == 2
    assert metrics["summary"]["systems"]["on"]["value"] == 50


def answered(
    system: str, item: str, category: str, gold: str, prediction: str, logprob: float, tokens: int
) -> dict[str, Any]:
    record = {"id": f"{item}/{system}", "item": item, "document": item[0], "system": system, "seconds": 1.0, "trap": ""}
    likelihoods = {"logprobs": [logprob], "tokens": [tokens]}
    return {**record, "category": category, "gold": gold, "prediction": prediction, **likelihoods}


def test_written_answers_are_reported_by_category_and_in_all():
    records = [
        answered("off", "a1", "single-hop", "red cat", "a cat", -6.0, 2),
        answered("off", "a2", "adversarial", "Not mentioned", "a cat", -90.0, 2),
        answered("off", "b1", "single-hop", "rain", "rain", -1.0, 1),
        answered("on", "a1", "single-hop", "red cat", "the red cat", -4.0, 2),
        answered("on", "a2", "adversarial", "Not mentioned", "It is not mentioned.", -90.0, 2),
        answered("on", "b1", "single-hop", "rain", "snow", -3.0, 1),
    ]
    metrics = qa.summarize_locomo(records)
    values = {
        kind: {name: each["value"] for name, each in panel["systems"].items()} for kind, panel in metrics["f1"].items()
    }
    assert values["single-hop"] == pytest.approx({"off": 100 * (2 / 3 + 1) / 2, "on": 50})
    assert values["adversarial"] == {"off": 0, "on": 100}
    assert values["all"] == pytest.approx({"off": 100 * (2 / 3 + 1) / 3, "on": 200 / 3})
    assert list(values) == ["all", "single-hop", "adversarial"]
    likelihood = metrics["likelihood"]["systems"]
    assert likelihood["off"]["value"] == (-3 - 1) / 2
    assert likelihood["on"]["above_baseline"] == ((3 - 2) + (1 - 3)) / 2
    assert likelihood["on"]["above_baseline_interval"] == [-2, 1]  # two conversations: one, the other or both


@pytest.mark.parametrize("task", ["quality", "locomo"])
def test_a_stopped_run_goes_on_inside_a_document(model, tmp_path, monkeypatch, task):
    monkeypatch.setattr(run_module, "ASKED_AT_ONCE", 2)
    documents = quality_documents(2) if task == "quality" else locomo_documents()
    systems = ("backbone", "on")
    whole = run(model, documents, settings_of(task, tmp_path / "whole", systems=systems))
    asked = []
    ask = run_module.ask

    def stopping(*arguments: Any) -> Any:
        asked.append(len(arguments[2]))
        if len(asked) == 4:  # half of a document
            raise KeyboardInterrupt
        return ask(*arguments)

    monkeypatch.setattr(run_module, "ask", stopping)
    settings = settings_of(task, tmp_path / "stopped", systems=systems)
    with pytest.raises(KeyboardInterrupt):
        run(model, documents, settings)
    resumed = run(model, documents, settings)
    count = sum(asked)
    assert count - asked[3] == len(whole)  # but for what was stopped, everything was asked once
    assert run(model, documents, settings) == resumed
    assert sum(asked) == count
    costs = ("seconds", "preparing_seconds", "encoded_tokens")
    bare = [[{key: each[key] for key in each if key not in costs} for each in records] for records in (whole, resumed)]
    for one, other in zip(*bare, strict=True):
        assert one.pop("logprobs") == pytest.approx(other.pop("logprobs"), rel=1e-4)
        assert one == other


def test_settings_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`local_tokens` must be below `window`, got 128 and 128"):
        settings_of("quality", tmp_path, local_tokens=WINDOW)
    with pytest.raises(ValueError, match="`style` must be text where there are no options"):
        settings_of("locomo", tmp_path, style="letter")


def write_data(task: str, folder: Path) -> Path:
    path = folder / f"{task}.json"
    if task == "quality":
        rows = [
            {"article_id": document.document_id, "article": document.passages[0], "questions": [
                {"question": item.question, "options": item.options, "gold_label": 1 + item.options.index(item.answer)}
                for item in document.items
            ]}
            for document in quality_documents(2)
        ]  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path
    turns = [{"speaker": "Ann", "text": some_text(4, seed)} for seed in range(5)]
    talk = {"session_1_date_time": "8 May", "session_1": turns}
    questions = [
        {"question": "who?", "answer": 7, "category": 2},
        {"question": "what?", "adversarial_answer": "x", "category": 5},
    ]
    rows = [{"sample_id": name, "conversation": talk, "qa": questions} for name in ("one", "two")]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("task", "style"), [("quality", "text"), ("quality", "letter"), ("locomo", "text")])
def test_one_command_leaves_a_result_folder_and_goes_on(backbone_folder, tmp_path, monkeypatch, capsys, task, style):
    data, output = write_data(task, tmp_path), tmp_path / "results"
    script = ROOT / "eval" / "eval_qa.py"
    # Bytes are tokens here: a question with its options is long.
    changes = [f"data={data}", f"output={output}", f"model={backbone_folder}", "window=200", f"local_tokens={LOCAL}"]
    changes += ["systems=[backbone, bm25, on, wrong]", "max_new_tokens=2", f"style={style}", "limit=3", "dtype=null"]
    changes += ["config={segment_length: 16, num_retrieved_tokens: 8}", "instruction=null"]
    monkeypatch.setattr("sys.argv", [str(script), str(ROOT / f"configs/eval/qa-{task}.yaml"), *changes])
    runpy.run_path(str(script), run_name="__main__")
    assert "emory on" in capsys.readouterr().out  # the terminal may break a row's name
    assert "| LongMem, memory on |" in (output / "table.md").read_text()
    names = {
        "config.json",
        "environment.json",
        "metrics.json",
        "predictions.jsonl",
        "sessions.jsonl",
        "table.md",
        "accuracy.png",
    }
    assert {path.name for path in output.iterdir()} == names
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["questions"] == 3
    assert list(metrics["summary"]["systems"])[:4] == ["backbone", "bm25", "on", "wrong"]
    lines = (output / "predictions.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 12
    (output / "predictions.jsonl").write_text("".join(lines[:7]) + lines[7][:20])  # as a stopped run leaves it
    runpy.run_path(str(script), run_name="__main__")
    again = json.loads((output / "metrics.json").read_text())
    assert {name: each["value"] for name, each in again["summary"]["systems"].items()} == {
        name: each["value"] for name, each in metrics["summary"]["systems"].items()
    }
    monkeypatch.setattr("sys.argv", [*map(str, [script, ROOT / f"configs/eval/qa-{task}.yaml"]), *changes, "seed=1"])
    with pytest.raises(ValueError, match="Name another folder"):
        runpy.run_path(str(script), run_name="__main__")
    monkeypatch.setattr(
        "sys.argv", [*map(str, [script, ROOT / f"configs/eval/qa-{task}.yaml"]), *changes, "local_tokens=200"]
    )
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    assert "`local_tokens` must be below `window`" in capsys.readouterr().err
