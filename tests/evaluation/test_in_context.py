"""Rules, draws, what stands where, what is encoded, and metrics, each against a computation of its own."""

from __future__ import annotations

import io
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from in_context_data import save_sets, save_squad
from rich.console import Console

from longmem import MemoryBank
from longmem.evaluation.runner import evaluate, wrong_cases
from longmem.evaluation.summary import summarize
from longmem.evaluation.systems import Banks, Question, make_systems
from longmem.evaluation.tables import markdown, tables_of
from longmem.evaluation.task import best
from longmem.evaluation.tasks.demonstrations import DemonstrationTask, joined
from longmem.evaluation.tasks.labelled import Labelled, LabelledSettings, calibrated_label, prefix_rule
from longmem.evaluation.tasks.squad import Squad, SquadSettings, f1

WINDOW = 256


def task_of(name: str, tmp_path: Path, **values: Any) -> DemonstrationTask:
    """Return the task of SQuAD or, by its name, of one of the labelled sets."""
    common = {"output": str(tmp_path / "run"), "seeds": (1,), "window": WINDOW, "systems": ("on",)}
    if name == "squad":
        data = str(save_squad(tmp_path / "squad.json"))
        small = {"data": data, "demonstrations": 1, "memory_demonstrations": 4, "max_new_tokens": 3}
        return Squad(SquadSettings(**{**common, **small, **values}))
    if not (tmp_path / "sets").exists():
        save_sets(tmp_path / "sets")
    small = {"data": str(tmp_path / "sets"), "demonstrations": 2, "memory_demonstrations": 6}
    return Labelled(LabelledSettings(**{**common, **small, "sets": (name,), **values}))


def logs(*probabilities: float) -> list[float]:
    return [math.log(each) for each in probabilities]


def texts(task: DemonstrationTask, name: str, seed: int) -> tuple[list[str], list[str]]:
    """Return the demonstrations of a seed, for the window and for memory."""
    window, memory, _ = task.draw(name, seed)
    return ["".join(each) for each in window], ["".join(each) for each in memory]


