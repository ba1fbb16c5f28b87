"""The haystack in memory: encoded once, in windows that can be put aside while others stand in their place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from longmem.evaluation.distance.haystack import Haystack, Window
from longmem.evaluation.runs.folder import digest
from longmem.memory import BankShards, MemoryBank, has_bank
from longmem.model.modeling import LongMemForCausalLM

WINDOWS_OF_DOCUMENT = 16  # what a stopped encoding loses at most


class HaystackMemory:
    """The first tokens of a haystack as a memory, in which a few windows can be replaced by others.

    The bank of the haystack lacks the windows that some trial replaces. Those are in a small bank of their own, a document
    each, and windows with facts in a third, so a memory is these three read as one: nothing is deleted or written
    again, and no search is filtered but that of the small one. A window is encoded by itself, as the windows of every
    document are, so the memory is the one that the whole text, with the fact in it, would have given.

    Args:
        model: encodes.
        haystack: the text.
        sizes: in tokens, that will be read.
        replaceable: numbers of the windows that may be replaced.
        folder: of the bank of the haystack, made or continued; None: in memory.
        batch_size: windows that are encoded at once.
        options: of `MemoryBank`: `index` of the haystack's bank, `storage_dtype`.

    Raises:
        ValueError: the folder holds a bank with other settings, or of another text.
    """

    def __init__(
        self,
        model: LongMemForCausalLM,
        haystack: Haystack,
        *,
        sizes: Collection[int],
        replaceable: Collection[int],
        folder: str | None = None,
        batch_size: int = 1,
        **options: Any,
    ) -> None:
        self.model = model
        self.haystack = haystack
        self.replaceable = frozenset(replaceable)
        self.batch_size = batch_size
        self._options = {"capacity_tokens": None, **options, "index": "flat"}
        length = haystack.window_length
        parts = plan_parts([size // length for size in sizes], self.replaceable)
        self._names = {part: self._name(*part) for part in parts}  # in the order of the text
        self._aside = self._new_bank()
        self._facts: tuple[Mapping[int, Window], MemoryBank] = {}, self._new_bank()
        self.bank = self._open(folder, {"capacity_tokens": None, **options})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bank.close()

    def encode(self, size: int, progress: Callable[[int, int], None] | None = None) -> int:
        """Encode what is missing of the first `size` tokens; return how many tokens that were.

        `progress`: called with (tokens done, tokens to encode) after every document.
        """
        length = self.haystack.window_length
        missing = [part for part in self._parts_of(size) if self._names[part] not in self.bank]
        aside = [number for number in self._aside_of(size, ()) if str(number) not in self._aside]
        total = (sum(stop - start for start, stop in missing) + len(aside)) * length
        done = 0
        jobs = [(self.bank, self._names[part], part) for part in missing]
        jobs += [(self._aside, str(number), (number, number + 1)) for number in aside]
        for bank, name, (start, stop) in jobs:
            ids = self.haystack.token_ids[start * length : stop * length]
            done += self.model.memorize(bank, torch.tensor(ids), name, batch_size=self.batch_size)
            if progress is not None:
                progress(done, total)
        return done

    def read(self, size: int, replaced: Mapping[int, Window] | None = None) -> BankShards:
        """Return the memory of the first `size` tokens, which `encode` has encoded, with these windows in place of its own.

        What is returned may be read until the next call with other windows.
        """
        replaced = replaced or {}
        assert self.replaceable.issuperset(replaced), "only windows that were named before can be put aside"
        names = [self._names[part] for part in self._parts_of(size)]
        shards: list[Any] = []
        if names:
            shards.append(self.bank if len(names) == len(self.bank.documents()) else self.bank.select(names))
        aside = [str(number) for number in self._aside_of(size, replaced)]
        if aside:
            shards.append(self._aside.select(aside))
        if replaced:
            shards.append(self._encoded(replaced))
        return BankShards(shards)

    def _encoded(self, replaced: Mapping[int, Window]) -> MemoryBank:
        if self._facts[0] != replaced:
            bank = self._new_bank()
            for number, ids in replaced.items():
                self.model.memorize(bank, torch.tensor(ids), str(number))
            self._facts = dict(replaced), bank
        return self._facts[1]

    def _parts_of(self, size: int) -> list[tuple[int, int]]:
        return [part for part in self._names if part[1] * self.haystack.window_length <= size]

    def _aside_of(self, size: int, replaced: Collection[int]) -> list[int]:
        count = size // self.haystack.window_length
        return [number for number in sorted(self.replaceable) if number < count and number not in replaced]

    def _name(self, first: int, end: int) -> str:
        start, stop = (number * self.haystack.window_length for number in (first, end))
        return f"tokens {start} to {stop}, {digest(self.haystack.token_ids[start:stop])}"

    def _new_bank(self) -> MemoryBank:
        return MemoryBank.for_model(self.model, **self._options)

    def _open(self, folder: str | None, options: Mapping[str, Any]) -> MemoryBank:
        if folder is None or not has_bank(Path(folder)):
            return MemoryBank.for_model(self.model, folder=folder, **options)
        bank = MemoryBank.open(folder, self.model)
        known = set(self._names.values())
        strange = [info.document_id for info in bank.documents() if info.document_id not in known]
        stored = str(bank.storage_dtype).removeprefix("torch.")
        if strange or stored != options.get("storage_dtype", stored):
            bank.close()
            found = f"{strange[0]!r}" if strange else f"keys in {stored}"
            raise ValueError(
                f"`bank_folder` must be new or the bank of a run with the same haystack, sizes and depths, got {folder!r} "
                f"with {found}; name another folder, or delete this one."
            )
        if bank.index != options.get("index", bank.index):
            bank.use_index(options["index"])
        return bank


def plan_parts(counts: Collection[int], replaceable: Collection[int]) -> list[tuple[int, int]]:
    """Return runs of windows, (first, one after the last), to be encoded as documents.

    None holds a window that may be replaced, or reaches over the end of a size.

    Args:
        counts: windows of every size.
        replaceable: numbers of windows.

    >>> plan_parts([4, 40], {0, 3, 20})
    [(1, 3), (4, 20), (21, 37), (37, 40)]
    """
    ends = sorted({*counts, *replaceable, *(number + 1 for number in replaceable)})
    parts = []
    start = 0
    for end in ends:
        for first in range(start, end, WINDOWS_OF_DOCUMENT):
            if first not in replaceable:
                parts.append((first, min(end, first + WINDOWS_OF_DOCUMENT)))
        start = max(start, end)
    return parts
