"""Rules, draws, what stands where, what is encoded, and metrics, each against a computation of its own."""

from __future__ import annotations

import io
import math
import random
import statistics
from typing import Any

import pytest
import torch
from in_context_data import save_sets, save_squad
from rich.console import Console

from longmem import MemoryBank
from longmem.evaluation.in_context import InContextSettings, ask_all, compute_metrics, make_tasks, tasks
from longmem.evaluation.in_context.placing import joined, never_cut, read_lines, window_lines
from longmem.evaluation.in_context.rules import calibrated_label, likeliest_label, prefix_rule
from longmem.evaluation.in_context.tables import all_tables, markdown_of
from longmem.evaluation.runs import RunFolder
from longmem.evaluation.squad import f1
from longmem.evaluation.systems import Banks, Question, make_systems

WINDOW = 256
QUIET = Console(file=io.StringIO())


def settings_for(tmp_path: Any, **values: Any) -> InContextSettings:
    if not (tmp_path / "sets").exists():
        save_sets(tmp_path / "sets")
        save_squad(tmp_path / "squad.json")
    small = {"seeds": (1,), "demonstrations": 2, "memory_demonstrations": 6, "window": WINDOW, "systems": ("on",)}
    squad = {"data": str(tmp_path / "squad.json"), "demonstrations": 1, "memory_demonstrations": 4, "max_new_tokens": 3}
    squad_settings = type(InContextSettings.__dataclass_fields__["squad"].default_factory())(**squad)
    common = {"output": "x", "data": str(tmp_path / "sets"), "squad": squad_settings}
    return InContextSettings(**{**common, **small, **values})


def logs(*probabilities: float) -> list[float]:
    return [math.log(each) for each in probabilities]


def run(settings: InContextSettings, model: Any, folder: Any, banks: Banks | None = None) -> list[dict[str, Any]]:
    with RunFolder(folder, {}) as opened:
        ask_all(settings, model, make_tasks(settings, model), opened, QUIET, banks)
        return opened.records


# Rules -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["positive", "great"])
@pytest.mark.parametrize("token", [" positive", "p", " g", "", " ", "\n", "positively", " Great", "ositive", " great "])
def test_the_prefix_rule_is_the_released_one(token, word):
    assert prefix_rule(token, word) == bool(word.startswith(token.strip()) and token.strip() != "")


def test_labels_with_and_without_calibration():
    answer = logs(0.06, 0.04)
    content_free = [logs(0.08, 0.02), logs(0.5, 0.5), logs(0.4, 0.1)]  # restricted to labels: .8/.2, .5/.5, .8/.2
    assert likeliest_label(answer) == 0
    assert calibrated_label(answer, content_free) == 1  # .6 / .7 < .4 / .3
    assert calibrated_label(logs(0.75, 0.25), content_free) == 0  # .75 / .7 > .25 / .3
    assert calibrated_label(answer, [logs(0.5, 0.5)] * 3) == 0
    # Each input counts the same, however likely it makes the label words together.
    assert calibrated_label(logs(0.4, 0.6), [logs(0.0009, 0.0001), logs(0.09, 0.81)]) == 1
    assert calibrated_label([-5000.0, -5001.0], [[-10.0, -4000.0]]) == 1  # no division by 0
    assert likeliest_label([-2.0, -1.0, -1.0]) == 1


# Draws -----------------------------------------------------------------------------------------------------------------


def test_demonstrations_are_those_of_the_released_script(tmp_path, model):
    (task,) = make_tasks(settings_for(tmp_path, sets=("mr",)), model).values()
    path = tmp_path / "sets" / "mr" / "train.csv"
    data = [(line[2:], "positive" if int(line[0]) == 1 else "negative") for line in path.read_text().splitlines()]
    for seed in (1, 2):
        random.seed(seed)
        window = ["Review: {} Sentiment: {}. ".format(*each) for each in random.sample(data, 2)]
        memory = ["Review: {} Sentiment: {}. ".format(*each) for each in random.sample(data, 6)]
        assert task.draw(seed) == (window, memory)
    state = random.getstate()
    task.draw(3)
    assert random.getstate() == state