def run(task: DemonstrationTask, model: Any) -> list[dict[str, Any]]:
    """Return the records of a finished run, but for guesses."""
    evaluate(task, Console(file=io.StringIO()), model)
    lines = (Path(task.settings.output) / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [record for record in map(json.loads, lines) if record["system"] not in task.baselines]


# Rules -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["positive", "great"])
@pytest.mark.parametrize("token", [" positive", "p", " g", "", " ", "\n", "positively", " Great", "ositive", " great "])
def test_the_prefix_rule_is_the_released_one(token, word):
    assert prefix_rule(token, word) == bool(word.startswith(token.strip()) and token.strip() != "")


def test_labels_with_and_without_calibration():
    answer = logs(0.06, 0.04)
    content_free = [logs(0.08, 0.02), logs(0.5, 0.5), logs(0.4, 0.1)]  # restricted to labels: .8/.2, .5/.5, .8/.2
    assert best(answer) == 0
    assert calibrated_label(answer, content_free) == 1  # .6 / .7 < .4 / .3
    assert calibrated_label(logs(0.75, 0.25), content_free) == 0  # .75 / .7 > .25 / .3
    assert calibrated_label(answer, [logs(0.5, 0.5)] * 3) == 0
    # Each input counts the same, however likely it makes the label words together.
    assert calibrated_label(logs(0.4, 0.6), [logs(0.0009, 0.0001), logs(0.09, 0.81)]) == 1
    assert calibrated_label([-5000.0, -5001.0], [[-10.0, -4000.0]]) == 1  # no division by 0
    assert best([-2.0, -1.0, -1.0]) == 1


# Draws -----------------------------------------------------------------------------------------------------------------


def test_demonstrations_are_those_of_the_released_script(tmp_path):
    task = task_of("mr", tmp_path)
    path = tmp_path / "sets" / "mr" / "train.csv"
    data = [(line[2:], "positive" if int(line[0]) == 1 else "negative") for line in path.read_text().splitlines()]
    for seed in (1, 2):
        random.seed(seed)
        window = ["Review: {} Sentiment: {}. ".format(*each) for each in random.sample(data, 2)]
        memory = ["Review: {} Sentiment: {}. ".format(*each) for each in random.sample(data, 6)]
        assert texts(task, "mr", seed) == (window, memory)
    state = random.getstate()
    task.draw("mr", 3)
    assert random.getstate() == state


def test_the_wrong_memory(tmp_path, model):
    task = task_of("mr", tmp_path, sets=("mr", "subj"), systems=("on", "wrong"), seeds=(1, 2))
    cases = task.cases(model)
    assert [case.name for case in cases] == ["mr/1", "subj/1", "mr/2", "subj/2"]
    wrong = wrong_cases(task, cases)
    assert {name: other.name for name, other in wrong.items()} == {
        "mr/1": "subj/1",
        "subj/1": "mr/1",
        "mr/2": "subj/2",
        "subj/2": "mr/2",
    }
    # With one set: the same questions in their order, the same number of each answer, but not everywhere the same answer.
    for name, mark in (("mr", "Sentiment:"), ("squad", "Answer:")):
        task = task_of(name, tmp_path, systems=("on", "wrong"))
        (case,) = cases = task.cases(model)
        other = wrong_cases(task, cases)[case.name]
        right, exchanged = (
            [model.tokenizer.decode(line).split(mark) for line in lines] for lines in (case.memory, other.memory)
        )
        assert ["".join(each) for each in right] == [text.replace(mark, "") for text in texts(task, name, 1)[1]]
        assert [each[0] for each in right] == [each[0] for each in exchanged]
        assert sorted(each[1] for each in right) == sorted(each[1] for each in exchanged)
        assert [each[1] for each in right] != [each[1] for each in exchanged]


def test_every_line_begins_with_bos_where_that_is_set(tmp_path, model):
    with pytest.raises(ValueError, match="`bos_per_line` must be false for a tokenizer without"):
        task_of("mr", tmp_path, bos_per_line=True).cases(model)
    (plain,) = task_of("mr", tmp_path).cases(model)
    model.tokenizer.bos_token = "!"
    (case,) = task_of("mr", tmp_path, bos_per_line=True).cases(model)
    bos = model.tokenizer.bos_token_id
    assert [item.token_ids for item in case.items] == [[bos, *item.token_ids] for item in plain.items]
    assert case.memory == [[bos, *line] for line in plain.memory]
    assert case.window == [[bos, *line] for line in plain.window]
    words = case.items[0].candidates
    assert words == plain.items[0].candidates  # a label word does not begin a line
    assert model.tokenizer.decode(words[1]) == " positive"


# Places ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [130, 250])
@torch.no_grad()
def test_only_whole_demonstrations_stand_in_a_window(tmp_path, model, window):
    names = ("backbone", "context-400", "bm25", "hidden", "off", "on", "wrong")
    task = task_of("mr", tmp_path, window=window, systems=names, memory_demonstrations=8)
    (case,) = cases = task.cases(model)
    wrong, room = wrong_cases(task, cases)[case.name], case.longest
    options = {"batch_size": task.settings.batch_size, "banks": Banks(model), "retrieval": task.retrieval}
    for system in make_systems(names, model, window=window, **options):
        counts = task.prepare(system, case, wrong if system.name == "wrong" else None)
        lines = task.shown(system, case, room)
        own = 400 if system.name == "context-400" else window
        share = 0.5 if system.name in ("bm25", "hidden") else 0
        assert counts["window_demonstrations"] == len(lines)
        assert lines == case.window[len(case.window) - len(lines) :]
        space = own - int(share * own) - room
        assert len(joined(lines)) <= space
        if len(lines) < len(case.window):  # one more does not fit
            assert len(joined(case.window[len(case.window) - len(lines) - 1 :])) > space
        item = case.items[0]
        assert task.prefix(system, case, item) == joined(lines)
        _, context = system.context(joined(lines), room, [Question(item.token_ids, item.candidates)])
        assert len(context) + room <= own
        before = context[: len(context) - len(joined(lines))]
        assert context[len(before) :] == joined(lines)
        count = counts["read_demonstrations"]
        read = case.memory[len(case.memory) - count :]
        if system.name in ("bm25", "hidden"):
            start = 0
            while start < len(before):  # whole demonstrations one after the other
                start += next(len(line) for line in case.memory if before[start : start + len(line)] == line)
            assert start == len(before)
        elif system.name == "context-400":
            assert before == joined(read)
            assert len(case.memory[-count - 1]) > 400 - room - len(context)  # one more does not fit
        else:
            assert not before
            read = {"on": case.memory, "wrong": wrong.memory}.get(system.name, [])
            assert count == len(read)
        assert counts["read_tokens"] == len(joined(read))


def test_a_window_that_is_too_small_is_refused_before_work(tmp_path, model):
    for name in ("mr", "squad"):
        with pytest.raises(ValueError, match=f"`window` must hold the longest question of {name}"):
            task_of(name, tmp_path, window=40).cases(model)
    with pytest.raises(ValueError, match="at most the examples of mr, 30, got 2 and 31; lower"):
        task_of("mr", tmp_path, memory_demonstrations=31)


# Answers ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_answer_is_what_the_model_says_after_demonstrations_in_memory_and_window(tmp_path, model):
    task = task_of("mr", tmp_path, systems=("backbone", "on"))
    records = {record["id"]: record for record in run(task, model)}
    window, memory = texts(task, "mr", 1)
    text = task.examples["mr"][1][3].text
    ids = lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    bank = MemoryBank.for_model(model)
    model.memorize(bank, torch.tensor(ids("".join(memory))), "demonstrations")
    for name, options in (("backbone", {}), ("on", {"memory": bank})):
        forward = model.backbone if name == "backbone" else model
        for asked, found in (
            (text, records[f"mr/1/3/{name}"]["logprobs"]),
            ("", records[f"mr/1/{name}"]["content_free"][1]),
        ):
            before = ids("".join(window) + f"Review: {asked} Sentiment:")
            for word, logprob in zip(("negative", "positive"), found, strict=True):
                own = ids(f" {word}")
                logits = forward(torch.tensor([[*before, *own]]), **options).logits[0, len(before) - 1 : -1].float()
                expected = logits.log_softmax(-1)[torch.arange(len(own)), torch.tensor(own)].sum()
                assert logprob == pytest.approx(expected.item(), abs=2e-3)
        likeliest = forward(torch.tensor([ids("".join(window) + f"Review: {text} Sentiment:")]), **options)
        token = model.tokenizer.decode([int(likeliest.logits[0, -1].argmax())])
        assert records[f"mr/1/3/{name}"]["likeliest"] == token
    assert records["mr/1/3/on"]["logprobs"] != records["mr/1/3/backbone"]["logprobs"]


@pytest.mark.parametrize("sets", [("mr", "subj"), ("squad",)])
def test_demonstrations_are_encoded_once_for_all_items(tmp_path, model, monkeypatch, sets):
    monkeypatch.setattr(Labelled, "asked_at_once", 2)
    monkeypatch.setattr(Squad, "asked_at_once", 2)
    several = {"sets": sets} if sets != ("squad",) else {}
    task = task_of(sets[0], tmp_path, systems=("off", "on", "wrong"), limit=3, **several)
    records = run(task, model)
    assert sum("item" in record for record in records) == 3 * 3 * len(sets)
    cases = task.cases(model)
    expected = sum(len(case.memorized) for case in cases)
    if sets == ("squad",):  # its wrong memory is no other set's right one
        expected += len(task.wrong(cases[0], cases).memorized)
    assert sum(record["encoded_tokens"] for record in records) == expected
    assert (
        sum(record["encoded_tokens"] for record in records if "item" not in record) == expected
    )  # before any question


def test_answers_to_questions_about_passages(tmp_path, model):
    task = task_of("squad", tmp_path, systems=("backbone", "bm25", "on"), limit=4)
    records = run(task, model)
    window, _ = texts(task, "squad", 1)
    items = task.examples["squad"][1]
    for number in range(4):
        asked = items[number * len(items) // 4]
        (record,) = (each for each in records if each["id"] == f"squad/1/{number}/backbone")
        ids = model.tokenizer("".join(window) + asked.prompt, add_special_tokens=False, return_tensors="pt")
        tokens = model.backbone.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        text = model.tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :])
        assert record["prediction"] == text.split("\n")[0].strip()
        assert record["golds"] == list(asked.answers)
        assert record["group"] == asked.article
        assert record["window_demonstrations"] == 1
    metrics = summarize(task, records)
    own = [f1(each["prediction"], each["golds"]) for each in records if each["system"] == "on" and "item" in each]
    cells = metrics["measures"]["f1"]["cells"]
    assert list(cells) == ["all"]
    assert cells["all"]["systems"]["on"]["value"] == pytest.approx(100 * statistics.fmean(own))
    assert metrics["summary"]["measure"] == "F1, %"
    titles = [title.partition(";")[0] for title, _ in tables_of(metrics)]
    assert titles == ["All", "All, above backbone, same window", "Demonstrations before a question", "Costs"]


