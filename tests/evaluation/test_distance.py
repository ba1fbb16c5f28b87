"""Recall at a distance: where facts are, what memory holds of them and of what they replace, how answers count."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import some_text

from longmem import MemoryBank
from longmem.evaluation.distance.asking import ask, is_exact
from longmem.evaluation.distance.facts import Vocabulary, draw_facts
from longmem.evaluation.distance.haystack import (
    Haystack,
    plan_trials,
    read_haystack,
    replaced_windows,
    tokenize,
    validate_sizes,
    windows_of_depths,
)
from longmem.evaluation.distance.longeval import read_longeval, tokens_and_distance
from longmem.evaluation.distance.memory import HaystackMemory, plan_parts
from longmem.evaluation.distance.settings import DistanceSettings
from longmem.evaluation.distance.tables import sections, summarize_distance
from longmem.evaluation.systems import GivenMemory

LENGTH = 128  # bytes are tokens: facts need room
SETTINGS = DistanceSettings(output="unused", sizes=(512, 1024), items=2, num_choices=4, pairs=2, depths=(0.0, 0.5, 1.0))
TASKS = ("passkey", "key-value", "needle")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def model(backbone_folder: str) -> Any:
    from longmem import LongMemForCausalLM

    return LongMemForCausalLM.from_backbone(backbone_folder, segment_length=LENGTH, num_retrieved_tokens=8).eval()


@pytest.fixture
def haystack(model: Any) -> Haystack:
    return Haystack(tokenize(model.tokenizer, some_text(400, 1))[:1024], LENGTH)


def search(memory: Any, layer: int, count: int = 6) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the scores of the best chunks for some queries, and the keys and values of these chunks."""
    queries = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    rows, scores, *_ = memory.search(layer, queries, count)
    return scores, list(memory.gather(layer, rows.flatten(1), memory.generation))


def assert_same_memory(one: Any, other: Any) -> None:
    assert one.num_tokens == other.num_tokens
    for layer in other.memory_layers:
        (scores, found), (expected_scores, expected) = search(one, layer), search(other, layer)
        torch.testing.assert_close(scores, expected_scores, **CLOSE)
        for own, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-2, atol=1e-2)  # stored in float16


def bank_of(model: Any, ids: list[int]) -> MemoryBank:
    bank = MemoryBank.for_model(model, index="flat")
    model.memorize(bank, torch.tensor(ids), "text")
    return bank


def memory_of(model: Any, haystack: Haystack, settings: DistanceSettings = SETTINGS, **options: Any) -> HaystackMemory:
    places = {
        window
        for size in settings.sizes
        for window in windows_of_depths(settings, size, haystack.window_length).values()
    }
    return HaystackMemory(model, haystack, sizes=settings.sizes, replaceable=places, **{"index": "flat", **options})