def test_the_wrong_memory(tmp_path, model):
    made = make_tasks(settings_for(tmp_path, sets=("mr", "subj", "squad")), model)
    shots = made["mr"].shots(1, made["subj"])
    assert shots.wrong == made["subj"].shots(1, made["mr"]).memory
    alone = made["mr"].shots(1, None)
    assert alone.memory == shots.memory
    # With one set: the same texts in their order, the same number of each label, but not everywhere the same label.
    right, wrong = (
        [text.rpartition(" ")[0] for text in lines] for lines in (made["mr"].draw(1)[1], made["mr"].disguised(1))
    )
    heads, labels = zip(*(text.rsplit(": ", 1) for text in right), strict=True)
    other_heads, other_labels = zip(*(text.rsplit(": ", 1) for text in wrong), strict=True)
    assert heads == other_heads
    assert sorted(labels) == sorted(other_labels)
    assert labels != other_labels
    right, wrong = (
        [text.split("Answer:") for text in lines] for lines in (made["squad"].draw(1)[1], made["squad"].disguised(1))
    )
    assert [text[0] for text in right] == [text[0] for text in wrong]
    assert sorted(text[1] for text in right) == sorted(text[1] for text in wrong)


def test_every_line_begins_with_bos_where_that_is_set(tmp_path, model):
    with pytest.raises(ValueError, match="`bos_per_line` must be false for a tokenizer without"):
        make_tasks(settings_for(tmp_path, sets=("mr",), bos_per_line=True), model)
    (plain,) = make_tasks(settings_for(tmp_path, sets=("mr",)), model).values()
    model.tokenizer.bos_token = "!"
    (task,) = make_tasks(settings_for(tmp_path, sets=("mr",), bos_per_line=True), model).values()
    bos = model.tokenizer.bos_token_id
    assert task.lines == [[bos, *line] for line in plain.lines]
    assert task.shots(1, None).memory == [[bos, *line] for line in plain.shots(1, None).memory]
    assert task.words == plain.words  # a label word does not begin a line
    assert model.tokenizer.decode(task.words[1]) == " positive"


# Places ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [130, 250])
@torch.no_grad()
def test_only_whole_demonstrations_stand_in_a_window(tmp_path, model, window):
    names = ("backbone", "context-400", "bm25", "hidden", "off", "on", "wrong")
    settings = settings_for(tmp_path, sets=("mr",), window=window, systems=names, memory_demonstrations=8)
    (task,) = make_tasks(settings, model).values()
    shots, room = task.shots(1, None), task.rooms[0]
    systems = make_systems(names, model, window=window)
    never_cut(systems)
    for system in systems:
        read = read_lines(system, shots, room)
        lines = window_lines(system, shots, room)
        own = 400 if system.name == "context-400" else window
        share = 0.5 if system.name in ("bm25", "hidden") else 0
        assert lines == shots.window[len(shots.window) - len(lines) :]
        space = own - int(share * own) - room
        assert len(joined(lines)) <= space
        if len(lines) < len(shots.window):  # one more does not fit
            assert len(joined(shots.window[len(shots.window) - len(lines) - 1 :])) > space
        _, context = system.context(joined(lines), room, [Question(task.lines[0], task.words)])
        assert len(context) + room <= own
        before = context[: len(context) - len(joined(lines))]
        assert context[len(before) :] == joined(lines)
        if system.name in ("bm25", "hidden"):
            start = 0
            while start < len(before):  # whole demonstrations one after the other
                start += next(len(line) for line in shots.memory if before[start : start + len(line)] == line)
            assert start == len(before)
        elif system.name == "context-400":
            assert before == joined(read)
            assert read == shots.memory[len(shots.memory) - len(read) :]
            assert len(shots.memory[-len(read) - 1]) > 400 - room - len(context)  # one more does not fit
        else:
            assert not before
            expected = {"on": shots.memory, "wrong": shots.wrong}.get(system.name, [])
            assert read == expected


