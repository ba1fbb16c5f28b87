"""Validation beside training: four systems on the same tokens, with banks of their own, nothing of the training touched."""

from __future__ import annotations

import dataclasses

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor

from longmem.evaluation.perplexity import score_windows
from longmem.memory import MemoryBank
from longmem.model.modeling import LongMemForCausalLM

OWN = ("off", "on", "wrong")  # the systems that change while the side network is trained


@dataclasses.dataclass(frozen=True)
class ValidationText:
    """A document in two parts: what is in memory, and the windows that follow."""

    name: str
    past: Int[Tensor, " past"]
    rest: Int[Tensor, " rest"]


def validation_texts(
    corpus: Dataset, *, documents: int, memory_tokens: int, windows: int, window: int
) -> list[ValidationText]:
    """Return the first documents that are long enough, the windows right after the memorized part.

    Raises:
        ValueError: there are fewer than two of them; the wrong memory of one is the memory of another.
    """
    needed = memory_tokens + windows * window
    texts: list[ValidationText] = []
    for row in corpus:
        if len(texts) == documents:
            break
        if len(row["input_ids"]) >= needed:
            ids = torch.tensor(row["input_ids"][:needed], dtype=torch.int64)
            texts.append(ValidationText(row["document_id"], ids[:memory_tokens], ids[memory_tokens:]))
    if len(texts) < 2:
        raise ValueError(
            f"`data.validation` must hold at least 2 documents of {needed} tokens (`validation.memory_tokens` and "
            f"`validation.windows` windows of {window}), got {len(texts)}; lower these or give longer texts."
        )
    return texts


class Validation:
    """Documents that nobody trains on, and the losses of four systems on them.

    The banks are written once, and the losses of the backbone alone computed once: the backbone is frozen. Should it have
    become another encoder, both are done anew.

    Args:
        model: read from.
        texts: at least two.
        window: tokens the model sees at once.
    """

    def __init__(self, model: LongMemForCausalLM, texts: list[ValidationText], window: int) -> None:
        self.model, self.texts, self.window = model, texts, window
        self._banks: list[MemoryBank] = []
        self._backbone_loss: float | None = None
        self._encoder = ""  # that both are of

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that a system is scored on."""
        return sum(len(text.rest) // self.window * (self.window - 1) for text in self.texts)

    def run(self, *, with_memory: bool = True) -> dict[str, float | None]:
        """Return the mean loss of each system in nats, every document counting the same.

        `with_memory`: without, nothing is read, and "on" and "wrong" are None.

        The mode of the model and torch's random numbers are what they were before.
        """
        encoder = self.model.encoder_fingerprint()
        if encoder != self._encoder:
            self._banks, self._backbone_loss, self._encoder = [], None, encoder
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.random.fork_rng(enabled=True), torch.no_grad():
                if with_memory and not self._banks:
                    self._banks = [self._memorized(text) for text in self.texts]
                losses = {system: self._loss(system) if with_memory or system == "off" else None for system in OWN}
                if self._backbone_loss is None:
                    self._backbone_loss = self._loss("backbone")
        finally:
            self.model.train(was_training)
        return {"backbone": self._backbone_loss, **losses}

    def _memorized(self, text: ValidationText) -> MemoryBank:
        bank = MemoryBank.for_model(self.model, capacity_tokens=None, device=self.model.input_device)
        self.model.memorize(bank, text.past, text.name)
        return bank

    def _loss(self, system: str) -> float:
        shift = {"on": 0, "wrong": 1}.get(system)
        total = 0.0
        for number, text in enumerate(self.texts):
            memory = None if shift is None else self._banks[(number + shift) % len(self._banks)]
            scores = score_windows(
                self.model, text.rest, window=self.window, memory=memory, backbone_only=system == "backbone"
            )
            total += scores.loss
        return total / len(self.texts)
