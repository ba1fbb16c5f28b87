"""A long text in memory, encoded once, in windows that can be put aside while others, with facts in them, take their place."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from longmem.data.sources import find_source
from longmem.evaluation.folder import digest
from longmem.evaluation.systems import Banks
from longmem.evaluation.tasks.words import FILLER
from longmem.memory import BankShards, MemoryBank, has_bank

WINDOWS_OF_DOCUMENT = 16  # what a stopped encoding loses at most

Window = list[int]


# The text ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Tokens of a text, and how many of them are encoded at once, each window by itself."""

    token_ids: list[int]
    window_length: int

    def window(self, number: int) -> Window:
        """Return the tokens of one window."""
        return self.token_ids[number * self.window_length : (number + 1) * self.window_length]

    def windows(self, size: int, replaced: Mapping[int, Window]) -> list[Window]:
        """Return the windows of the first `size` tokens, some of them replaced."""
        return [replaced.get(number) or self.window(number) for number in range(size // self.window_length)]

    def hide(
        self, number: int, before: list[int], after: list[int], generator: random.Random
    ) -> tuple[Window, int]:
        """Return a window with other tokens somewhere in it, and where in it `before` ends, which `after` follows.

        What is pushed out is the end of the window, so that all others stay as they are.

        Raises:
            ValueError: the window is too short.
        """
        room = self.window_length - len(before) - len(after)
        if room < 0:
            raise ValueError(
                f"`config.segment_length` must hold a whole fact, {len(before) + len(after)} tokens, got "
                f"{self.window_length}; choose fewer `pairs`, or a model with longer segments."
            )
        start = generator.randint(0, room)
        text = self.window(number)
        return [*text[:start], *before, *after, *text[start:]][: self.window_length], start + len(before)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def read_haystack(tokenizer: PreTrainedTokenizerBase, source: str, count: int) -> list[int]:
    """Return the first `count` tokens of the texts of a source, one after the other.

    Raises:
        ValueError: there is no such source, or it has fewer tokens.
    """
    ids: list[int] = []
    if source == "filler":
        sentences = tokenize(tokenizer, FILLER)
        return (sentences * (count // len(sentences) + 1))[:count]
    for document in find_source(source, text_column="text", split="train", is_bounded=True).documents():
        # Most texts have fewer characters per token: there is no need to tokenize the rest.
        ids += tokenize(tokenizer, document.text[: 8 * (count - len(ids))] + "\n\n")
        if len(ids) >= count:
            return ids[:count]
    raise ValueError(
        f"`sizes` must be at most the tokens of `haystack`, {len(ids):,} in {source!r}, got {count:,}; choose smaller "
        "ones, or a folder with more text."
    )


# Its memory ---------------------------------------------------------------------------------------------------------------


class HaystackMemory:
    """The first tokens of a haystack as a memory, in which a few windows can be replaced by others.

    The bank of the haystack lacks the windows that some fact replaces. Those are in a small bank of their own, a document
    each, and windows with facts in a third, so a memory is these three read as one: nothing is deleted or written
    again, and no search is filtered but that of the small one. A window is encoded by itself, as the windows of every
    document are, so the memory is the one that the whole text, with the fact in it, would have given.

    Args:
        banks: write banks and count what is encoded; their index is that of the haystack's bank, small ones are exact.
        haystack: the text.
        sizes: in tokens, that will be read.
        replaceable: numbers of the windows that may be replaced.
        folder: of the bank of the haystack, made or continued; None: in memory.

    Raises:
        ValueError: the folder holds a bank with other settings, or of another text.
    """

    def __init__(
        self,
        banks: Banks,
        haystack: Haystack,
        *,
        sizes: Collection[int],
        replaceable: Collection[int],
        folder: str | None = None,
    ) -> None:
        self.haystack = haystack
        self.replaceable = frozenset(replaceable)
        self._banks = banks
        parts = plan_parts([size // haystack.window_length for size in sizes], self.replaceable)
        self._names = {part: self._name(*part) for part in parts}  # in the order of the text
        self._aside = banks.new(index="flat")
        self._facts: tuple[Mapping[int, Window], MemoryBank] = {}, banks.new(index="flat")
        self.bank = self._open(folder)

    def close(self) -> None:
        """Give the folder of the bank back."""
        self.bank.close()

    def encode(self, size: int, progress: Callable[[int, int], None] | None = None) -> int:
        """Encode what is missing of the first `size` tokens; return how many tokens that were.

        `progress`: called with (tokens done, tokens to encode) after every document.
        """
        length = self.haystack.window_length
        jobs = [(self.bank, self._names[part], part) for part in self._parts_of(size)]
        jobs += [(self._aside, str(number), (number, number + 1)) for number in self._aside_of(size, ())]
        jobs = [(bank, name, part) for bank, name, part in jobs if name not in bank]
        total = sum(stop - start for _, _, (start, stop) in jobs) * length
        done = 0
        for bank, name, (start, stop) in jobs:
            done += self._banks.memorize(bank, self.haystack.token_ids[start * length : stop * length], name)
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
            bank = self._banks.new(index="flat")
            for number, ids in replaced.items():
                self._banks.memorize(bank, ids, str(number))
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

    def _open(self, folder: str | None) -> MemoryBank:
        if folder is None or not has_bank(Path(folder)):
            return self._banks.new(folder=folder)
        bank = MemoryBank.open(folder, self._banks.model)
        wanted = self._banks.options
        known = set(self._names.values())
        strange = [info.document_id for info in bank.documents() if info.document_id not in known]
        stored = str(bank.storage_dtype).removeprefix("torch.")
        if strange or stored != wanted.get("storage_dtype", stored):
            bank.close()
            found = f"{strange[0]!r}" if strange else f"keys in {stored}"
            raise ValueError(
                f"`bank_folder` must be new or the bank of a run with the same haystack, sizes and depths, got {folder!r} "
                f"with {found}; name another folder, or delete this one."
            )
        if bank.index != wanted.get("index", bank.index):
            bank.use_index(wanted["index"])
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
