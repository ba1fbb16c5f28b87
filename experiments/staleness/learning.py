"""Does a reader learn from a memory whose writer moves? Coupled against decoupled training on the recall task.

The pretrained backbone of `experiments/learned_recall` gets a side network that knows nothing of memory, and learns to answer
questions about documents that stand in memory alone. Systems differ in what else is trained, the backbone or not, and in how
old a document is when it is asked about: it was written `lag` optimizer steps before.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn
from transformers import LlamaForCausalLM

from experiments.coupled_writer.writer import CoupledWriter, couple
from experiments.learned_recall.check import (
    LESSONS,
    NUM_PAIRS,
    WINDOW,
    WORDS_BEFORE,
    add_side_network,
    make_schedule,
    update,
)
from experiments.learned_recall.task import (
    RecallDocument,
    RecallTask,
    draw_document,
    draw_questions,
    draw_starts,
    draw_text,
    practice_windows,
    recalled,
    write_pairs,
)
from experiments.staleness.decoupled import memorized, stored_tensors
from longmem.memory import MemoryBank
from longmem.memory.refresh import UNBOUNDED
from longmem.model.modeling import LongMemForCausalLM

LANES, TOKENS = 16, 64  # windows of a training step, in which all pairs of a document are asked
Written = tuple[RecallDocument, MemoryBank]


@dataclasses.dataclass(frozen=True)
class LearningSystem:
    """One way to train: how old the memory is that is read, and whether and how the writer moves.

    Args:
        lag: optimizer steps from the writing of a document to the question about it; 0: written for the step.
        writer_rate: learning rate of the backbone as a share of the side network's; None: the backbone is frozen.
        average: decay of a moving average of the backbone, which writes in its stead; None: the backbone writes.
    """

    lag: int = 0
    writer_rate: float | None = None
    average: float | None = None

    def __post_init__(self) -> None:
        if self.lag < 0:
            raise ValueError(f"`lag` must be at least 0 optimizer steps, got {self.lag}.")
        if self.average is not None and self.writer_rate is None:
            raise ValueError(
                f"`average` needs a backbone that is trained, got {self.average} and no `writer_rate`; give one, such as 1.0."
            )


STILL = 1 - 1e-9  # a moving average that does not move

# Each system by its name in tables. 0.6 of the rate is what the backbone was pretrained at. Where the writer stands still,
# the backbone is trained as in "coupled", but memory is written by what it was at the start: the two differ in whether keys
# move, not in what training does to the backbone.
SYSTEMS: dict[str, LearningSystem] = {
    "frozen": LearningSystem(),
    "frozen, lag 50": LearningSystem(50),
    "coupled": LearningSystem(0, 1.0),
    "coupled, lag 10": LearningSystem(10, 1.0),
    "coupled, lag 50": LearningSystem(50, 1.0),
    "coupled, writer stands still": LearningSystem(0, 1.0, STILL),
    "coupled, average 0.999 writes": LearningSystem(0, 1.0, 0.999),
    "coupled, average 0.999 writes, lag 50": LearningSystem(50, 1.0, 0.999),
    **{
        f"coupled, {rate} of the rate{f', lag {lag}' if lag else ''}": LearningSystem(lag, rate)
        for rate in (0.6, 0.3, 0.1)
        for lag in (0, 50)
    },
}


@dataclasses.dataclass(frozen=True)
class LearningSettings:
    """Length and rate of a run, and what is asked at its end."""

    steps: int = 250
    learning_rate: float = 5e-3  # of the side network, before it falls to zero over the last fifth
    distance: int = 1024  # tokens in memory after the pairs, in training and in the questions at the end
    num_documents: int = 8


@dataclasses.dataclass(frozen=True)
class LearningResult:
    """What a run of one system and seed gives.

    `answers` are right or wrong, one for each question at the end: "fresh", with test documents written by the writer as it is
    then; "aged", with the same documents written `lag` steps before the end, as in training; "first", with them written before
    the first step; "off", without memory; "windowed", by the backbone of the end alone, which has facts and questions in its
    window. `curve` is the share of right answers in each training step, `losses` the loss in nats, both before it moves
    anything. `drift` is 1 minus the mean cosine of the test documents' keys before the first and after the last step,
    `aged_drift` the same from `lag` steps before the end.
    """

    answers: dict[str, Bool[Tensor, " questions"]]
    curve: Float[Tensor, " steps"]
    losses: Float[Tensor, " steps"]
    drift: float
    aged_drift: float

    @property
    def accuracy(self) -> dict[str, float]:
        """Return the share of right answers of each kind."""
        return {kind: right.double().mean().item() for kind, right in self.answers.items()}


def learn(
    backbone: LlamaForCausalLM, system: LearningSystem, settings: LearningSettings, task: RecallTask, seed: int
) -> LearningResult:
    """Return what a new side network on a copy of the backbone learns; the same documents for every system of a seed.

    The backbone is one of `learned_recall.check.train_backbone`; it stays as it is.
    """
    torch.manual_seed(seed)
    model = add_side_network(copy.deepcopy(backbone))
    test = test_documents(task, settings, seed)
    optimizer, writer = make_optimizer(model, system, settings.learning_rate)
    schedule = make_schedule(optimizer, settings.steps, warmup=10)
    first = [memorized(model, document, UNBOUNDED) for document in test]
    # Drawn apart, so that step i asks the same of document i whatever the lag.
    documents, questions = (torch.Generator().manual_seed(number + seed) for number in (0, 40_000))

    def write() -> Written:
        document = draw_document(task, NUM_PAIRS, WINDOW, settings.distance, documents)
        return document, memorized(model, document, UNBOUNDED)

    # Documents on their way: the first ones are all written before training, so the oldest is never older than `lag`.
    waiting = deque(write() for _ in range(system.lag))
    aged, curve, losses = first, [], []
    model.train()
    for step in range(settings.steps):
        if step == settings.steps - system.lag:
            aged = [memorized(model, document, UNBOUNDED) for document in test]
        waiting.append(write())
        loss, accuracy = ask(model, task, *waiting.popleft(), questions)
        curve.append(accuracy)
        losses.append(loss.item())
        update(optimizer, schedule, loss)
        if writer is not None:
            writer.moved()
    model.eval()
    fresh = [memorized(model, document, UNBOUNDED) for document in test]
    aged = fresh if system.lag == 0 else aged
    answers = {
        "fresh": answer(model, task, test, fresh, seed),
        "aged": answer(model, task, test, aged, seed),
        "first": answer(model, task, test, first, seed),
        "off": answer(model, task, test, None, seed),
        "windowed": answer_in_window(model, task, settings.num_documents, seed),
    }
    return LearningResult(
        answers, torch.tensor(curve), torch.tensor(losses), key_drift(first, fresh), key_drift(aged, fresh)
    )


def make_optimizer(
    model: LongMemForCausalLM, system: LearningSystem, learning_rate: float
) -> tuple[torch.optim.AdamW, CoupledWriter | None]:
    """Return AdamW over the side network and, where the system says so, the backbone, and the writer that is coupled then."""
    groups = [{"params": list(model.side_network.parameters()), "lr": learning_rate}]
    writer = None
    if system.writer_rate is not None:
        writer = couple(model, average=system.average)
        groups.append({"params": list(writer.parameters.values()), "lr": learning_rate * system.writer_rate})
    return torch.optim.AdamW(groups, weight_decay=0.0), writer


def ask(
    model: LongMemForCausalLM, task: RecallTask, document: RecallDocument, bank: MemoryBank, generator: Generator
) -> tuple[Tensor, float]:
    """Return the loss of all the document's values, each asked once, and the share of right answers."""
    keys, values = document.keys.view(LANES, -1), document.values.view(LANES, -1)
    windows = draw_text(task, LANES, TOKENS, generator)
    places = draw_starts(keys.shape[1], TOKENS, generator)
    write_pairs(windows, places, keys, values)
    logits = model(windows, memory=bank).logits[:, places].flatten(0, 1)
    right = (logits.argmax(dim=-1) == values.flatten()).double().mean().item()
    return nn.functional.cross_entropy(logits, values.flatten()), right


