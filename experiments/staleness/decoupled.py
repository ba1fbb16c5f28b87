"""With a frozen writer memory is fresh for nothing: what training of the reader does to banks written before it.

Training moves the side network alone, so the encoder stays the same, a bank encoded anew is the old one to the last bit, and
the reader learns to read what was written before its first step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from experiments.learned_recall.check import (
    NUM_PAIRS,
    WINDOW,
    WORDS_BEFORE,
    add_side_network,
    train_backbone,
    train_side_network,
)
from experiments.learned_recall.task import RecallDocument, RecallTask, draw_document, draw_questions
from longmem.memory import MemoryBank
from longmem.model.modeling import LongMemForCausalLM


@dataclasses.dataclass(frozen=True)
class FreshnessResult:
    """What training did to a model and to banks written before it.

    `fingerprints` of the encoder before and after; `changed_numbers` of `stored_numbers` keys and values that the documents,
    encoded anew, have other than the old banks; `losses` of held-out questions in nats: "before" training, "after" it with the
    old banks, and "anew", after it with banks written then.
    """

    fingerprints: tuple[str, str]
    changed_numbers: int
    stored_numbers: int
    losses: dict[str, Float[Tensor, " questions"]]

    @property
    def same_encoder(self) -> bool:
        """Return whether the encoder is the one it was."""
        return self.fingerprints[0] == self.fingerprints[1]

    @property
    def mean_losses(self) -> dict[str, float]:
        """Return the mean loss of each kind, in nats."""
        return {kind: losses.mean().item() for kind, losses in self.losses.items()}


def measure_freshness(
    model: LongMemForCausalLM,
    task: RecallTask,
    train: Callable[[], object],
    *,
    num_documents: int = 8,
    distance: int = 1024,
    seed: int = 0,
    refresh: str = "frozen",
) -> FreshnessResult:
    """Write documents, train, and return what became of them.

    Args:
        model: whose banks these are.
        task: that documents and questions are drawn from.
        train: trains the model, in place.
        num_documents: with 32 questions each.
        distance: tokens of a document after its facts.
        seed: of what is drawn.
        refresh: policy of the banks; "frozen" refuses to read them if the encoder has changed.
    """
    generator = torch.Generator().manual_seed(seed)
    documents = [draw_document(task, NUM_PAIRS, WINDOW, distance, generator) for _ in range(num_documents)]
    questions = [draw_questions(task, document.keys, WORDS_BEFORE, generator) for document in documents]

    def write() -> list[MemoryBank]:
        return [memorized(model, document, refresh) for document in documents]

    old, before = write(), model.encoder_stamp(exact=True).digest
    losses = {"before": question_losses(model, documents, questions, old)}
    train()
    model.eval()
    new = write()
    losses["after"] = question_losses(model, documents, questions, old)
    losses["anew"] = question_losses(model, documents, questions, new)
    pairs = [both for banks in zip(old, new, strict=True) for both in zip(*map(stored_tensors, banks), strict=True)]
    changed = sum(int((one != other).sum()) for one, other in pairs)
    return FreshnessResult(
        (before, model.encoder_stamp(exact=True).digest), changed, sum(one.numel() for one, _ in pairs), losses
    )


def check_decoupled(
    seed: int = 0, steps: int = 300, task: RecallTask | None = None, backbone: LlamaForCausalLM | None = None
) -> FreshnessResult:
    """Return what `steps` optimizer steps of a side network do to banks written before them.

    `backbone`: one that `learned_recall.check.train_backbone` made; None trains one, for 1,000 steps.
    """
    task = task or RecallTask()
    model = add_side_network(backbone or train_backbone(task, 1000, 3 * seed))
    return measure_freshness(
        model, task, lambda: train_side_network(model, task, steps, 1024, 3 * seed + 1), seed=3 * seed + 2
    )


@torch.no_grad()
def question_losses(
    model: LongMemForCausalLM, documents: list[RecallDocument], questions: list[Tensor], banks: list[MemoryBank]
) -> Float[Tensor, " questions"]:
    """Return the loss of each answer, in nats, with each document's own bank."""
    losses = []
    for document, asked, bank in zip(documents, questions, banks, strict=True):
        logits = model(asked, memory=bank, logits_to_keep=1).logits[:, -1]
        losses.append(nn.functional.cross_entropy(logits, document.values, reduction="none"))
    return torch.cat(losses)


def memorized(model: LongMemForCausalLM, document: RecallDocument, refresh: str) -> MemoryBank:
    """Return a bank that holds a document and follows a refresh policy."""
    bank = MemoryBank.for_model(model, refresh=refresh)
    model.memorize(bank, document.token_ids, "document", batch_size=16)
    return bank


def stored_tensors(bank: MemoryBank) -> tuple[Tensor, Tensor]:
    """Return the keys and values of the only layer of a bank, in the order in which they were written."""
    (layer,) = bank.memory_layers
    return bank.gather(layer, torch.arange(bank.num_chunks)[None], bank.generation)
