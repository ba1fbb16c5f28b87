"""The memory of one document, up to a place that only moves forward."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from longmem.memory import MemoryBank
from longmem.model.modeling import LongMemForCausalLM

DOCUMENT = "document"


class GrowingMemory:
    """A bank of the tokens of a document before a place, the latest ones if there are more than its capacity.

    Tokens are encoded as `memorize` does, in windows of `segment_length` counted from the document's start, and once; those
    that would be evicted before anything reads them are not encoded.

    Args:
        model: writes.
        token_ids: the document.
        capacity_tokens: a multiple of the chunk size, at least a `segment_length`; None: no limit.
        index: of the bank.
        batch_size: windows encoded at once.
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
        self.model = model
        self.token_ids = token_ids
        self.capacity_tokens = capacity_tokens
        self.index = index
        self.batch_size = batch_size
        self._bank: MemoryBank | None = None
        self._stop = 0

    def before(self, place: int) -> MemoryBank | None:
        """Return the bank of the tokens before `place`, or of as many as there are; None where that is none.

        It belongs to this object. Raises ValueError if it holds what stands behind `place` already.
        """
        stop = min(place, len(self.token_ids))
        if stop < self._stop:
            raise ValueError(f"`place` must not move back, got {place} after {self._stop}; take a new memory.")
        if stop > self._stop:
            self._grow(stop)
        return self._bank

    def _grow(self, stop: int) -> None:
        needed = 0 if self.capacity_tokens is None else max(0, stop - self.capacity_tokens)
        needed -= needed % self.model.config.segment_length  # whole windows, or their tokens would be encoded otherwise
        append = self._bank is not None and needed <= self._stop
        if not append:
            self._bank = MemoryBank.for_model(self.model, capacity_tokens=self.capacity_tokens, index=self.index)
            self._stop = needed
        self.model.memorize(
            self._bank,  # type: ignore[arg-type]
            self.token_ids[self._stop : stop],
            DOCUMENT,
            append=append,
            batch_size=self.batch_size,
        )
        self._stop = stop
