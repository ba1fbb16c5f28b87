"""Questions about long documents: what is in window and memory, what is encoded, other readers, runs that go on."""

from __future__ import annotations

import io
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_fast import fast
from rich.console import Console
from tiny_models import some_text

from longmem import MemoryBank
from longmem.evaluation import runner as runner_module
from longmem.evaluation.runner import evaluate, wrong_cases
from longmem.evaluation.summary import summarize
from longmem.evaluation.systems import Banks, make_systems
from longmem.evaluation.tables import markdown
from longmem.evaluation.tasks.locomo import Locomo, LocomoSettings
from longmem.evaluation.tasks.quality import Quality, QualitySettings
from longmem.evaluation.tasks.reading import Asked, Document, ReadingTask, answer_documents

ROOT = Path(__file__).parents[2]
WINDOW, LOCAL = 128, 40
SYSTEMS = ("backbone", "context-192", "bm25", "off", "on", "wrong")
OPTIONS = ("the cat", "rain fell on it", "a mat", "one dog in this house")
COSTS = ("seconds", "preparing_seconds", "encoded_tokens")


def task_of(name: str, tmp_path: Path, documents: list[Document] | None = None, **changes: Any) -> ReadingTask:
    common = {"window": WINDOW, "local_tokens": LOCAL, "systems": SYSTEMS, "data": "-", "output": str(tmp_path / "run")}
    if name == "quality":
        return Quality(QualitySettings(**{**common, **changes}), documents or quality_documents())
    return Locomo(LocomoSettings(**{**common, "max_new_tokens": 3, **changes}), documents or locomo_documents())


def quality_documents(count: int = 3) -> list[Document]:
    asked = [Asked(name=str(n), question=f"who {n * 'sat '}?", options=OPTIONS, answer=OPTIONS[n]) for n in (0, 2, 3)]
    return [Document(str(seed), (some_text(18, seed),), tuple(asked)) for seed in range(count)]


def locomo_documents(count: int = 2) -> list[Document]:
    answers = {
        "multi-hop": "dog, rain",
        "single-hop": "the old cat",
        "adversarial": "Not mentioned in the conversation",
    }
    asked = tuple(
        Asked(name=kind, question="who sat?", answer=answer, category=kind, trap="rain" * (kind[0] == "a"))
        for kind, answer in answers.items()
    )
    texts = [[f"[8 May] Ann: {some_text(4, 10 * seed + turn)}\n" for turn in range(4)] for seed in range(count)]
    return [Document(f"conv-{seed}", tuple(own), asked) for seed, own in enumerate(texts)]