def test_as_many_demonstrations_as_fit_beside_the_question_itself(tmp_path, model):
    """Questions of SQuAD differ in length: a short one has demonstrations before it that a long one has no room for."""
    task = task_of("squad", tmp_path, systems=("backbone",), demonstrations=2, memory_demonstrations=1)
    (case,) = task.cases(model)
    rooms = sorted(case.room(item) for item in case.items)
    assert rooms[0] < rooms[-1]
    window = len(joined(case.window)) + rooms[0]
    task = task_of("squad", tmp_path, systems=("backbone",), demonstrations=2, memory_demonstrations=1, window=window)
    found = [record for record in run(task, model) if "item" in record]
    counts = {record["number"]: record["window_demonstrations"] for record in found}
    (system,) = make_systems(("backbone",), model, window=window)
    for number, item in enumerate(case.items):
        expected = 2 if case.room(item) == rooms[0] else 1
        assert counts[number] == expected
        assert task.prefix(system, case, item) == joined(case.window[-expected:])
    assert set(counts.values()) == {1, 2}


# Metrics ---------------------------------------------------------------------------------------------------------------


def answer_records(name, system, seed, rows, content_free):
    common = {"case": f"{name}/{seed}", "set": name, "seed": seed, "system": system}
    told = {"window_demonstrations": 2, "read_demonstrations": 6, "read_tokens": 60, "preparing_seconds": 1.5}
    yield {"id": f"{name}/{seed}/{system}", **common, **told, "content_free": [content_free]}
    for number, (gold, likeliest, logprobs) in enumerate(rows):
        asked = {"item": f"{name}/{number}", "number": number, "gold": gold, "group": f"text {number}"}
        own = {"likeliest": likeliest, "logprobs": logprobs, "seconds": 0.5}
        yield {"id": f"{name}/{seed}/{number}/{system}", **common, **asked, **own}
        if system == "backbone":  # all guess label 1
            guess = {"id": f"{name}/{seed}/{number}/majority", "system": "majority", "choice": 1}
            yield {**common, **asked, **guess}


