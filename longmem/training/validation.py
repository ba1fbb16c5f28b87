"""Validation beside training: four systems on the same tokens, with banks of their own, nothing of the training touched."""

import dataclasses
import itertools

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor

from longmem.evaluation.perplexity.scoring import Cut, Window, make_views, score_windows
from longmem.memory import MemoryBank
from longmem.model.modeling import LongMemForCausalLM
from longmem.training.settings import ValidationSettings


@dataclasses.dataclass(frozen=True)
class ValidationText:
    """A document in two parts: what is in memory, and the windows that follow."""

    name: str
    past: Int[Tensor, " past"]
    rest: Int[Tensor, " rest"]


def validation_texts(corpus: Dataset, settings: ValidationSettings, window: int) -> list[ValidationText]:
    """Return the first documents that are long enough, the windows right after the memorized part.

    Raises ValueError if there are fewer than two of them; the wrong memory of one is the memory of another.
    """
    past, needed = settings.memory_tokens, settings.memory_tokens + settings.windows * window
    long = ((row["document_id"], row["input_ids"][:needed]) for row in corpus if len(row["input_ids"]) >= needed)
    found = [(name, torch.tensor(ids)) for name, ids in itertools.islice(long, settings.documents)]
    texts = [ValidationText(name, ids[:past], ids[past:]) for name, ids in found]
    if len(texts) < 2:
        raise ValueError(
            f"`data.validation` must hold at least 2 documents of {needed} tokens (`validation.memory_tokens` and "
            f"`validation.windows` windows of {window}), got {len(texts)}; lower these or give longer texts."
        )
    return texts


class Validation:
    """Documents that nobody trains on, and the losses of four systems on them.

    The banks are written once, and the losses of the backbone alone computed once: the backbone is frozen. Should it have
    become another encoder, both are done anew. There are at least two texts, read in windows of `window` tokens.
    """

    def __init__(self, model: LongMemForCausalLM, texts: list[ValidationText], window: int) -> None:
        self.model, self.texts, self.cut = model, texts, Cut(window, window)
        self._banks: list[MemoryBank] = []
        self._backbone_loss: float | None = None
        self._encoder = ""  # that both are of

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that a system is scored on."""
        return sum(window.num_scored for text in self.texts for window in self._windows(text))

    def run(self, *, with_memory: bool = True) -> dict[str, float | None]:
        """Return the mean loss of each system in nats, every document counting the same.

        Without `with_memory` nothing is read, and "on" and "wrong" are None. The mode of the model and torch's random numbers
        are what they were before.
        """
        encoder = self.model.encoder_fingerprint()
        if encoder != self._encoder:
            self._banks, self._backbone_loss, self._encoder = [], None, encoder
        systems = ["off", *(["on", "wrong"] if with_memory else [])]
        if self._backbone_loss is None:
            systems.append("backbone")
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.random.fork_rng(enabled=True), torch.no_grad():
                if with_memory and not self._banks:
                    for text in self.texts:
                        self._banks.append(MemoryBank.for_model(self.model, capacity_tokens=None))
                        self.model.memorize(self._banks[-1], text.past, text.name)
                losses = self._losses(systems)
        finally:
            self.model.train(was_training)
        self._backbone_loss = losses.pop("backbone", self._backbone_loss)
        return {"backbone": self._backbone_loss, **dict.fromkeys(("off", "on", "wrong")), **losses}

    def _windows(self, text: ValidationText) -> list[Window]:
        return self.cut.row(0, len(text.rest) // self.cut.window)

    def _losses(self, systems: list[str]) -> dict[str, float]:
        """Return the mean loss of each of these systems."""
        banks: list[MemoryBank | None] = [*self._banks] or [None] * len(self.texts)
        sums = dict.fromkeys(systems, 0.0)
        for text, memory, wrong in zip(self.texts, banks, [*banks[1:], banks[0]], strict=True):
            views = make_views(systems, self.model, text.rest, self.cut, {"on": memory, "wrong": wrong})
            for system, view in views.items():
                sums[system] += score_windows(view, self._windows(text)).loss
        return {system: total / len(self.texts) for system, total in sums.items()}
