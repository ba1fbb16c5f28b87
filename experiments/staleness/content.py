"""Superseded content: a bank holds several values of every key, from different times, and is asked for the newest.

A frozen encoder does not help here: old texts are encoded as well as new ones. What does is to say how old they are
(`AgePrior`), or that they no longer hold (`MemoryBank.supersede`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from experiments.learned_recall.check import NUM_PAIRS, WINDOW, WORDS_BEFORE
from experiments.learned_recall.task import (
    Pairs,
    RecallDocument,
    RecallTask,
    answers_of,
    draw_pairs,
    draw_questions,
    write_document,
)
from longmem.memory import AgePrior, MemoryBank
from longmem.memory.index import exact_top_chunks
from longmem.memory.protocols import Found, Memory
from longmem.model.modeling import LongMemForCausalLM

DAY = 86_400.0
PRIORS = (
    AgePrior("poly", a=0.5),
    AgePrior("poly", a=1),
    AgePrior("hinge", a=0.5, b=1),
    AgePrior("exp", a=0.5),
    AgePrior("exp", a=4),
)
WRONG = AgePrior("poly", a=0.5)  # the prior whose sign is turned round, for the lower control


class ContentRow(NamedTuple):
    """One way to read the banks: which questions it answers, and the seconds that reading took.

    `got_older`: which questions got a value that the key had before. `seconds` hold what was done to the banks first.
    """

    name: str
    answers: Bool[Tensor, " questions"]
    got_older: Bool[Tensor, " questions"]
    seconds: float


class _Case(NamedTuple):
    """Versions of one text, oldest first, the bank that holds them all, and a question for every key."""

    versions: list[RecallDocument]
    bank: MemoryBank
    questions: Int[Tensor, "pairs tokens"]


class GrowingWeights:
    """A bank read with the sign of its age prior turned round: weights that grow with age, a mistake made on purpose.

    Published code of asynchronous federated learning had it; `AgePrior` refuses it.
    """

    def __init__(self, bank: MemoryBank) -> None:
        self._bank = bank

    def __getattr__(self, name: str) -> Any:
        """Return what the bank says of itself."""
        return getattr(self._bank, name)

    def search(
        self, layer: int, queries: Float[Tensor, "kv_heads queries dim"], num_chunks: int, *, scaling: float
    ) -> Found:
        """Return the best chunks where age counts in their favour, with the logarithms of weights above 1."""
        weights = -self._bank.log_weights(torch.arange(self._bank.num_chunks))
        scores, rows = exact_top_chunks(queries.float(), self._bank.search_keys(layer), num_chunks, weights / scaling)
        return Found(rows, scores, weights[rows], self._bank.generation)


def superseded_content(
    model: LongMemForCausalLM,
    task: RecallTask,
    seed: int,
    *,
    priors: Sequence[AgePrior] = PRIORS,
    num_banks: int = 8,
    num_versions: int = 4,
    num_pairs: int = NUM_PAIRS,
    distance: int = 0,
) -> list[ContentRow]:
    """Return one row for each way to read the same banks: by age priors, superseded, deleted, the newest documents alone.

    Args:
        model: trained to recall (`learned_recall.check.train_side_network`).
        task: what is drawn.
        seed: of the documents and questions.
        priors: one row each; the documents of a bank are dated one day apart.
        num_banks: independent banks, each asked for all its keys.
        num_versions: values that each key has had, at least two, all different, in documents of their own.
        num_pairs: keys of a bank.
        distance: tokens with distractors in every document, behind its pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    cases = [_draw_case(model, task, num_versions, num_pairs, distance, generator) for _ in range(num_banks)]
    ways: list[tuple[str, Any]] = [("no prior", lambda case: _aged(case, None))]
    ways += [(label(prior), lambda case, prior=prior: _aged(case, prior)) for prior in priors]
    ways += [
        (f"wrong sign of {label(WRONG)}", lambda case: GrowingWeights(_aged(case, WRONG))),
        ("superseded", _superseded),
        ("deleted", _deleted),
        ("fresh bank", lambda case: _memorized(model, case.versions[-1:])),
    ]
    return [_row(model, cases, name, way) for name, way in ways]


def label(prior: AgePrior) -> str:
    """Return the name of a prior in tables.

    >>> label(AgePrior("hinge", a=0.5, b=1))
    'hinge a=0.5 b=1'
    """
    parameters = {"hinge": ("a", "b"), "exp": ("a", "floor") if prior.floor else ("a",)}.get(prior.kind, ("a",))
    return " ".join([prior.kind, *(f"{name}={getattr(prior, name):g}" for name in parameters)])


def draw_versions(
    task: RecallTask, num_versions: int, num_pairs: int, distance: int, generator: Generator
) -> list[RecallDocument]:
    """Return documents of the same keys, each with another value in every one of them."""
    pairs = draw_pairs(task, 1, num_pairs, generator)
    drawn = torch.rand(num_pairs, task.num_values, generator=generator).argsort(dim=1)[:, :num_versions]
    values = (drawn + task.num_keys).T
    return [
        write_document(task, Pairs(pairs.keys, each[None], pairs.other_keys), WINDOW, distance, generator)
        for each in values
    ]


def _draw_case(
    model: LongMemForCausalLM,
    task: RecallTask,
    num_versions: int,
    num_pairs: int,
    distance: int,
    generator: Generator,
) -> _Case:
    versions = draw_versions(task, num_versions, num_pairs, distance, generator)
    questions = draw_questions(task, versions[0].keys, WORDS_BEFORE, generator)
    return _Case(versions, _memorized(model, versions), questions)


def _memorized(model: LongMemForCausalLM, versions: Sequence[RecallDocument]) -> MemoryBank:
    """Return a bank of these documents, dated one day after the other."""
    bank = MemoryBank.for_model(model)
    for day, version in enumerate(versions):
        model.memorize(bank, version.token_ids, _name(day), dated=day * DAY, batch_size=16)
    return bank


def _name(day: int) -> str:
    return f"version {day}"


def _aged(case: _Case, prior: AgePrior | None) -> MemoryBank:
    case.bank.use_age_prior(prior)
    return case.bank


def _superseded(case: _Case) -> MemoryBank:
    bank = _aged(case, None)
    for day in range(1, len(case.versions)):
        bank.supersede(_name(day - 1), by=_name(day))
    return bank


def _deleted(case: _Case) -> MemoryBank:
    for day in range(len(case.versions) - 1):
        case.bank.delete(_name(day))
    return case.bank


def _row(model: LongMemForCausalLM, cases: Sequence[_Case], name: str, way: Any) -> ContentRow:
    start = time.perf_counter()
    memories: list[Memory] = [way(case) for case in cases]
    answers, got_older = [], []
    for case, memory in zip(cases, memories, strict=True):
        *older, newest = (version.values for version in case.versions)
        tokens = answers_of(model, case.questions, memory)
        answers.append(tokens == newest)
        got_older.append((tokens == torch.stack(older)).any(dim=0))
    return ContentRow(name, torch.cat(answers), torch.cat(got_older), time.perf_counter() - start)
