"""What an evaluation on books measures: which tokens of each are memorized, cut into windows and scored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longmem.data.sample_texts import first_tokens, python_manual
from longmem.evaluation.contexts import validate_context
from longmem.evaluation.perplexity import SYSTEMS
from longmem.model.modeling import LongMemForCausalLM


@dataclasses.dataclass(frozen=True)
class Cut:
    """A way of cutting a text into windows: `window` tokens each, their starts `stride` tokens apart.

    >>> Cut.parse("1024/512")
    Cut(window=1024, stride=512)
    """

    window: int
    stride: int

    def __post_init__(self) -> None:
        if self.window < 2 or not 1 <= self.stride <= self.window:
            raise ValueError(
                f"a cut must have windows of at least 2 tokens and a stride from 1 to that, got {self}; "
                "`512/512` does not overlap, in `1024/512` every scored token sees 512 others."
            )

    @classmethod
    def parse(cls, text: str) -> Cut:
        """Return the cut written as window/stride."""
        window, _, stride = text.partition("/")
        if not (window.isdecimal() and stride.isdecimal()):
            raise ValueError(f"a cut must be written as window/stride, such as 1024/512, got {text!r}.")
        return cls(int(window), int(stride))

    def __str__(self) -> str:
        """Return it as it is parsed."""
        return f"{self.window}/{self.stride}"

    @property
    def lead(self) -> int:
        """Return the tokens at the start of each window that are context only."""
        return self.window - self.stride

    @property
    def scored(self) -> int:
        """Return the tokens scored in each window; the first token of a text that is cut off has no prediction."""
        return min(self.stride, self.window - 1)


@dataclasses.dataclass(frozen=True)
class BookPlan:
    """What is measured on each book.

    All cuts score the same stretch of a book, from token `first_scored` on; a cut whose windows begin earlier has
    fewer tokens in memory, but never less than `memory_tokens`.

    Args:
        cuts: ways of cutting windows.
        memory_tokens: tokens in memory at least, when the first window is scored.
        windows: windows of each book and cut.
        contexts: tokens in the window of the backbone where it has a longer one.
        context_windows: windows of each book and cut, from the first on, that these are scored on; default: all.
        grow: what leaves the window goes into the right memory.
    """

    cuts: tuple[Cut, ...] = (Cut(512, 512), Cut(1024, 512))
    memory_tokens: int = 8192
    windows: int = 8
    contexts: tuple[int, ...] = ()
    context_windows: int | None = None
    grow: bool = False

    def __post_init__(self) -> None:
        if not self.cuts or len(set(self.cuts)) < len(self.cuts) or len(set(self.contexts)) < len(self.contexts):
            raise ValueError(
                "`cuts` must be at least one, and neither a cut nor a context may be named twice, got "
                f"{[str(cut) for cut in self.cuts]} and {list(self.contexts)}."
            )
        if self.memory_tokens < 1 or self.windows < 1:
            raise ValueError(
                f"`memory_tokens` and `windows` must be at least 1, got {self.memory_tokens} and {self.windows}."
            )
        if not 1 <= self.long_windows <= self.windows:
            raise ValueError(
                f"`context_windows` must be from 1 to the {self.windows} windows of a book, got {self.context_windows}."
            )
        for context in self.contexts:
            if context > (most := self.first_scored + min(cut.stride for cut in self.cuts)):
                raise ValueError(
                    f"`contexts` must fit into the {most} tokens up to the end of the first window, got {context}; "
                    f"memorize {context - most} tokens more (`memory_tokens`) or choose a shorter one."
                )

    @property
    def long_windows(self) -> int:
        """Return the windows of each book and cut that the longer contexts are scored on."""
        return self.windows if self.context_windows is None else self.context_windows

    @property
    def systems(self) -> list[str]:
        """Return the names of all systems, in the order of the tables."""
        return [*SYSTEMS, *(f"context-{context}" for context in self.contexts)]

    @property
    def first_scored(self) -> int:
        """Return the first token of a book that is scored."""
        return self.memory_tokens + max(cut.lead for cut in self.cuts)

    @property
    def num_tokens(self) -> int:
        """Return the tokens of a book that are needed."""
        return self.first_scored + self.windows * max(cut.stride for cut in self.cuts)

    def memorized(self, cut: Cut) -> int:
        """Return the tokens in memory when the first window of a cut is scored."""
        return self.first_scored - cut.lead

    def stop(self, cut: Cut) -> int:
        """Return where the last window of a cut ends in a book."""
        return self.first_scored + self.windows * cut.stride

    def ends(self, stride: int) -> list[int]:
        """Return where the windows of a stride end in a book, those that the longer contexts are scored on."""
        return [self.first_scored + number * stride for number in range(1, self.long_windows + 1)]

    def validate_for(self, model: LongMemForCausalLM) -> None:
        """Raise ValueError if a context is not longer than every window, or too long for the backbone."""
        for context in self.contexts:
            validate_context(model, context, max(cut.window for cut in self.cuts))


@dataclasses.dataclass(frozen=True)
class Book:
    """The token ids of the start of a text."""

    name: str
    token_ids: Int[Tensor, " tokens"]

    @property
    def digest(self) -> str:
        """Return a hash of the tokens."""
        return token_digest(self.token_ids)


def token_digest(token_ids: Int[Tensor, " tokens"]) -> str:
    """Return a hash of token ids, by which a run knows its texts."""
    return hashlib.blake2b(token_ids.numpy().tobytes(), digest_size=8).hexdigest()


def files_of_split(manifest: str | PathLike[str], split: str) -> list[Path]:
    """Return the files of a split, from a JSON list of objects with `file` (beside the manifest) and `split`.

    Raises:
        ValueError: the manifest is no such list, or has no such split.
    """
    entries = json.loads(Path(manifest).read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not all({"file", "split"} <= set(entry) for entry in entries):
        raise ValueError(f"{manifest} must be a JSON list of objects that have `file` and `split`.")
    files = [Path(manifest).parent / entry["file"] for entry in entries if entry["split"] == split]
    if not files:
        known = sorted({entry["split"] for entry in entries})
        raise ValueError(f"`split` must be one of {known}, those of {manifest}, got {split!r}.")
    return files


def read_books(tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], plan: BookPlan) -> list[Book]:
    """Return as much of each file as the plan needs, named as the file without its ending.

    Raises:
        ValueError: there is no file, two have the same name, or one is too short.
    """
    names = [file.stem for file in files]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`files` must be at least one text, each of another name, got {names}.")
    books = []
    for name, file in zip(names, files, strict=True):
        text = file.read_text(encoding="utf-8")
        parts = first_tokens(tokenizer, text, name, plan.first_scored, plan.num_tokens - plan.first_scored)
        books.append(Book(name, torch.cat(parts)))
    return books


def wrong_books(tokenizer: PreTrainedTokenizerBase, books: Sequence[Book], plan: BookPlan) -> list[Book]:
    """Return what is in the wrong memory of each book: the next book, and Python's manual if there is but one."""
    if len(books) > 1:
        return [*books[1:], books[0]]
    name = "Python's manual"
    return [Book(name, first_tokens(tokenizer, python_manual(), name, plan.first_scored, 0)[0])]
