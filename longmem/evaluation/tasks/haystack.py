"""A long text in memory, encoded once, in windows that can be put aside while others, with facts in them, take their place."""

import itertools
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from longmem.data.sources import find_source
from longmem.evaluation.folder import digest
from longmem.evaluation.systems import Banks, tokenize
from longmem.memory import BankShards, MemoryBank, has_bank
from longmem.model.modeling import LongMemForCausalLM

WINDOWS_OF_DOCUMENT = 16  # what a stopped encoding loses at most

# The filler of the passkey task (Mohtashami and Jaggi, arXiv 2305.16300).
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "

Window = list[int]


def read_haystack(tokenizer: PreTrainedTokenizerBase, source: str, count: int) -> list[int]:
    """Return the first `count` tokens of the texts of a source. Raises ValueError if it has fewer, or there is none."""
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
        f"`sizes` must be at most the tokens of `haystack`, {len(ids):,} in {source!r}, got {count:,}; choose smaller ones."
    )


def cut(token_ids: Sequence[int], length: int) -> list[Window]:
    """Return windows of `length` tokens."""
    return [list(token_ids[start : start + length]) for start in range(0, len(token_ids), length)]


def hide(window: Window, before: Window, after: Window, generator: random.Random) -> tuple[Window, int]:
    """Return a window with other tokens somewhere in it, and where in it `before` ends, which `after` follows.

    What is pushed out is the end of the window, so that all others stay as they are. Raises ValueError if it is too short.
    """
    room = len(window) - len(before) - len(after)
    if room < 0:
        raise ValueError(
            f"`config.segment_length` must hold a whole fact, {len(before + after)} tokens, got {len(window)}; lower `pairs`."
        )
    start = generator.randint(0, room)
    return [*window[:start], *before, *after, *window[start:]][: len(window)], start + len(before)


class HaystackBanks(Banks):
    """Memories of the first tokens of a haystack, in which a few windows may be others.

    The bank of the haystack lacks the windows that some fact replaces. Those are in a small bank of their own, a document
    each, and windows with facts in a third, so a memory is these three read as one: nothing is deleted or written again. Each
    window is encoded by itself, as in every document, so the memory is that of the whole text with the fact in it.

    Args:
        windows: the text, cut into the model's segments.
        sizes: in tokens, that will be read.
        replaceable: numbers of the windows that may be replaced.
        folder: of the bank of the haystack, made or continued (ValueError if it is another's); None: in memory.
        options: of `MemoryBank`: `index` of the haystack's bank, `storage_dtype`.
    """

    def __init__(
        self,
        model: LongMemForCausalLM,
        windows: Sequence[Window],
        *,
        sizes: Collection[int],
        replaceable: Collection[int],
        folder: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.windows, self.length, self.replaceable = windows, len(windows[0]), sorted(replaceable)
        names = {}  # in the order of the text
        for first, end in plan_parts([size // self.length for size in sizes], self.replaceable):
            tokens = f"tokens {first * self.length} to {end * self.length}"
            names[first, end] = f"{tokens}, {digest(self._tokens(first, end))}"
        self._aside = self.new(index="flat")
        self._facts: tuple[Mapping[int, Window], MemoryBank] = {}, self._aside
        self.bank = self._open(folder, names.values())
        self._documents = {part: (self.bank, name) for part, name in names.items()}
        self._documents |= {(number, number + 1): (self._aside, str(number)) for number in self.replaceable}

    def encode(self, size: int, progress: Callable[[int, int], None] | None = None) -> int:
        """Encode what is missing of the first `size` tokens; return how many. `progress` gets (tokens done, to encode)."""
        jobs = [(part, bank, name) for part, bank, name in self._within(size) if name not in bank]
        total, done = sum(end - first for (first, end), _, _ in jobs) * self.length, 0
        for part, bank, name in jobs:
            done += self.memorize(bank, self._tokens(*part), name)
            if progress is not None:
                progress(done, total)
        return done

    def of(self, token_ids: Sequence[int]) -> BankShards:
        """Return the memory of the haystack's start with other windows in some places, good until others are asked for."""
        size = len(token_ids)
        own = enumerate(cut(token_ids, self.length))
        replaced = {number: window for number, window in own if window != self.windows[number]}
        assert set(replaced) <= set(self.replaceable), "only windows that were named before can be put aside"
        self.encode(size)
        shards: list[Any] = []
        for bank in (self.bank, self._aside):
            names = [name for (first, _), own, name in self._within(size) if own is bank and first not in replaced]
            if names:
                shards.append(bank if len(names) == len(bank.documents()) else bank.select(names))
        if replaced and self._facts[0] != replaced:
            self._facts = replaced, self.new(index="flat")
            for number, ids in replaced.items():
                self.memorize(self._facts[1], ids, str(number))
        return BankShards([*shards, self._facts[1]] if replaced else shards)

    def _within(self, size: int) -> list[tuple[tuple[int, int], MemoryBank, str]]:
        return [(part, *place) for part, place in self._documents.items() if part[1] * self.length <= size]

    def _tokens(self, first: int, end: int) -> list[int]:
        return [token for window in self.windows[first:end] for token in window]

    def _open(self, folder: str | None, known: Collection[str]) -> MemoryBank:
        if folder is None or not has_bank(Path(folder)):
            return self.new(folder=folder)
        bank = MemoryBank.open(folder, self.model)
        strange = [info.document_id for info in bank.documents() if info.document_id not in known]
        stored = str(bank.storage_dtype).removeprefix("torch.")
        if strange or stored != self.options.get("storage_dtype", stored):
            bank.close()
            found = f"{strange[0]!r}" if strange else f"keys in {stored}"
            raise ValueError(
                f"`bank_folder` must be new or the bank of a run with the same haystack, sizes and depths, got {folder!r} "
                f"with {found}; name another folder, or delete this one."
            )
        if bank.index != self.options.get("index", bank.index):
            bank.use_index(self.options["index"])
        return bank


def plan_parts(counts: Collection[int], replaceable: Collection[int]) -> list[tuple[int, int]]:
    """Return runs of windows, (first, one after the last), to be encoded as documents.

    None holds a window that may be replaced, or reaches over the end of a size; `counts` are the windows of every size.

    >>> plan_parts([4, 40], {0, 3, 20})
    [(1, 3), (4, 20), (21, 37), (37, 40)]
    """
    ends = sorted({0, *counts, *replaceable, *(number + 1 for number in replaceable)})
    return [
        (first, min(end, first + WINDOWS_OF_DOCUMENT))
        for start, end in itertools.pairwise(ends)
        for first in range(start, end, WINDOWS_OF_DOCUMENT)
        if first not in replaceable
    ]