def test_a_window_that_is_too_small_is_refused_before_work(tmp_path, model):
    for name in ("mr", "squad"):
        with pytest.raises(ValueError, match=f"`window` must hold the longest question of {name}"):
            make_tasks(settings_for(tmp_path, sets=(name,), window=40), model)
    with pytest.raises(ValueError, match="at most the examples of mr, 30, got 2 and 31; lower"):
        make_tasks(settings_for(tmp_path, sets=("mr",), memory_demonstrations=31), model)


# Answers ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_answer_is_what_the_model_says_after_demonstrations_in_memory_and_window(tmp_path, model):
    settings = settings_for(tmp_path, sets=("mr",), systems=("backbone", "on"))
    records = {record["id"]: record for record in run(settings, model, tmp_path / "run")}
    (task,) = make_tasks(settings, model).values()
    window, memory = task.draw(1)
    ids = lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    bank = MemoryBank.for_model(model)
    model.memorize(bank, torch.tensor(ids("".join(memory))), "demonstrations")
    for name, options in (("backbone", {}), ("on", {"memory": bank})):
        forward = model.backbone if name == "backbone" else model
        for text, found in (
            (task.items[3].text, records[f"mr/1/{name}/3"]["logprobs"]),
            ("", records[f"mr/1/{name}"]["content_free"][1]),
        ):
            before = ids("".join(window) + f"Review: {text} Sentiment:")
            for word, logprob in zip(("negative", "positive"), found, strict=True):
                own = ids(f" {word}")
                logits = forward(torch.tensor([[*before, *own]]), **options).logits[0, len(before) - 1 : -1].float()
                expected = logits.log_softmax(-1)[torch.arange(len(own)), torch.tensor(own)].sum()
                assert logprob == pytest.approx(expected.item(), abs=2e-3)
        likeliest = forward(torch.tensor([ids("".join(window) + task.kind.query(task.items[3].text))]), **options)
        token = model.tokenizer.decode([int(likeliest.logits[0, -1].argmax())])
        assert records[f"mr/1/{name}/3"]["likeliest"] == token
    assert records["mr/1/on/3"]["logprobs"] != records["mr/1/backbone/3"]["logprobs"]


@pytest.mark.parametrize("sets", [("mr", "subj"), ("squad",)])
def test_demonstrations_are_encoded_once_for_all_items(tmp_path, model, monkeypatch, sets):
    monkeypatch.setattr(tasks, "ITEMS_PER_CALL", 2)
    monkeypatch.setattr(tasks, "ANSWERS_PER_CALL", 2)
    settings = settings_for(tmp_path, sets=sets, systems=("off", "on", "wrong"), limit=3)
    banks = Banks(model)
    records = run(settings, model, tmp_path / "run", banks)
    assert sum("item" in record for record in records) == 3 * 3 * len(sets)
    made = make_tasks(settings, model)
    expected = sum(len(joined(task.shots(1, None).memory)) for task in made.values())
    if sets == ("squad",):  # its wrong memory is no other set's right one
        expected += len(joined(made["squad"].shots(1, None).wrong))
    assert banks.encoded_tokens == expected


def test_answers_to_questions_about_passages(tmp_path, model):
    settings = settings_for(tmp_path, sets=("squad",), systems=("backbone", "bm25", "on"), limit=4)
    records = run(settings, model, tmp_path / "run")
    (task,) = make_tasks(settings, model).values()
    window, _ = task.draw(1)
    for number, (passage, asked) in enumerate(task.items):
        (record,) = (each for each in records if each["id"] == f"squad/1/backbone/{number}")
        ids = model.tokenizer("".join(window) + passage.query(asked), add_special_tokens=False, return_tensors="pt")
        tokens = model.backbone.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        text = model.tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :])
        assert record["prediction"] == text.split("\n")[0].strip()
        assert record["golds"] == list(asked.answers)
        assert record["group"] == passage.title
        assert record["window_demonstrations"] == 1
    metrics = compute_metrics(settings, records)
    own = [f1(each["prediction"], each["golds"]) for each in records if each["system"] == "on" and "item" in each]
    assert metrics["sets"]["squad"]["measures"]["F1"]["systems"]["on"]["value"] == pytest.approx(
        100 * statistics.fmean(own)
    )
    assert metrics["summary"]["measure"] == "F1"
    assert metrics["average"] == {}
    assert len(all_tables(metrics)) == 1


