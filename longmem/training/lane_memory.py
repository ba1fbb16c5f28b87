"""The memories of the lanes: what a lane may read at a step is a pure function of its text and the step.

Each lane writes a bank of its own, after its backward pass. A document border empties it, unless documents are to be kept.
When a run goes on from a checkpoint, or when the curriculum allows more memory, banks are written anew from the tokens
before the step; the backbone is frozen, so they hold the same numbers as if nothing had happened.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from longmem.backbone.capture import BackboneStates
from longmem.data import LaneBatch
from longmem.memory import BankShards, MemoryBank
from longmem.memory.protocols import Memory
from longmem.model.modeling import LongMemForCausalLM

BatchAt = Callable[[int], LaneBatch]
StatesOf = Callable[[LaneBatch], BackboneStates]


def scheduled_capacity(step: int, tokens: int, start_tokens: int | None, growth_steps: int, chunk_size: int) -> int:
    """Return how many tokens a lane's memory holds at an optimizer step: it doubles from `start_tokens` to `tokens`.

    The doublings are spread evenly over `growth_steps`.

    >>> [scheduled_capacity(step, 8192, 1024, 30, 4) for step in (0, 9, 10, 20, 30, 500)]
    [1024, 1024, 2048, 4096, 8192, 8192]
    """
    size = tokens
    if start_tokens is not None and step < growth_steps:
        doublings = max(1, (tokens // start_tokens).bit_length() - 1)
        size = min(tokens, start_tokens * 2 ** (step * doublings // growth_steps))
    return max(chunk_size, size - size % chunk_size)


class LaneMemories:
    """The banks of this process's lanes, one for each, empty at first.

    Args:
        model: writes and reads.
        num_lanes: lanes of this process.
        keep_documents: a lane's memory goes on past the end of a document.
        foreign_lanes: so many other lanes' banks are read together with the lane's own, as distractors that training must
            learn to pass over (Focused Transformer, arXiv 2307.03170).
        bank_options: of the banks, as `MemoryBank.for_model` takes them. With the `storage_dtype` in which reading computes,
            nothing that is read has to be converted.
    """

    def __init__(
        self,
        model: LongMemForCausalLM,
        num_lanes: int,
        *,
        keep_documents: bool,
        foreign_lanes: int,
        **bank_options: Any,
    ) -> None:
        if foreign_lanes >= num_lanes:
            raise ValueError(
                f"`memory.foreign_lanes` must be below the {num_lanes} lanes of a process, got {foreign_lanes}; "
                "raise `data.lanes` or use fewer processes."
            )
        self.model, self.keep_documents, self.foreign_lanes = model, keep_documents, foreign_lanes
        self.bank_options = bank_options
        self.capacity = 0
        self.banks: list[MemoryBank] = [self._new_bank(model.config.chunk_size) for _ in range(num_lanes)]

    def _new_bank(self, capacity: int) -> MemoryBank:
        return MemoryBank.for_model(self.model, capacity_tokens=capacity, **self.bank_options)

    def prepare(self, batch: LaneBatch, step: int, capacity: int, batch_at: BatchAt, states_of: StatesOf) -> None:
        """Make the banks what they are before `batch`, of a step: rebuilt for a new capacity, emptied at document borders."""
        if capacity != self.capacity:
            self.capacity = capacity
            self.banks = [self._new_bank(capacity) for _ in self.banks]
            for earlier in range(step - self._reach(step, batch_at), step):
                past = batch_at(earlier)
                self._clear_new(past)
                self.write(past, states_of(past))
        self._clear_new(batch)

    def readable(self, batch: LaneBatch) -> list[Memory]:
        """Return what each lane reads with a batch: its own bank, and the next foreign ones.

        A bank that holds the lane's document is no foreign one: it may hold what the lane is about to predict. If the backbone
        has moved, or is about to, each bank does what its refresh policy says: here, and nowhere else in training. Where that
        is to refuse (`frozen`, StaleMemoryError), one bank is asked: all of them have one writer.
        """
        for bank in self.banks[:1] if self.banks[0].refresh == "frozen" else self.banks:
            bank.ready_for(self.model)
        found: list[Memory] = []
        for lane, own in enumerate(self.banks):
            others = self.banks[lane + 1 :] + self.banks[:lane]
            foreign = [bank for bank in others if batch.document_ids[lane] not in bank][: self.foreign_lanes]
            found.append(BankShards([own, *foreign]) if foreign else own)
        return found

    def write(self, batch: LaneBatch, states: BackboneStates) -> None:
        """Append what the backbone made of a batch to the banks: real tokens only, each lane to its own document.

        What is written here is the work of the writer of this moment: of the version that `readable` told the banks of.
        """
        for lane, (bank, document_id) in enumerate(zip(self.banks, batch.document_ids, strict=True)):
            length, parts = batch.lengths[lane], (states.keys, states.values)
            keys, values = ([tensor[lane, :, :length] for tensor in part.values()] for part in parts)
            ids = batch.input_ids[lane, :length]
            put = bank.append if document_id in bank else bank.add
            put(document_id, keys, values, ids, segment="new")  # the backbone saw this window and nothing else

    def _clear_new(self, batch: LaneBatch) -> None:
        """Let go of what a lane must not find when it begins a batch."""
        for bank, document_id, is_new in zip(self.banks, batch.document_ids, batch.is_new, strict=True):
            if is_new and not self.keep_documents:
                bank.clear()
                continue
            for known in bank.documents():
                if (
                    is_new and known.document_id == document_id
                ):  # it comes again, in the next epoch, and would find itself
                    bank.delete(known.document_id)

    def _reach(self, step: int, batch_at: BatchAt) -> int:
        """Return how many steps back the fullest bank's tokens go."""
        tokens, reach = [0] * len(self.banks), 0
        missing = [self.keep_documents or not is_new for is_new in batch_at(step).is_new]
        while any(missing) and reach < step:
            reach += 1
            batch = batch_at(step - reach)
            for lane, length in enumerate(batch.lengths):
                tokens[lane] += length
                border = batch.is_new[lane] and not self.keep_documents
                # A chunk more than fits: a first one may be cut at another place.
                full = tokens[lane] >= self.capacity + self.model.config.chunk_size
                missing[lane] = missing[lane] and not border and not full
        return reach


def preceding_tokens(batch_at: BatchAt, step: int, lane: int, count: int) -> Int[Tensor, " context"]:
    """Return up to `count` tokens that the lane read just before a step's window in the same document."""
    parts: list[Tensor] = []
    while not batch_at(step).is_new[lane] and sum(map(len, parts)) < count:
        step -= 1
        batch = batch_at(step)
        parts.insert(0, batch.input_ids[lane, : batch.lengths[lane]])
    return torch.cat(parts)[-count:] if parts else batch_at(step).input_ids.new_empty(0)
