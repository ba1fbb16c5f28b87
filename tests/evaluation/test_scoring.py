"""Continuations that share a cached context have the likelihoods that a full forward pass of each gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longmem.evaluation.systems import Answer, Continuation, Question, answer_questions
from longmem.evaluation.task import best, per_token

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


QUESTIONS = [
    Question(ids(3, 1), [ids(1, 2), ids(4, 3), ids(2, 4)]),
    Question([], [ids(5, 5), ids(1, 6)]),
    Question(ids(7, 7), [ids(1, 8), ids(1, 9), ids(6, 10)]),
]


def naive(forward: Any, context: list[int], question: Question, candidate: int) -> tuple[torch.Tensor, bool, int]:
    own = list(question.candidates[candidate])
    before = [*context, *question.token_ids]
    logits = forward(torch.tensor([[*before, *own]])).logits[0, len(before) - 1 : -1].float()
    logprobs = logits.log_softmax(-1)[torch.arange(len(own)), torch.tensor(own)]
    best = logits.argmax(-1).tolist()
    return logprobs, best == own, best[0]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("system", ["backbone", "off", "on"])
@torch.no_grad()
def test_a_shared_context_gives_the_likelihoods_of_full_passes(model, bank, system, batch_size):
    with_memory = {"memory": bank} if system == "on" else {}
    network = model.backbone if system == "backbone" else model

    def forward(tokens: torch.Tensor, **options: Any) -> Any:
        return network(tokens, **with_memory, **options)

    context = ids(6, 0)
    answers = answer_questions(forward, context, QUESTIONS, batch_size=batch_size)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        for number, found in enumerate(answer.candidates):
            logprobs, is_greedy, likeliest = naive(forward, context, question, number)
            torch.testing.assert_close(torch.tensor(found.logprobs), logprobs, **CLOSE)
            assert (found.is_greedy, answer.likeliest) == (is_greedy, likeliest)
            assert found.total == pytest.approx(logprobs.sum().item(), rel=1e-4)


@torch.no_grad()
def test_a_greedy_candidate_is_called_greedy(model):
    context = ids(6, 0)
    greedy: list[int] = []
    for _ in range(3):
        greedy.append(int(model.backbone(torch.tensor([context + greedy])).logits[0, -1].argmax()))
    other = [*greedy[:2], (greedy[2] + 1) % 256]
    (answer,) = answer_questions(model.backbone, context, [Question([], [greedy, other])])
    assert [each.is_greedy for each in answer.candidates] == [True, False]
    assert answer.candidates[0].total > answer.candidates[1].total
    assert answer.likeliest == greedy[0]


def test_sum_and_mean_can_prefer_different_candidates():
    answer = Answer((Continuation((-1.0,), False), Continuation((-0.6, -0.6), False)), 0)
    record = {
        "logprobs": [each.total for each in answer.candidates],
        "tokens": [len(each.logprobs) for each in answer.candidates],
    }
    assert (best(record["logprobs"]), best(per_token(record))) == (0, 1)


@torch.no_grad()
def test_without_a_context_questions_stand_alone(model):
    questions = [QUESTIONS[0], QUESTIONS[2]]
    answers = answer_questions(model.backbone, [], questions)
    logprobs, _, _ = naive(model.backbone, [], questions[0], 1)
    torch.testing.assert_close(torch.tensor(answers[0].candidates[1].logprobs), logprobs, **CLOSE)
    with pytest.raises(ValueError, match="at least one token"):
        answer_questions(model.backbone, [], QUESTIONS)


@torch.no_grad()
def test_the_context_is_run_once(model):
    lengths = []

    def forward(tokens: torch.Tensor, **options: Any) -> Any:
        lengths.append(tuple(tokens.shape))
        return model(tokens, **options)

    answer_questions(forward, ids(10, 0), [Question([], [ids(3, seed) for seed in range(6)])])
    assert lengths == [(1, 9), (6, 3)]  # the last token of the context begins every row; no last token is read


def test_a_question_needs_something_to_compare():
    for candidates in ([], [[]]):
        with pytest.raises(ValueError, match="`candidates` must be at least one"):
            Question([1], candidates)
