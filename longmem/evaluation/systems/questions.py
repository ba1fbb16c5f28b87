"""What a system is asked, and what it answers: token ids in, log-likelihoods of continuations out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

Passages = Sequence[Sequence[int]]  # pieces of a stream of tokens


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@dataclasses.dataclass(frozen=True)
class Question:
    """Token ids that end the local context, and the continuations to compare after them.

    `token_ids` may be empty where the context itself is the question; every candidate has at least one token.
    """

    token_ids: Sequence[int]
    candidates: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        if not self.candidates or not all(len(candidate) for candidate in self.candidates):
            raise ValueError(
                "`candidates` must be at least one continuation of at least one token, got lengths "
                f"{[len(candidate) for candidate in self.candidates]}; an empty one has no likelihood."
            )

    @property
    def room(self) -> int:
        """Return the tokens that the question and its longest candidate take in the window."""
        return len(self.token_ids) + max(map(len, self.candidates))


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Log-probabilities, in nats, of the tokens of one candidate, and whether each of them was the likeliest token."""

    logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def total(self) -> float:
        """Return the log-likelihood of the candidate."""
        return sum(self.logprobs)

    @property
    def mean(self) -> float:
        """Return the log-likelihood per token."""
        return self.total / len(self.logprobs)


@dataclasses.dataclass(frozen=True)
class Answer:
    """The candidates of one question in their order, and the likeliest single token after the question."""

    candidates: tuple[Continuation, ...]
    likeliest: int

    def best(self, *, per_token: bool = False) -> int:
        """Return the number of the likeliest candidate, the first of equals; by the mean of its tokens or their sum."""
        values = [each.mean if per_token else each.total for each in self.candidates]
        return values.index(max(values))
