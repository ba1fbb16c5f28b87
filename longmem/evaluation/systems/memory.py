"""LongMem on a stream: what does not stand in the window is in memory, off, on or that of another text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from longmem.evaluation.systems.questions import Question
from longmem.evaluation.systems.system import LocalModel, System
from longmem.memory import MemoryBank
from longmem.memory.protocols import Memory
from longmem.model.modeling import LongMemForCausalLM


class Banks:
    """Banks of streams: each is encoded once, and a longer stream continues the bank of its start.

    The last `keep` are kept, so that the wrong memory of one text can be the right memory of the next; `batch_size` windows
    are encoded at once. Options are those of `MemoryBank.for_model`; without a capacity nothing is ever evicted.
    """

    def __init__(self, model: LongMemForCausalLM, keep: int = 2, batch_size: int = 1, **options: Any) -> None:
        self.model = model
        self.keep = keep
        self.batch_size = batch_size
        self.options = {"capacity_tokens": None, **options}
        self.encoded_tokens = 0
        self._kept: list[tuple[list[int], MemoryBank]] = []

    def of(self, token_ids: Sequence[int]) -> Memory:
        """Return a bank with one document, "stream", of these tokens, at least one; it belongs to this object."""
        ids = list(token_ids)
        for number, (known, bank) in enumerate(self._kept):
            if ids[: len(known)] == known:
                if len(ids) > len(known):
                    self.memorize(bank, ids[len(known) :], append=True)
                del self._kept[number]
                break
        else:
            bank = self.new()
            self.memorize(bank, ids)
        self._kept = [*self._kept, (ids, bank)][-self.keep :]
        return bank

    def new(self, **changes: Any) -> MemoryBank:
        """Return an empty bank that belongs to the caller, with changes to the options of all."""
        return MemoryBank.for_model(self.model, **{**self.options, **changes})

    def memorize(
        self, bank: MemoryBank, token_ids: Sequence[int], name: str = "stream", *, append: bool = False
    ) -> int:
        """Write a document into a bank, or what follows it; return how many tokens were encoded, which are counted."""
        encoded = self.model.memorize(
            bank, torch.tensor(list(token_ids)), name, append=append, batch_size=self.batch_size
        )
        self.encoded_tokens += encoded
        return encoded


class MemorySystem(System):
    """LongMem: the end of the stream in the window, everything before it in memory, so that no token is in both.

    All systems with one window have the same tokens in it. Therefore up to `chunk_size - 1` tokens at the border may wait in
    the bank for their chunk to be full, where no search finds them.

    Args:
        name: "off" reads nothing, "on" the stream's memory, "wrong" what `read` was given instead; anything else is as "on".
        banks: shared with other systems on the same streams; None: its own.
    """

    def __init__(self, name: str, model: LongMemForCausalLM, *, banks: Banks | None = None, **options: Any) -> None:
        super().__init__(name, model, **options)
        self.banks = Banks(model) if banks is None else banks

    def context(self, prefix: Sequence[int], room: int, questions: Sequence[Question]) -> tuple[LocalModel, list[int]]:
        """Return the model that reads memory, and the end of stream and prefix.

        What the questions push out of the window is in memory. So that a bank serves several calls, give them questions of
        one length, or a `local_tokens` that leaves room for the longest.
        """
        stream = self.stream
        kept = max(0, min(self.local_tokens, self.window - room - len(prefix)))
        stop = max(0, len(stream) - kept)
        local = LocalModel(self.model, self._memory(stream[:stop]))
        return local, self.local([*stream[stop:], *prefix], room)

    def _memory(self, ids: Sequence[int]) -> Memory | None:
        if self.name == "off":
            return None
        if self.name == "wrong":
            if not self.instead:
                raise ValueError("`instead` must hold the text of the wrong memory, got none; give it to `read`.")
            ids = self.instead
        return self.banks.of(ids) if ids else None
