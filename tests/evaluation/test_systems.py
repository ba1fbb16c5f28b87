"""What each system sees of a stream: tokens in the window, tokens in memory, passages, and the same question for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longmem import MemoryBank
from longmem.evaluation.systems import (
    BackboneSystem,
    Banks,
    MemorySystem,
    Question,
    RetrievalSystem,
    make_systems,
)

WINDOW = 16
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NAMES = ("backbone", "context-48", "bm25", "hidden", "off", "on", "wrong")


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(97, 123, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


STREAM, OTHER = ids(41, 1), ids(44, 2)
QUESTION = Question(ids(3, 3), [ids(2, 4), ids(4, 5)])


def logprobs(forward: Any, context: list[int], candidate: int = 1) -> torch.Tensor:
    own = list(QUESTION.candidates[candidate])
    before = [*context, *QUESTION.token_ids]
    logits = forward(torch.tensor([[*before, *own]])).logits[0, len(before) - 1 : -1].float()
    return logits.log_softmax(-1)[torch.arange(len(own)), torch.tensor(own)]


def systems_of(model: Any, names: tuple[str, ...] = NAMES, local_tokens: int = 6) -> dict[str, Any]:
    made = make_systems(names, model, window=WINDOW, local_tokens=local_tokens)
    for system in made:
        system.read([STREAM], instead=[OTHER])
    return {system.name: system for system in made}


def bank_of(model: Any, tokens: list[int]) -> MemoryBank:
    bank = MemoryBank.for_model(model)
    model.memorize(bank, torch.tensor(tokens), "text")
    return bank


@torch.no_grad()
def test_each_system_sees_what_its_name_says(model):
    with torch.no_grad():  # so that memory off is not the backbone
        for weight in model.side_network.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    room = QUESTION.room
    right, wrong = bank_of(model, STREAM[:-6]), bank_of(model, OTHER)
    expected = {
        "backbone": logprobs(model.backbone, STREAM[-6:]),
        "context-48": logprobs(model.backbone, STREAM[-(48 - room) :]),
        "off": logprobs(model, STREAM[-6:]),
        "on": logprobs(lambda tokens: model(tokens, memory=right), STREAM[-6:]),
        "wrong": logprobs(lambda tokens: model(tokens, memory=wrong), STREAM[-6:]),
    }
    found = {name: system.score([QUESTION])[0] for name, system in systems_of(model).items()}
    for name, own in expected.items():
        torch.testing.assert_close(torch.tensor(found[name].candidates[1].logprobs), own, **CLOSE, msg=name)
    assert len({tuple(each.tolist()) for each in expected.values()}) == len(expected)


@torch.no_grad()
def test_a_prefix_stands_between_stream_and_question(model):
    prefix = ids(2, 9)
    bank = bank_of(model, STREAM[:-6])
    expected = logprobs(lambda tokens: model(tokens, memory=bank), [*STREAM[-6:], *prefix])
    found = systems_of(model)["on"].score([QUESTION], prefix)[0]
    torch.testing.assert_close(torch.tensor(found.candidates[1].logprobs), expected, **CLOSE)


@torch.no_grad()
def test_what_a_question_pushes_out_of_the_window_is_in_memory(model):
    kept = WINDOW - QUESTION.room
    bank = bank_of(model, STREAM[:-kept])
    expected = logprobs(lambda tokens: model(tokens, memory=bank), STREAM[-kept:])
    found = systems_of(model, local_tokens=WINDOW)["on"].score([QUESTION])[0]
    torch.testing.assert_close(torch.tensor(found.candidates[1].logprobs), expected, **CLOSE)


@torch.no_grad()
def test_passages_are_pasted_in_their_order(model):
    words = ["alpha beta", "gamma delta", "the query word"]
    passages = [model.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    question = model.tokenizer(" gamma query", add_special_tokens=False)["input_ids"]
    options = {"window": 64, "passage_tokens": 20, "local_tokens": 0}
    system = RetrievalSystem("bm25", model, pasted_share=0.5, **options)
    system.read(passages)
    _, context = system.context([], 15, [Question(question, [[0]])])
    text = model.tokenizer.decode(context)
    assert "gamma delta" in text
    assert text.index("gamma") < text.index("query")
    assert "alpha" in text  # there is room for all
    narrow = RetrievalSystem("bm25", model, pasted_share=0.5, **{**options, "window": 44})
    narrow.read(passages)
    _, context = narrow.context([], 15, [Question(question, [[0]])])
    assert "alpha" not in model.tokenizer.decode(context)


@pytest.mark.parametrize("name", ["bm25", "hidden"])
@torch.no_grad()
def test_the_query_can_be_the_question_alone(model, name):
    """With the prefix in the query, "alpha" is found; without, what the question asks for."""
    alpha, gamma = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" alpha", " gamma"))
    found = []
    for query_tokens in (64, None):
        options = {"window": 26, "pasted_share": 0.25, "query_tokens": query_tokens}
        system = RetrievalSystem(name, model, **options)
        system.read([alpha, gamma])
        _, context = system.context(alpha * 2, len(gamma) + 1, [Question(gamma, [[0]])])
        found.append(context[: len(alpha)])
    assert found == [alpha, gamma]


@pytest.mark.parametrize("name", ["bm25", "hidden"])
@torch.no_grad()
def test_questions_about_different_things_get_their_own_passages(model, name):
    system = systems_of(model, (name,))[name]
    questions = [QUESTION, Question(STREAM[:4], [ids(2, 11)])]
    together = system.score(questions)
    alone = [system.score([question])[0] for question in questions]
    assert together == alone


@torch.no_grad()
def test_passages_of_an_index_before_are_not_encoded_again(model):
    def new() -> RetrievalSystem:
        return RetrievalSystem("hidden", model, window=WINDOW, passage_tokens=8)

    system = new()
    system.read([STREAM])
    system.score([QUESTION])
    runs = []
    hook = model.backbone.base_model.register_forward_hook(lambda module, inputs, output: runs.append(inputs))
    longer = [*STREAM[:40], *OTHER[:8]]
    system.read([longer])
    answer = system.score([QUESTION])
    with_known = len(runs)
    fresh = new()
    fresh.read([longer])
    assert answer == fresh.score([QUESTION])
    hook.remove()
    assert len(runs) - with_known == with_known + 40 // 8


@pytest.mark.parametrize("name", NAMES)
def test_generation_continues_what_is_scored(model, name):
    """The greedy continuation is the one whose every token is the likeliest."""
    system = systems_of(model, local_tokens=5)[name]
    query = ids(3, 3)
    (generated,) = system.generate([query], max_new_tokens=4, stop=())
    assert len(generated) == 4
    (answer,) = system.score([Question(query, [generated, [*generated[:3], (generated[3] + 1) % 256]])])
    assert [each.is_greedy for each in answer.candidates] == [True, False]


@pytest.mark.parametrize("name", ["backbone", "bm25", "on"])
def test_generation_ends_with_a_stop_string(model, name):
    system = systems_of(model, local_tokens=5)[name]
    query = ids(3, 3)
    (whole,) = system.generate([query], max_new_tokens=4, stop=())
    last = next(token for token in whole if model.tokenizer.decode([token]).isascii())  # not every byte is a letter
    (stopped,) = system.generate([query], max_new_tokens=4, stop=[model.tokenizer.decode([last])])
    assert stopped == whole[: whole.index(last) + 1]
    assert len(stopped) < len(whole)


def test_reset_feed_answer(model):
    system = MemorySystem("on", model, window=WINDOW, local_tokens=4)
    text = "the old house saw the rain and the cat sat down"
    for piece in (text[:20], text[20:]):
        system.feed(piece)
    answer = system.answer(" who", max_new_tokens=3, stop=())
    assert answer == system.answer(" who", max_new_tokens=3, stop=())  # a query is not remembered
    other = MemorySystem("on", model, window=WINDOW, local_tokens=4)
    other.feed(text)
    assert other.answer(" who", max_new_tokens=3, stop=()) == answer
    system.reset()
    assert system.stream == []


def test_a_bank_is_encoded_once_and_goes_on(model):
    banks = Banks(model)
    bank = banks.of(STREAM)
    assert banks.of(STREAM) is bank
    assert banks.encoded_tokens == len(STREAM)
    longer = banks.of([*STREAM, *OTHER])
    expected = bank_of(model, [*STREAM, *OTHER])
    layer = expected.memory_layers[0]
    queries = torch.randn(2, 3, 8)
    torch.testing.assert_close(
        longer.search(layer, queries, 2).scores, expected.search(layer, queries, 2).scores, **CLOSE
    )
    assert banks.encoded_tokens == len(STREAM) + len(OTHER)


def test_the_wrong_memory_is_the_next_right_one(model):
    banks = Banks(model)
    on, wrong = (MemorySystem(name, model, banks=banks, window=WINDOW) for name in ("on", "wrong"))
    texts = [STREAM, OTHER, ids(40, 12)]
    for text, other in zip(texts, [*texts[1:], texts[0]], strict=True):
        for system in (on, wrong):
            system.read([text], instead=[other])
            system.score([QUESTION])
    assert banks.encoded_tokens == sum(map(len, texts)) + len(texts[0])  # the first comes again at the end


def test_a_system_can_be_left_out_and_a_wrong_name_is_told(model):
    assert [system.name for system in make_systems(("on",), model, window=WINDOW)] == ["on"]
    for names, message in (
        (("onn",), "got 'onn'. Did you mean `on`?"),
        (("context-x",), "such as context-4096"),
        ((), "at least one"),
        (("on", "on"), "none twice"),
        (("context-8",), "must be longer than the window"),
    ):
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            make_systems(names, model, window=WINDOW)


def test_what_does_not_fit_the_window_is_refused(model):
    system = BackboneSystem("backbone", model, window=WINDOW)
    with pytest.raises(ValueError, match="`window` must hold a question"):
        system.score([Question(ids(12, 1), [ids(4, 2)])], STREAM)
    wrong = MemorySystem("wrong", model, window=WINDOW)
    wrong.feed(STREAM)
    with pytest.raises(ValueError, match="give it to `read`"):
        wrong.score([QUESTION])
