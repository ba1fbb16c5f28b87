"""Memories of what stands before a place in a text."""

from __future__ import annotations

import time
from typing import Any

from jaxtyping import Int
from torch import Tensor

from longmem.memory import MemoryBank
from longmem.model.modeling import LongMemForCausalLM

DOCUMENT = "document"  # the only one of a bank


class GrowingMemory:
    """A bank of the tokens of a text before a place that only moves forward, the latest ones if there are more than fit.

    Tokens are encoded as `memorize` does, in windows of `segment_length` counted from the text's start, `batch_size` at a
    time, and once; those that would be evicted before anything reads them are not encoded. `capacity_tokens` is a multiple of
    the chunk size, at least a `segment_length`; None: no limit.
    """

    def __init__(
        self,
        model: LongMemForCausalLM,
        token_ids: Int[Tensor, " tokens"],
        *,
        capacity_tokens: int | None = None,
        index: str = "auto",
        batch_size: int = 1,
    ) -> None:
        self.model, self.token_ids, self.batch_size = model, token_ids, batch_size
        self.capacity_tokens, self.index = capacity_tokens, index
        self._bank: MemoryBank | None = None
        self._stop = 0

    def before(self, place: int) -> MemoryBank | None:
        """Return the bank of the tokens before `place`, or of as many as there are; None where that is none.

        It belongs to this object. Raises ValueError if it holds what stands behind `place` already.
        """
        stop = min(place, len(self.token_ids))
        if stop < self._stop:
            raise ValueError(f"`place` must not move back, got {place} after {self._stop}; take a new memory.")
        if stop == self._stop:
            return self._bank
        needed = 0 if self.capacity_tokens is None else max(0, stop - self.capacity_tokens)
        needed -= needed % self.model.config.segment_length  # whole windows, or their tokens would be encoded otherwise
        append = self._bank is not None and needed <= self._stop
        if not append:
            self._bank = MemoryBank.for_model(self.model, capacity_tokens=self.capacity_tokens, index=self.index)
            self._stop = needed
        ids, options = self.token_ids[self._stop : stop], {"append": append, "batch_size": self.batch_size}
        self.model.memorize(self._bank, ids, DOCUMENT, **options)  # type: ignore[arg-type]
        self._stop = stop
        return self._bank


class Starts:
    """Banks of the starts of texts. Each text is encoded once; what is handed out is a copy, which may grow.

    The last two texts are kept: the wrong memory of one is the right memory of the next. No bank gets more than `num_tokens`;
    `options` are those of `GrowingMemory`.
    """

    def __init__(self, model: LongMemForCausalLM, num_tokens: int, **options: Any) -> None:
        self.model, self.num_tokens, self.options = model, num_tokens, options
        self._encoded: dict[bytes, tuple[MemoryBank, float]] = {}

    def bank(self, token_ids: Int[Tensor, " tokens"], stop: int) -> tuple[MemoryBank, float]:
        """Return a new bank of the first `stop` tokens of a text, and the seconds that it takes to encode them."""
        start = token_ids[: self.num_tokens]
        key = start.numpy().tobytes()
        if key not in self._encoded:
            began = time.perf_counter()
            bank = GrowingMemory(self.model, start, **self.options).before(len(start))
            assert bank is not None  # a text has tokens
            kept = list(self._encoded.items())[-1:]
            self._encoded = dict([*kept, (key, (bank, (time.perf_counter() - began) / len(start)))])
        original, seconds = self._encoded[key]
        bank = original.empty_like()
        self.model.memorize(bank, start[:stop], DOCUMENT, reuse=(original, DOCUMENT))
        return bank, seconds * stop
