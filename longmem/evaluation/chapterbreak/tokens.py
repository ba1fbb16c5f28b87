"""Contexts and suffixes as tokens: how they are joined, where they are cut, how much of them each system sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longmem.evaluation.chapterbreak.data import Example
from longmem.evaluation.chapterbreak.settings import LOCAL_SYSTEMS
from longmem.evaluation.systems import Question
from longmem.evaluation.systems.names import context_size


class Encoder:
    """Makes tokens of examples: the context, then the joiner, then each suffix.

    Whitespace where context and suffix meet is the joiner's, so that no suffix is known by it.

    Args:
        tokenizer: of the model.
        joiner: text between context and suffix.
        suffix_tokens: tokens of a suffix at most, from its beginning.
    """

    def __init__(self, tokenizer: Any, joiner: str, suffix_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.joiner = joiner
        self.suffix_tokens = suffix_tokens
        self.joiner_ids = self._joiner_ids()

    @property
    def room(self) -> int:
        """Return the tokens that joiner and suffix take in a window."""
        return len(self.joiner_ids) + self.suffix_tokens

    def context(self, example: Example) -> list[int]:
        """Return all tokens of a context."""
        return self._tokens(example.context.rstrip())

    def question(self, example: Example) -> Question:
        """Return the joiner as the question and the beginnings of the suffixes as its candidates, the right one first."""
        return Question(self.joiner_ids, [self._suffix(text.lstrip()) for text in example.suffixes])

    def _suffix(self, text: str) -> list[int]:
        ids = self._tokens(self.joiner + text)
        count = len(self.joiner_ids)
        # Where the joiner has other tokens before this suffix (digits, say), its usual ones are read nevertheless.
        own = ids[count:] if ids[:count] == self.joiner_ids else self._tokens(text)
        return own[: self.suffix_tokens]

    def _joiner_ids(self) -> list[int]:
        """Return the joiner's tokens as they are before a word: two line ends at the end of a text may be one token."""
        ids = self._tokens(self.joiner + "The")
        count = 0
        while count < len(ids) and len(self._text(ids[: count + 1])) <= len(self.joiner):
            count += 1
        return ids[:count]

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def views(systems: Sequence[str], contexts: Sequence[int], *, window: int, room: int) -> dict[int, dict[str, int]]:
    """Return, for each length of context, how many tokens of it each system uses.

    Backbone and off use what fits the window, context-N what fits N tokens, all others everything. Where the context fits
    the window, all see the same tokens and no memory, and only backbone and off remain.

    >>> views(["backbone", "context-4096", "on"], [512, 8192], window=1024, room=130)
    {512: {'backbone': 512}, 8192: {'backbone': 894, 'context-4096': 3966, 'on': 8192}}

    Raises:
        ValueError: the window has no room for a context, or no context is so long that a system has anything to use.
    """
    local = window - room
    if local < 1:
        raise ValueError(
            f"`window` must hold joiner, suffix and at least one token before them, got {window} tokens for {room}; "
            "choose a larger `window` or smaller `suffix_tokens`."
        )
    others = [name for name in systems if name not in LOCAL_SYSTEMS]
    if others and max(contexts) <= local:
        raise ValueError(
            f"`contexts` must have one of more than {local} tokens, which fit the window of {window} beside a suffix, for "
            f"{', '.join(others)} to use anything else, got {list(contexts)}; add a longer one, or leave out the systems."
        )
    found: dict[int, dict[str, int]] = {}
    for length in sorted(contexts):
        used = {name: min(length, local) if name in LOCAL_SYSTEMS else length for name in systems}
        for name in others:
            if name.startswith("context-"):
                used[name] = min(length, context_size(name) - room)
        found[length] = {name: used[name] for name in systems if name in LOCAL_SYSTEMS or length > local}
    return found