# Metrics ---------------------------------------------------------------------------------------------------------------


def answer_records(name, system, seed, rows, content_free):
    common = {"set": name, "seed": seed, "system": system}
    told = {"window_demonstrations": 2, "read_demonstrations": 6, "read_tokens": 60, "preparing_seconds": 1.5}
    yield {"id": f"{name}/{seed}/{system}", **common, **told, "content_free": [content_free]}
    for item, (gold, likeliest, logprobs) in enumerate(rows):
        own = {"gold": gold, "group": f"text {item}", "likeliest": likeliest, "logprobs": logprobs, "seconds": 0.5}
        yield {"id": f"{name}/{seed}/{system}/{item}", **common, "item": item, **own}


def test_metrics_by_hand(tmp_path):
    settings = settings_for(tmp_path, sets=("mr", "subj"), systems=("backbone", "on"), seeds=(1, 2))
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
    metrics = compute_metrics(settings, records)
    found = {
        (name, rule, system): (own["value"], own["seeds"], own["deviation"])
        for name, values in metrics["sets"].items()
        for rule, comparison in values["measures"].items()
        for system, own in comparison["systems"].items()
    }
    assert found["mr", "prefix rule", "backbone"] == (37.5, [25.0, 50.0], 12.5)  # numpy's std: half of the distance
    assert found["mr", "label words", "backbone"] == (75.0, [50.0, 100.0], 25.0)
    assert found["mr", "calibrated", "backbone"] == (75.0, [75.0, 75.0], 0.0)
    assert found["mr", "prefix rule", "on"] == (87.5, [100.0, 75.0], 12.5)
    assert found["mr", "calibrated", "on"] == found["mr", "label words", "on"]
    assert found["subj", "prefix rule", "backbone"] == (75.0, [50.0, 100.0], 25.0)
    assert metrics["sets"]["mr"]["majority"] == 75.0
    mean = metrics["average"]["prefix rule"]["systems"]
    assert mean["backbone"]["value"] == (37.5 + 75) / 2
    assert mean["backbone"]["seeds"] == [37.5, 75.0]
    assert mean["on"]["above_baseline"] == (50 - 75) / 2
    assert mean["on"]["interval"][0] <= mean["on"]["value"] <= mean["on"]["interval"][1]
    assert metrics["summary"]["systems"]["backbone"]["value"] == mean["backbone"]["value"]
    assert metrics["summary"]["chance"] == (75 + 50) / 2
    seconds = metrics["sets"]["mr"]["measures"]["prefix rule"]["systems"]["on"]["seconds_per_item"]
    assert seconds == pytest.approx(0.5)
    text = markdown_of(metrics)
    assert "37.5 ± 12.5 (" in text
    assert all_tables(metrics, brief=True)["mr, 4 items"][1] == [
        "backbone, same window",
        "37.5 ± 12.5",
        "75.0 ± 25.0",
        "75.0 ± 0.0",
        "0.50",
    ]
    assert "| most frequent label | 75.0 | 75.0 | 75.0 |" in text
    assert [title.split(",")[0] for title in all_tables(metrics)] == ["mean of mr", "mr", "subj"]


def test_the_interval_of_one_set_averaged_is_that_of_the_set(tmp_path):
    """The mean over sets resamples each on its own: with one set it is what the set's own table says."""
    settings = settings_for(tmp_path, sets=("mr",), systems=("backbone", "on"), seeds=(1,))
    generator = random.Random(0)
    rows = {
        system: [(1, generator.choice([" p", " n"]), logs(0.2, 0.1)) for _ in range(12)]
        for system in ("backbone", "on")
    }
    records = [each for system, own in rows.items() for each in answer_records("mr", system, 1, own, logs(0.5, 0.5))]
    metrics = compute_metrics(settings, records)
    own, mean = metrics["sets"]["mr"]["measures"]["prefix rule"], metrics["average"]["prefix rule"]
    for system in ("backbone", "on"):
        for name in ("value", "interval", "above_baseline", "above_baseline_interval", "deviation", "seconds_per_item"):
            assert mean["systems"][system][name] == pytest.approx(own["systems"][system][name]), name