def test_documents(task: RecallTask, settings: LearningSettings, seed: int) -> list[RecallDocument]:
    """Return the documents that are asked about at the end; none of them is trained on."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    return [draw_document(task, NUM_PAIRS, WINDOW, settings.distance, generator) for _ in range(settings.num_documents)]


test_documents.__test__ = False  # type: ignore[attr-defined]  # its name is no invitation to pytest


def answer(
    model: LongMemForCausalLM,
    task: RecallTask,
    documents: list[RecallDocument],
    banks: list[MemoryBank] | None,
    seed: int,
) -> Bool[Tensor, " questions"]:
    """Return which questions about the documents are answered, with each one's own bank or with none."""
    generator = torch.Generator().manual_seed(20_000 + seed)
    found = []
    for number, document in enumerate(documents):
        questions = draw_questions(task, document.keys, WORDS_BEFORE, generator)
        found.append(recalled(model, questions, document.values, None if banks is None else banks[number]))
    return torch.cat(found)


@torch.no_grad()
def answer_in_window(
    model: LongMemForCausalLM, task: RecallTask, num_lanes: int, seed: int
) -> Bool[Tensor, " questions"]:
    """Return which questions the backbone alone answers with the facts in its window, as in its last lesson.

    A backbone that forgets it was damaged by being trained along.
    """
    generator = torch.Generator().manual_seed(30_000 + seed)
    half, num_pairs = LESSONS[-1]
    windows, places = practice_windows(task, num_lanes, half, num_pairs, generator)
    logits = model.backbone(windows, use_cache=False).logits[:, places]
    return (logits.argmax(dim=-1) == windows[:, places + 1]).flatten()


def key_drift(before: list[MemoryBank], after: list[MemoryBank]) -> float:
    """Return 1 minus the mean cosine between the keys of the same tokens in two banks of the same documents."""
    cosines = []
    for old, new in zip(before, after, strict=True):
        keys, moved = (stored_tensors(bank)[0].float() for bank in (old, new))
        cosines.append(nn.functional.cosine_similarity(keys, moved, dim=-1).mean())
    return 1 - torch.stack(cosines).mean().item()
