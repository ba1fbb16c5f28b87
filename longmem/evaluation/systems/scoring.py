"""What a system is asked, and how likely it finds continuations: a common context is run once, its cache serves them all."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase

from longmem.backbone.cache_names import as_keyword, cache_of
from longmem.memory.memorize import tokenised

Passages = Sequence[Sequence[int]]  # pieces of a stream of tokens


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, continues: bool = False) -> list[int]:
    """Return the token ids of a text, without special tokens; `continues`: it stands behind another one."""
    return tokenised(tokenizer, text, continues)[0]


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


@dataclasses.dataclass(frozen=True)
class Answer:
    """The candidates of one question in their order, and the likeliest single token after the question."""

    candidates: tuple[Continuation, ...]
    likeliest: int


Forward = Callable[..., Any]  # input_ids, cache, use_cache, logits_to_keep -> output with logits and cache
Row = tuple[int, ...]


@torch.no_grad()
def answer_questions(
    forward: Forward,
    context: Sequence[int],
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> list[Answer]:
    """Return what a model makes of the candidates of each question after a common context.

    The last token of a continuation is predicted and never read, so candidates of one token share the row of their
    question. Rows of about equal length are run together, padded on the right, where causal models do not look.

    Args:
        forward: a causal LM on `device`; it may read memory.
        context: tokens before every question, at least one unless no question is empty (else ValueError: there is nothing
            from which the first token of a candidate could be predicted).
        batch_size: rows that are run at once; each has a copy of the context's cache.
    """
    if not context and not all(len(question.token_ids) for question in questions):
        raise ValueError("`context` must hold at least one token where a question has none, got none.")
    # The last token of the context begins every row, so that its prediction is there for empty questions.
    head, last = list(context[:-1]), list(context[-1:])
    cache = run_context(forward, head, device) if head else None
    wanted: dict[Row, list[tuple[int, int]]] = {}  # row -> the candidates that end after it
    for number, question in enumerate(questions):
        for candidate, ids in enumerate(question.candidates):
            wanted.setdefault((*last, *question.token_ids, *ids[:-1]), []).append((number, candidate))
    found: dict[tuple[int, int], Continuation] = {}
    likeliest: dict[int, int] = {}
    ordered = sorted(wanted, key=len)
    for start in range(0, len(ordered), batch_size):
        rows = ordered[start : start + batch_size]
        needed = max(len(questions[n].candidates[c]) for row in rows for n, c in wanted[row])
        # Rows are padded on the right: what is needed of the shortest begins before what is needed of the longest.
        keep = needed + len(rows[-1]) - len(rows[0])
        for row, own in zip(rows, run_rows(forward, cache, rows, keep, device), strict=True):
            end = own.shape[0] - (len(rows[-1]) - len(row))  # one past the prediction after the row
            for number, candidate in wanted[row]:
                ids = questions[number].candidates[candidate]
                predictions, places = own[end - len(ids) : end].float(), torch.tensor(ids, device=own.device)
                logprobs = predictions.log_softmax(dim=-1).gather(1, places[:, None])[:, 0].tolist()
                best = predictions.argmax(dim=-1).tolist()
                found[number, candidate] = Continuation(tuple(logprobs), best == list(ids))
                likeliest[number] = best[0]
    return [
        Answer(tuple(found[number, candidate] for candidate in range(len(question.candidates))), likeliest[number])
        for number, question in enumerate(questions)
    ]


def run_context(forward: Forward, ids: Sequence[int], device: torch.device | str) -> Cache:
    """Return the cache of a context."""
    tokens = torch.tensor([list(ids)], device=device)
    return cache_of(forward(tokens, use_cache=True, logits_to_keep=1))


def run_rows(
    forward: Forward, cache: Cache | None, rows: Sequence[Row], keep: int, device: torch.device | str
) -> Float[Tensor, "rows kept vocabulary"]:
    """Return the logits at the last `keep` places of rows that follow the cached context, padded to the longest."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows], device=device)
    keep = min(keep, longest)
    if cache is None:
        return forward(tokens, use_cache=False, logits_to_keep=keep).logits
    copies = as_keyword(repeated(cache, len(rows)))
    return forward(tokens, use_cache=True, logits_to_keep=keep, **copies).logits


def repeated(cache: Cache, count: int) -> Cache:
    """Return a copy of a cache of one row with `count` rows; the original may be used again."""
    copied = copy.deepcopy(cache)
    if count > 1:  # as beams do: `batch_repeat_interleave` is missing where layers are recurrent (transformers 5.23)
        copied.reorder_cache(torch.LongTensor([0] * count))
    return copied
