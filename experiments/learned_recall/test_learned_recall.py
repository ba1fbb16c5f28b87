"""Learned recall: what is drawn, what is trained, and that facts far back are recalled from memory alone."""

from __future__ import annotations

import pytest
import torch

from experiments.learned_recall.check import (
    RecallSettings,
    add_side_network,
    check_recall,
    memorized,
    score_recall,
    train_backbone,
    train_side_network,
)
from experiments.learned_recall.task import (
    RecallTask,
    draw_document,
    draw_pairs,
    draw_questions,
    draw_starts,
    draw_text,
    practice_windows,
    recalled,
)
from longmem import MemoryBank

TASK = RecallTask(num_keys=12, num_values=8, num_words=16, distractor_share=0.2)
EXACT = {"rtol": 0, "atol": 0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def is_key(ids: torch.Tensor) -> torch.Tensor:
    return ids < TASK.num_keys


def is_value(ids: torch.Tensor) -> torch.Tensor:
    return ~is_key(ids) & (ids < TASK.num_keys + TASK.num_values)


def test_keys_of_a_lane_differ_and_those_left_are_the_others():
    pairs = draw_pairs(TASK, 5, 7, generator())
    for keys, others in zip(pairs.keys, pairs.other_keys, strict=True):
        assert sorted([*keys.tolist(), *others.tolist()]) == list(range(TASK.num_keys))
    assert is_value(pairs.values).all()
    assert not torch.equal(pairs.values, draw_pairs(TASK, 5, 7, generator(1)).values)


def test_distractors_are_whole_pairs_of_other_keys():
    others = torch.tensor([[3, 5], [7, 9]])
    plain = draw_text(TASK, 2, 400, generator())
    text = draw_text(TASK, 2, 400, generator(), others)
    assert not (is_key(plain) | is_value(plain)).any()
    assert set(text[0][is_key(text[0])].tolist()) == {3, 5}
    assert set(text[1][is_key(text[1])].tolist()) == {7, 9}
    # Every key is followed by a value, every value follows a key; all else is the text without distractors.
    torch.testing.assert_close(is_key(text)[:, :-1], is_value(text)[:, 1:])
    words = ~(is_key(text) | is_value(text))
    torch.testing.assert_close(text[words], plain[words], **EXACT)
    assert 0.2 < (~words).double().mean() < 0.4  # 0.2 of the tokens begin one, where the token before did not


def test_pairs_never_overlap_and_fall_at_any_alignment():
    some = generator()
    starts = torch.stack([draw_starts(6, 20, some) for _ in range(50)])
    assert (starts[:, 1:] - starts[:, :-1] >= 2).all()
    assert (starts.min(), starts.max()) == (0, 18)
    assert set((starts % 4).unique().tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(draw_starts(3, 6, some), torch.tensor([0, 2, 4]), **EXACT)


def test_every_question_of_a_window_has_its_answer_before_it():
    windows, places = practice_windows(TASK, 4, 20, 5, generator())
    assert windows.shape == (4, 40)
    for window in windows:
        assert (places >= 20).all()
        for place in places.tolist():
            key, value = window[place], window[place + 1]
            before = [window[at + 1].item() for at in range(20) if window[at] == key]
            assert before == [value.item()]


def test_a_document_tells_each_pair_once_and_then_only_distracts():
    document = draw_document(TASK, 5, 30, 200, generator())
    assert len(document.token_ids) == 230
    opening, rest = document.token_ids[:30], document.token_ids[30:]
    for key, value in zip(document.keys, document.values, strict=True):
        (place,) = (opening == key).nonzero()[0]
        assert opening[place + 1] == value
        assert not (rest == key).any()
    assert is_key(rest).any()
    same = draw_document(TASK, 5, 30, 200, generator())
    torch.testing.assert_close(same.token_ids, document.token_ids, **EXACT)


def test_a_question_is_words_and_the_key():
    keys = torch.tensor([4, 1, 8])
    questions = draw_questions(TASK, keys, 6, generator())
    torch.testing.assert_close(questions[:, -1], keys, **EXACT)
    assert not (is_key(questions[:, :-1]) | is_value(questions[:, :-1])).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_pairs(TASK, 1, 12, generator()), "`num_pairs` must be from 1 to 11"),
        (lambda: draw_pairs(TASK, 1, 0, generator()), "`num_pairs` must be from 1 to 11"),
        (lambda: draw_starts(4, 7, generator()), "`room` must hold 4 pairs"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_answer_is_the_likeliest_token_of_all():
    model = add_side_network(train_backbone(TASK, 1, seed=0))
    document = draw_document(TASK, 5, 30, 40, generator())
    questions = draw_questions(TASK, document.keys, 6, generator())
    bank = memorized(model, document.token_ids)
    likeliest = model(questions, memory=bank).logits[:, -1].argmax(dim=-1)
    assert recalled(model, questions, likeliest, bank).all()
    assert not recalled(model, questions, (likeliest + 1) % TASK.vocab_size, bank).any()
    empty = recalled(model, questions, likeliest, MemoryBank.for_model(model))
    torch.testing.assert_close(empty, recalled(model, questions, likeliest), **EXACT)


def test_training_changes_the_side_network_alone_and_repeats_itself():
    task = RecallTask(num_keys=40, num_values=8, num_words=16)
    models = [add_side_network(train_backbone(task, 2, seed=0)) for _ in range(2)]
    before = {name: weight.clone() for name, weight in models[0].named_parameters()}
    for model in models:
        train_side_network(model, task, steps=2, distance=100, seed=1)
    changed = {name for name, weight in models[0].named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.startswith("side_network")}
    for name, weight in models[1].named_parameters():
        torch.testing.assert_close(weight, models[0].get_parameter(name), **EXACT)


def test_systems_answer_the_same_questions():
    task = RecallTask(num_keys=40, num_values=8, num_words=16)
    model = add_side_network(train_backbone(task, 1, seed=0))
    settings = RecallSettings(distance=64, num_documents=2)
    answers = score_recall(model, task, settings, seed=3)
    assert {system: len(right) for system, right in answers.items()} == {"off": 64, "on": 64, "wrong": 64}
    again = score_recall(model, task, settings, seed=3)
    torch.testing.assert_close(again["on"], answers["on"], **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_facts_16k_tokens_back_are_recalled_from_memory_alone(seed, one_thread):
    result = check_recall(seed)
    assert len(result.answers["on"]) == 256
    assert result.accuracy["on"] >= 0.95
    # Of 256 guesses among 64 values 4 are right on average, and more than 12 in about 1 of 4,000 cases.
    assert max(result.accuracy[system] for system in ("off", "wrong", "untrained")) <= 12 / 256