# Facts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("wrong_values", ["absent", "present"])
def test_facts_are_drawn_from_a_seed_and_hold_the_right_value_alone(task, wrong_values):
    settings = dataclasses.replace(
        SETTINGS,
        wrong_values=wrong_values,
        pairs=6,
        tasks=(task,),
        needles="alone" if task == "passkey" else "together",
    )
    vocabulary = Vocabulary.absent_from("")
    draw = [draw_facts(task, settings, vocabulary, random.Random(seed), 5) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    whole = "".join(fact.text + fact.after for fact in draw[0])
    for fact in draw[0]:
        right = fact.values[fact.right]
        assert len(set(fact.values)) == settings.num_choices
        assert fact.text.rstrip(".").endswith(right) or task == "passkey"
        assert right in fact.text
        present = [value for value in fact.values if value != right and value in whole]
        expected = settings.num_choices - 1 if wrong_values == "present" and task != "passkey" else 0
        assert len(present) == expected
    questions = {fact.question for fact in draw[0]}
    assert len(questions) == (1 if task == "passkey" else 5)  # else it would not be said which is asked for


def test_values_that_the_haystack_holds_are_not_drawn():
    numbers = set(range(10_000, 100_000)) - set(range(50_000, 50_004))
    vocabulary = Vocabulary.absent_from(" ".join(map(str, numbers)) + " fly a kite from the western city wall, said he")
    assert "fly a kite from the western city wall" not in vocabulary.activities
    assert len(vocabulary.activities) == len(Vocabulary.absent_from("").activities) - 1
    (fact,) = draw_facts("passkey", SETTINGS, vocabulary, random.Random(0), 1)
    assert set(fact.values) == {str(number) for number in range(50_000, 50_004)}


@pytest.mark.parametrize("task", TASKS)
def test_a_fact_is_where_it_is_said_to_be(model, haystack, task):
    trials = plan_trials(SETTINGS, haystack, model.tokenizer, task)
    assert len(trials) == len({trial.trial_id for trial in trials}) == 2 * 3 * 2
    for trial in trials:
        ids = [token for window in haystack.windows(trial.size, {trial.window: trial.token_ids}) for token in window]
        assert len(ids) == trial.size
        fact = tokenize(model.tokenizer, trial.fact.text)
        end = trial.size - trial.distance
        assert ids[end - len(fact) : end] == fact
        before, after = end - len(fact) - trial.window * LENGTH, tokenize(model.tokenizer, trial.fact.after)
        assert trial.token_ids[:before] == haystack.window(trial.window)[:before]  # its neighbours
        rest = trial.token_ids[before + len(fact) + len(after) :]
        assert rest == haystack.window(trial.window)[before:][: len(rest)]
        others = [number for number in range(trial.size // LENGTH) if number != trial.window]
        windows = haystack.windows(trial.size, {trial.window: trial.token_ids})
        assert [windows[number] for number in others] == [haystack.window(number) for number in others]
    by_depth = {depth: {trial.window for trial in trials if trial.depth == depth} for depth in ("0", "1")}
    assert by_depth == {"0": {3, 7}, "1": {0}}
    assert trials == plan_trials(SETTINGS, haystack, model.tokenizer, task)
    assert trials != plan_trials(dataclasses.replace(SETTINGS, seed=1), haystack, model.tokenizer, task)


def test_distances_in_tokens_are_kept_to_within_a_window(model, haystack):
    settings = dataclasses.replace(SETTINGS, distances=(0, 300, 700))
    trials = plan_trials(settings, haystack, model.tokenizer, "needle")
    assert {(trial.size, trial.depth) for trial in trials} == {
        *((512, f"{distance} tokens") for distance in (0, 300)),
        *((1024, f"{distance} tokens") for distance in (0, 300, 700)),
    }
    for trial in trials:
        assert abs(trial.distance - int(trial.depth.split()[0])) < LENGTH


# Memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needles", ["alone", "together"])
def test_a_memory_is_that_of_the_text_with_its_facts(model, haystack, needles):
    settings = dataclasses.replace(SETTINGS, needles=needles, tasks=("needle",))
    trials = plan_trials(settings, haystack, model.tokenizer, "needle")
    memory = memory_of(model, haystack)
    for size in SETTINGS.sizes:  # the smaller is the start of the larger
        memory.encode(size)
        depth = {512: "0.5", 1024: "1"}[size]
        (trial,) = (each for each in trials if each.trial_id == f"needle/{size}/{depth}/1")
        replaced = replaced_windows(trial, trials, needles == "together")
        assert len(replaced) == (3 if needles == "together" else 1)
        whole = [token for window in haystack.windows(size, replaced) for token in window]
        assert_same_memory(memory.read(size, replaced), bank_of(model, whole))
        assert_same_memory(memory.read(size), bank_of(model, haystack.token_ids[:size]))
    assert memory.encode(1024) == 0
    smaller = memory.read(512)  # now that the bank holds more
    assert_same_memory(smaller, bank_of(model, haystack.token_ids[:512]))
    with pytest.raises(AssertionError):
        assert_same_memory(smaller, memory.read(512, {0: trials[0].token_ids}))


def test_nothing_of_the_window_that_a_fact_replaces_is_read(model, haystack):
    memory = memory_of(model, haystack)
    memory.encode(1024)
    fact = tokenize(model.tokenizer, some_text(60, 5))[:LENGTH]
    layer = memory.bank.memory_layers[0]
    own = bank_of(model, haystack.window(7))
    queries = own.search_keys(layer)  # every chunk of the window asks for itself
    own_best = own.search(layer, queries, 1).scores
    clean, replaced = (memory.read(1024, each).search(layer, queries, 1).scores for each in ({}, {7: fact}))
    assert (clean >= own_best - 1e-4).all()
    read = memory.read(1024, {7: fact})
    rows = read.search(layer, queries[:, :1], 1000).rows
    rows = rows[0, 0][rows[0, 0] >= 0]
    assert len(rows.unique()) == 1024 // 4
    texts = [memory.bank, memory._aside, memory._encoded({7: fact})]  # the banks that the shards look into
    places = [(int(shard), place) for shard, place in zip(read.shard_of(rows), read.locate(rows), strict=True) if place]
    windows = [texts[shard].token_ids(place[0])[place[1] : place[2]].tolist() for shard, place in places]
    chunks = [fact[start : start + 4] for start in range(0, LENGTH, 4)]
    chunks += [haystack.token_ids[start : start + 4] for start in range(0, 7 * LENGTH, 4)]
    assert sorted(windows) == sorted(chunks)
    assert not torch.equal(clean, replaced)


def test_parts_cover_what_is_never_replaced_and_end_with_every_size():
    for counts, replaceable in (([4, 40], {0, 3, 20}), ([8], set()), ([2, 100], {1, 50, 99}), ([3], {0, 1, 2})):
        parts = plan_parts(counts, replaceable)
        windows = [number for start, stop in parts for number in range(start, stop)]
        assert windows == [number for number in range(max(counts)) if number not in replaceable]
        for count in counts:
            assert not any(start < count < stop for start, stop in parts)


def test_a_stopped_encoding_goes_on_in_its_folder(model, haystack, tmp_path):
    folder = str(tmp_path / "bank")
    with memory_of(model, haystack, folder=folder) as memory:
        done = memory.encode(512)
    with memory_of(model, haystack, folder=folder) as memory:
        more = memory.encode(1024)
        assert done + more > 1024 - 1  # the windows that are put aside are encoded anew
        assert_same_memory(memory.read(1024), bank_of(model, haystack.token_ids))
        encoded = sum(info.num_tokens for info in memory.bank.documents())
    with memory_of(model, haystack, folder=folder) as memory:
        assert memory.encode(1024) == 1024 - encoded
    for options in ({"storage_dtype": "int8"}, {"settings": dataclasses.replace(SETTINGS, sizes=(768,))}):
        with pytest.raises(ValueError, match="`bank_folder` must be new or the bank of a run with the same haystack"):
            memory_of(model, haystack, folder=folder, **options)
    other = Haystack(haystack.token_ids[::-1], LENGTH)
    with pytest.raises(ValueError, match="delete this one"):
        memory_of(model, other, folder=folder)


# Texts -------------------------------------------------------------------------------------------------------------


def test_a_haystack_is_read_from_texts_in_their_order(model, tmp_path):
    for name, text in (("b", "then this"), ("a", "first this")):
        (tmp_path / f"{name}.txt").write_text(text)
    ids = read_haystack(model.tokenizer, str(tmp_path), 20)
    assert model.tokenizer.decode(ids) == "first this\n\nthen this"[:20]
    assert len(read_haystack(model.tokenizer, "filler", 333)) == 333
    with pytest.raises(ValueError, match="`sizes` must be at most the tokens of `haystack`, 23"):
        read_haystack(model.tokenizer, str(tmp_path), 24)


LINES = "Below is a record.\n\nline red-cat: REGISTER_CONTENT is <2416>\nline old-dog: REGISTER_CONTENT is <24167>\n"
LINES_END = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line red-cat? I need the number. "
TOPICS = "Memorize. USER: I would like to discuss the topic of the history of Rome. \n USER: now the art of soup. "
TOPICS_END = "Now the record ends. What is the first topic we discussed?"


@pytest.fixture
def longeval(tmp_path: Path) -> Path:
    folder = tmp_path / "longeval"
    folder.mkdir()
    line = {
        "prompt": LINES + LINES_END,
        "correct_line": "line red-cat: REGISTER_CONTENT is <2416>\n",
        "expected_number": 2416,
    }
    with gzip.open(folder / "lines_2.jsonl.gz", "wt") as file:
        file.write(json.dumps(line) + "\n" + json.dumps(line | {"prompt": LINES * 2 + LINES_END}) + "\n")
    topics = {"prompt": TOPICS + TOPICS_END, "topics": ["The history of Rome", "The art of soup"]}
    (folder / "topics_2.jsonl").write_text(json.dumps(topics) + "\n")
    return folder


def test_prompts_of_longeval_are_taken_apart(model, longeval):
    prompt, _ = read_longeval(longeval, "longeval-lines", 10, 0)
    assert prompt.record == LINES + "\n"
    assert prompt.question.startswith("Now the record is over.")
    assert prompt.question.endswith("line red-cat: REGISTER_CONTENT is <")
    assert sorted(prompt.values) == ["24167>", "2416>"]
    assert prompt.values[prompt.right] == "2416>"
    ids, distance = tokens_and_distance(model, prompt)
    assert model.tokenizer.decode(ids[len(ids) - distance :]) == LINES.partition("<2416>")[2] + "\n"
    (topics,) = read_longeval(longeval, "longeval-topics", 10, 0)
    assert topics.values[topics.right] == "the history of Rome"
    assert set(topics.values) == {"the history of Rome", "the art of soup"}
    ids, distance = tokens_and_distance(model, topics)
    assert model.tokenizer.decode(ids[len(ids) - distance :]) == TOPICS.partition("of Rome")[2]
    (longeval / "lines_3.jsonl").write_text('{"prompt": "no end"}\n')
    with pytest.raises(ValueError, match=r"lines_3.jsonl, line 1, must be a prompt of LongEval"):
        read_longeval(longeval, "longeval-lines", 10, 0)
    with pytest.raises(ValueError, match="`longeval` must be a folder with files lines_"):
        read_longeval(longeval.parent, "longeval-lines", 10, 0)


# Scores ------------------------------------------------------------------------------------------------------------


def test_the_choice_is_the_likeliest_value_per_token(model):
    system = GivenMemory("off", model, window=64)
    found = ask(system, "the cat", ("sat", "on the mat", "dog"), max_new_tokens=5)
    for value, mean in zip(("sat", "on the mat", "dog"), found["per_token"], strict=True):
        ids = torch.tensor([tokenize(model.tokenizer, f"the cat {value}")])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[7 - 1 :]
        assert mean == pytest.approx(logprobs.mean().item(), abs=1e-4)
    assert found["choice"] == max(range(3), key=found["per_token"].__getitem__)
    assert "text" in found
    assert "text" not in ask(system, "the cat", ("sat",), max_new_tokens=None)


def test_an_exact_answer_begins_with_the_value():
    assert is_exact("Fly a kite!", "fly a kite")
    assert not is_exact("fly kites", "fly a kite")
    assert not is_exact("", "fly a kite")


def record(number: int, part: str, depth: str, on: int, off: int, text: str) -> dict[str, Any]:
    answers = {
        name: {"choice": choice, "text": text if name == "on" else "no", "seconds": seconds, "per_token": [0, 0]}
        for name, choice, seconds in (("off", off, 1.0), ("on", on, 2.0))
    }
    return {
        "id": f"{number}", "task": "passkey", "part": part, "size": int(part), "depth": depth, "distance": 0,
        "values": ["11111", "22222"], "right": 1, "systems": answers,
    }  # fmt: skip


def test_accuracies_are_those_counted_by_hand():
    records = [
        record(1, "512", "0", on=1, off=0, text="22222."),
        record(2, "512", "1", on=1, off=1, text="2222"),
        record(3, "1024", "0", on=0, off=0, text="11111"),
        record(4, "1024", "0", on=1, off=1, text="22222 it is"),
    ]
    metrics = summarize_distance(records)
    task = metrics["tasks"]["passkey"]
    assert task["chance"] == metrics["summary"]["chance"] == 50
    assert metrics["summary"]["systems"]["on"]["value"] == 75
    assert task["all"]["choice"]["systems"]["off"]["value"] == 50
    assert task["all"]["exact"]["systems"]["on"]["value"] == 50
    assert task["all"]["exact"]["systems"]["off"]["value"] == 0
    assert task["all"]["choice"]["systems"]["on"]["above_baseline"] == 25
    assert task["grid"]["on"] == {"512": {"0": 100, "1": 100}, "1024": {"0": 50}}
    assert task["grid"]["off"] == {"512": {"0": 0, "1": 100}, "1024": {"0": 50}}
    ((heading, rows),) = sections(metrics)
    assert "of 4 trials (a guess: 50.0)" in heading
    assert rows[0][:3] == ["", "512", "1024"]
    assert rows[2][1:3] == ["100.0", "50.0"]
    for each in records:
        del each["systems"]["on"]["text"]
    assert "exact" not in summarize_distance(records)["tasks"]["passkey"]["all"]


# Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("longeval-lines",)}, "`longeval` must name a folder"),
        ({"tasks": ()}, "at least one each"),
        ({"sizes": (512, 512)}, "`sizes` must name each once"),
        ({"distances": (1024,)}, "smaller than the largest of `sizes`"),
        ({"needles": "together"}, "`needles` must be alone for the task passkey"),
        ({"num_choices": 39}, "`num_choices` must leave a value for every depth"),
        ({"pairs": 600}, "`pairs` must be at most 533"),
        ({"index": "ann"}, "`index` must be one of the known kinds"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_sizes_are_whole_windows_with_room_for_the_facts(model, haystack):
    validate_sizes(SETTINGS, model)
    with pytest.raises(ValueError, match="multiples of the model's `segment_length`, 128, got 500; the next is 512"):
        validate_sizes(dataclasses.replace(SETTINGS, sizes=(500,)), model)
    together = dataclasses.replace(SETTINGS, tasks=("needle",), needles="together", sizes=(256,))
    with pytest.raises(ValueError, match="must have a window of 128 tokens for every depth"):
        validate_sizes(together, model)
    with pytest.raises(ValueError, match="must hold a whole fact"):
        plan_trials(dataclasses.replace(SETTINGS, pairs=20), haystack, model.tokenizer, "key-value")