def run(model: Any, task: ReadingTask) -> list[dict[str, Any]]:
    """Return the records of a finished run, but for guesses."""
    evaluate(task, Console(file=io.StringIO()), model)
    lines = (Path(task.settings.output) / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [record for record in map(json.loads, lines) if record["system"] not in task.baselines]


@torch.no_grad()
def test_a_question_is_answered_with_the_end_of_the_document_in_the_window_and_the_rest_in_memory(model, tmp_path):
    (document,) = documents = quality_documents(1)
    records = run(model, task_of("quality", tmp_path, documents, systems=("backbone", "on"), instruction="Tell:"))
    tokens = model.tokenizer(document.passages[0] + "\nTell:")["input_ids"]  # one byte a token: texts can be joined
    cut = len(document.passages[0]) - LOCAL
    bank = MemoryBank.for_model(model)
    model.memorize(bank, torch.tensor(tokens[:cut]), "document")
    for asked in document.asked:
        before = tokens[cut:] + model.tokenizer(f"\n\nQuestion: {asked.question}\nAnswer:")["input_ids"]
        for system, forward in (("backbone", model.backbone), ("on", lambda ids: model(ids, memory=bank))):
            (record,) = (each for each in records if each["id"] == f"{document.name}/{asked.name}/{system}")
            for number, option in enumerate(asked.options):
                own = model.tokenizer(f" {option}")["input_ids"]
                logits = forward(torch.tensor([[*before, *own]])).logits[0, len(before) - 1 : -1]
                expected = logits.log_softmax(-1)[torch.arange(len(own)), torch.tensor(own)].sum().item()
                assert record["logprobs"][number] == pytest.approx(expected, rel=1e-4)
                assert record["tokens"][number] == len(own)


@pytest.mark.parametrize("name", ["quality", "locomo"])
def test_a_document_is_encoded_once_for_all_questions_and_both_memories(model, tmp_path, monkeypatch, name):
    monkeypatch.setattr(ReadingTask, "asked_at_once", 2)  # in several calls, too
    task = task_of(name, tmp_path, systems=("on", "wrong"))
    records = run(model, task)
    encoded = [len(case.memorized) for case in task.cases(model)]
    # Of three documents the first comes again, as the wrong memory of the last; of two, both banks are still there.
    total = sum(encoded) + (encoded[0] if len(encoded) > 2 else 0)
    assert sum(record["encoded_tokens"] for record in records) == pytest.approx(total)
    costs = summarize(task, records)["costs"]
    assert sum(costs["systems"][system]["encoded_tokens"] for system in ("on", "wrong")) == total
    assert costs["seconds_per_encoded_token"] > 0


def test_the_longest_question_decides_what_stays_in_the_window(model, tmp_path):
    (document,) = quality_documents(1)
    long = Asked(name="long", question="who " * 14, options=OPTIONS, answer=OPTIONS[0])
    longer = Document("longer", document.passages, (*document.asked, long))
    case, other = task_of("quality", tmp_path, [document, longer]).cases(model)
    assert case.local_tokens == LOCAL
    assert other.local_tokens == WINDOW - other.room(other.items[-1]) < LOCAL
    for each in (case, other):
        assert len(each.memorized) + each.local_tokens == sum(map(len, each.memory))
    too_long = Asked(name="too long", question="who " * 40, options=OPTIONS, answer=OPTIONS[0])
    with pytest.raises(ValueError, match=r"`window` must hold .* of question no/too long"):
        task_of("quality", tmp_path, [Document("no", document.passages, (too_long,))]).cases(model)


def test_the_wrong_memory_is_the_next_document_that_is_asked_about(model, tmp_path):
    documents = quality_documents(4)

    def wrong(limit: int | None, documents: list[Document]) -> list[tuple[str, str]]:
        task = task_of("quality", tmp_path, documents, limit=limit)
        return [(name, other.name) for name, other in wrong_cases(task, task.cases(model)).items() if other]

    assert wrong(2, documents) == [("0", "2"), ("2", "0")]
    assert wrong(1, documents) == [("0", "1")]
    with pytest.raises(ValueError, match="`systems` must leave out `wrong` where there is no other group"):
        wrong(None, documents[:1])


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


def test_any_reader_can_be_asked(tmp_path):
    documents = locomo_documents()
    reader, task = LastSentence(), task_of("locomo", tmp_path, documents)
    records = list(answer_documents(task, reader, name="last sentence"))
    assert reader.resets == len(documents)
    assert reader.queries[0] == "\nQuestion: who sat?\nAnswer:"
    last = documents[1].passages[-1].rpartition(": ")[2].strip()
    assert [record["prediction"] for record in records if record["case"] == "conv-1"] == [last] * 3
    metrics = summarize(task, records)
    assert metrics["summary"]["systems"]["last sentence"]["title"] == "last sentence"
    assert "likelihood" not in metrics["measures"]
    assert "last sentence" in markdown(metrics)
    chooser = LastSentence()
    chooser.answer = lambda query: "(C)"  # type: ignore[method-assign]
    task = task_of("quality", tmp_path, style="letter")
    accuracy = summarize(task, list(answer_documents(task, chooser)))["measures"]["by letter"]["cells"]["all"][
        "systems"
    ]
    assert accuracy["reader"]["value"] == pytest.approx(100 / 3)  # one of the three right answers is the third option
    with pytest.raises(ValueError, match="`style` must be letter"):
        list(answer_documents(task_of("quality", tmp_path), chooser))


def test_a_system_is_a_reader_with_the_same_answers(model, tmp_path):
    task = task_of("locomo", tmp_path, systems=("on",), instruction="Tell:")
    expected = run(model, task)
    (system,) = make_systems(("on",), model, window=WINDOW, local_tokens=LOCAL, banks=Banks(model))
    answer = system.answer
    system.answer = lambda query: answer(query, max_new_tokens=3)  # type: ignore[method-assign]
    found = list(answer_documents(task, system, name="on"))
    assert [record["id"] for record in found] == [record["id"] for record in expected]
    assert [record["prediction"] for record in found] == [record["prediction"] for record in expected]
    assert any(record["prediction"] for record in found)


def choice(system: str, item: str, logprobs: list[float], tokens: list[int], gold: int) -> dict[str, Any]:
    record = {
        "id": f"{item}/{system}",
        "item": item,
        "case": item[0],
        "group": item[0],
        "system": system,
        "seconds": 2.0,
    }
    return {**record, "options": list(OPTIONS), "gold": OPTIONS[gold], "logprobs": logprobs, "tokens": tokens}


def test_a_long_option_may_be_likelier_per_token_and_not_in_all(tmp_path):
    records = [
        choice("off", "a1", [-4.0, -6.0, -5.0, -9.0], [1, 3, 1, 2], gold=1),
        choice("off", "b1", [-4.0, -4.0, -1.0, -9.0], [1, 1, 1, 1], gold=3),
        choice("on", "b1", [-4.0, -4.0, -5.0, -2.0], [1, 1, 1, 1], gold=3),  # another order
        choice("on", "a1", [-4.0, -6.0, -5.0, -9.0], [1, 3, 1, 2], gold=0),
    ]
    task = task_of("quality", tmp_path)
    with pytest.raises(ValueError, match="must have the same questions"):
        summarize(task, records[:3])
    for record in records[:2]:  # the longest of the options, which are the same for both
        guess = {"id": f"{record['item']}/longest", "system": "longest", "choice": 3}
        records.append({**{key: record[key] for key in ("item", "case", "group", "options", "gold")}, **guess})
    metrics = summarize(task, records)
    values = {
        rule: {name: each["value"] for name, each in measure["cells"]["all"]["systems"].items()}
        for rule, measure in metrics["measures"].items()
    }
    assert values == {
        "per token": {"off": 50, "on": 50, "longest": 50},
        "summed": {"off": 0, "on": 100, "longest": 50},
    }
    assert metrics["summary"]["chance"] == 25
    assert metrics["costs"]["systems"]["on"]["seconds_per_item"] == 2
    assert metrics["summary"]["systems"]["on"]["value"] == 50


def answered(
    system: str, item: str, category: str, gold: str, prediction: str, logprob: float, tokens: int
) -> dict[str, Any]:
    record = {
        "id": f"{item}/{system}",
        "item": item,
        "case": item[0],
        "group": item[0],
        "system": system,
        "seconds": 1.0,
    }
    likelihoods = {"logprobs": [logprob], "tokens": [tokens]}
    return {**record, "category": category, "gold": gold, "prediction": prediction, **likelihoods}


def test_written_answers_are_reported_by_category_and_in_all(tmp_path):
    records = [
        answered("off", "a1", "single-hop", "red cat", "a cat", -6.0, 2),
        answered("off", "a2", "adversarial", "Not mentioned", "a cat", -90.0, 2),
        answered("off", "b1", "single-hop", "rain", "rain", -1.0, 1),
        answered("on", "a1", "single-hop", "red cat", "the red cat", -4.0, 2),
        answered("on", "a2", "adversarial", "Not mentioned", "It is not mentioned.", -90.0, 2),
        answered("on", "b1", "single-hop", "rain", "snow", -3.0, 1),
    ]
    measures = summarize(task_of("locomo", tmp_path), records)["measures"]
    values = {
        category: {name: each["value"] for name, each in cell["systems"].items()}
        for category, cell in measures["f1"]["cells"].items()
    }
    assert values["single-hop"] == pytest.approx({"off": 100 * (2 / 3 + 1) / 2, "on": 50})
    assert values["adversarial"] == {"off": 0, "on": 100}
    assert values["all"] == pytest.approx({"off": 100 * (2 / 3 + 1) / 3, "on": 200 / 3})
    assert list(values) == ["all", "single-hop", "adversarial"]
    likelihood = measures["likelihood"]["cells"]["all"]["systems"]
    assert likelihood["off"]["value"] == (-3 - 1) / 2
    assert likelihood["on"]["above_baseline"] == ((3 - 2) + (1 - 3)) / 2
    assert likelihood["on"]["above_baseline_interval"] == [-2, 1]  # two conversations: one, the other or both


@pytest.mark.parametrize("name", ["quality", "locomo"])
def test_a_stopped_run_goes_on_inside_a_document(model, tmp_path, monkeypatch, name):
    monkeypatch.setattr(ReadingTask, "asked_at_once", 2)
    documents = quality_documents(2) if name == "quality" else locomo_documents()

    def task(folder: str) -> ReadingTask:
        return task_of(name, tmp_path / folder, documents, systems=("backbone", "on"))

    whole = run(model, task("whole"))
    asked: list[int] = []
    answers_of = runner_module.answers_of

    def stopping(*arguments: Any) -> Any:
        asked.append(len(arguments[3]))
        if len(asked) == 4:  # half of a document
            raise KeyboardInterrupt
        return answers_of(*arguments)

    monkeypatch.setattr(runner_module, "answers_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(model, task("stopped"))
    resumed = run(model, task("stopped"))
    count = sum(asked)
    assert count - asked[3] == len(whole)  # but for what was stopped, everything was asked once
    assert run(model, task("stopped")) == resumed
    assert sum(asked) == count
    bare = [[{key: each[key] for key in each if key not in COSTS} for each in records] for records in (whole, resumed)]
    for one, other in zip(*bare, strict=True):
        assert one.pop("logprobs") == pytest.approx(other.pop("logprobs"), rel=1e-4)
        assert one == other


def test_settings_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`local_tokens` must be below `window`, got 128 and 128"):
        task_of("quality", tmp_path, local_tokens=WINDOW)


def write_data(name: str, folder: Path) -> Path:
    path = folder / f"{name}.json"
    if name == "quality":
        rows = [
            {"article_id": document.name, "article": document.passages[0], "questions": [
                {"question": asked.question, "options": asked.options, "gold_label": 1 + asked.options.index(asked.answer)}
                for asked in document.asked
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


@pytest.mark.parametrize(("name", "style"), fast(2, [("quality", "letter"), ("locomo", ""), ("quality", "text")]))
def test_one_command_leaves_a_result_folder_and_goes_on(backbone_folder, tmp_path, monkeypatch, capsys, name, style):
    data, output = write_data(name, tmp_path), tmp_path / "results"
    # Bytes are tokens here: a question with its options is long.
    changes = [f"data={data}", f"output={output}", f"model={backbone_folder}", "window=200", f"local_tokens={LOCAL}"]
    changes += ["systems=[backbone, bm25, on, wrong]", "limit=3", "dtype=null", "instruction=null"]
    changes += [
        "config={segment_length: 16, num_retrieved_tokens: 8}",
        f"style={style}" if style else "max_new_tokens=2",
    ]

    def call(*more: str) -> None:
        monkeypatch.setattr("sys.argv", ["eval_qa.py", name, *changes, *more])
        runpy.run_path(str(ROOT / "eval" / "eval_qa.py"), run_name="__main__")

    call()
    assert "emory on" in capsys.readouterr().out  # the terminal may break a row's name
    assert "| LongMem, memory on |" in (output / "table.md").read_text()
    names = {
        *("config.json", "environment.json", "metrics.json", "predictions.jsonl", "sessions.jsonl", "table.md"),
        "accuracy.png",
    }
    assert {path.name for path in output.iterdir()} == names
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics["summary"]["systems"])[:4] == ["backbone", "bm25", "on", "wrong"]
    (first, *_) = metrics["measures"].values()
    assert all(own["items"] == 3 for own in first["cells"]["all"]["systems"].values())
    lines = (output / "predictions.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == (12 if name == "locomo" else 15)  # with the longest options
    (output / "predictions.jsonl").write_text("".join(lines[:7]) + lines[7][:20])  # as a stopped run leaves it
    call()
    again = json.loads((output / "metrics.json").read_text())
    assert {name: each["value"] for name, each in again["summary"]["systems"].items()} == {
        name: each["value"] for name, each in metrics["summary"]["systems"].items()
    }
    with pytest.raises(SystemExit, match="Name another folder"):
        call("seed=1")
    with pytest.raises(SystemExit, match="`local_tokens` must be below `window`"):
        call("local_tokens=200")