def test_metrics_by_hand(tmp_path):
    task = task_of("mr", tmp_path, sets=("mr", "subj"), systems=("backbone", "on"), seeds=(1, 2))
    right, wrong = logs(0.1, 0.2), logs(0.2, 0.1)  # label 1 is gold where nothing else is said
    even, leaning = logs(0.5, 0.5), logs(0.9, 0.1)
    plan = {
        # mr, backbone: prefix rule right in 1 and 2 of 4; label words in 2 and 4; calibration makes label 1 of all: 3
        ("mr", "backbone", 1): ([(1, " p", right), (1, " x", wrong), (1, "", wrong), (0, " the", wrong)], leaning),
        ("mr", "backbone", 2): ([(1, " p", right), (1, " posi", right), (1, "", right), (0, " no", wrong)], leaning),
        ("mr", "on", 1): ([(1, " positive", right)] * 3 + [(0, " negative", wrong)], even),
        ("mr", "on", 2): ([(1, " positive", right)] * 3 + [(0, " positive", right)], even),
        ("subj", "backbone", 1): ([(1, " o", right), (0, " o", right)], even),
        ("subj", "backbone", 2): ([(1, " o", right), (0, " s", wrong)], even),
        ("subj", "on", 1): ([(1, " s", wrong), (0, " o", right)], even),
        ("subj", "on", 2): ([(1, " s", wrong), (0, " o", right)], even),
    }
    records = [
        each for key, (rows, free) in plan.items() for each in answer_records(key[0], key[1], key[2], rows, free)
    ]
    metrics = summarize(task, records)
    found = {
        (cell, rule, system): (own["value"], list(own["repeats"].values()), own["deviation"])
        for rule, measure in metrics["measures"].items()
        for cell, comparison in measure["cells"].items()
        for system, own in comparison["systems"].items()
    }
    assert found["mr", "prefix rule", "backbone"] == (37.5, [25.0, 50.0], 12.5)  # numpy's std: half of the distance
    assert found["mr", "label words", "backbone"] == (75.0, [50.0, 100.0], 25.0)
    assert found["mr", "calibrated", "backbone"] == (75.0, [75.0, 75.0], 0.0)
    assert found["mr", "prefix rule", "on"] == (87.5, [100.0, 75.0], 12.5)
    assert found["mr", "calibrated", "on"] == found["mr", "label words", "on"]
    assert found["subj", "prefix rule", "backbone"] == (75.0, [50.0, 100.0], 25.0)
    assert [found["mr", rule, "majority"] for rule in task.measures] == [(75.0, [75.0, 75.0], 0.0)] * 3
    cells = metrics["measures"]["prefix rule"]["cells"]
    mean = cells["all"]["systems"]
    assert mean["backbone"]["value"] == (37.5 + 75) / 2
    assert list(mean["backbone"]["repeats"].values()) == [37.5, 75.0]
    assert mean["on"]["above_baseline"] == (50 - 75) / 2
    assert mean["on"]["interval"][0] <= mean["on"]["value"] <= mean["on"]["interval"][1]
    assert mean["majority"]["value"] == (75 + 50) / 2
    assert metrics["summary"]["systems"]["backbone"]["value"] == mean["backbone"]["value"]
    assert cells["mr"]["systems"]["on"]["seconds_per_item"] == pytest.approx(0.5)
    tables = dict(tables_of(metrics))
    assert list(tables)[::2] == ["All", "mr", "subj", "Demonstrations before a question"]
    assert tables["Demonstrations before a question"][1] == ["mr, backbone, same window", "2.0", "6.0", "60.0"]
    brief = dict(tables_of(metrics, brief=True))
    assert brief["mr"][:2] == [
        ["", "prefix rule, %", "label words, %", "calibrated, %"],
        ["backbone, same window", "37.5 ± 12.5", "75.0 ± 25.0", "75.0 ± 0.0"],
    ]
    assert brief["mr"][-1] == ["most frequent label", "75.0 ± 0.0", "75.0 ± 0.0", "75.0 ± 0.0"]
    assert list(brief) == [title for title in tables if "above" not in title]
    above = tables["mr, above backbone, same window"]
    assert above[1][:2] == ["LongMem, memory on", "+50.0 (+12.5 to +87.5)"]
    assert "| backbone, same window | 37.5 ± 12.5 (" in markdown(metrics)


def test_the_interval_of_one_set_averaged_is_that_of_the_set(tmp_path):
    """The mean over sets resamples each on its own: with one set it is what the set's own table says."""
    task = task_of("mr", tmp_path, systems=("backbone", "on"))
    generator = random.Random(0)
    rows = {
        system: [(1, generator.choice([" p", " n"]), logs(0.2, 0.1)) for _ in range(12)]
        for system in ("backbone", "on")
    }
    records = [each for system, own in rows.items() for each in answer_records("mr", system, 1, own, logs(0.5, 0.5))]
    cells = summarize(task, records)["measures"]["prefix rule"]["cells"]
    own, mean = cells["mr"], cells["all"]
    for system in ("backbone", "on"):
        for name in ("value", "interval", "above_baseline", "above_baseline_interval", "deviation", "seconds_per_item"):
            assert mean["systems"][system][name] == pytest.approx(own["systems"][system][name]), name
