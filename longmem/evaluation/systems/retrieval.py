"""The plain backbone with retrieved passages pasted into its window: what a user would do instead of a memory."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longmem.evaluation.systems.scoring import Question
from longmem.evaluation.systems.system import LocalModel, System
from longmem.model.modeling import LongMemForCausalLM

Passage = list[int]


class Bm25Ranker:
    """Ranks passages by the words they share with a query (BM25, the library bm25s)."""

    def __init__(self, model: LongMemForCausalLM) -> None:
        self.model = model

    def index(self, passages: Sequence[Passage]) -> None:
        """Rank these passages from now on."""
        import bm25s  # an extra: only this system needs it

        self._count, self._ranker = len(passages), bm25s.BM25()
        words = [self._words(passage) for passage in passages]
        self._known = {word for passage in words for word in passage}
        if self._known:  # bm25s cannot index passages without any words
            self._ranker.index(words, show_progress=False)

    def scores(self, query: Sequence[int]) -> Float[Tensor, " passages"]:
        """Return a score for each passage, higher for better; all 0 for a query without known words."""
        words = [word for word in self._words(query) if word in self._known]
        if not words:
            return torch.zeros(self._count)
        return torch.from_numpy(self._ranker.get_scores(words)).float()

    def _words(self, token_ids: Sequence[int]) -> list[str]:
        return re.findall(r"\w+", str(self.model.tokenizer.decode(list(token_ids))).lower())


class HiddenStateRanker:
    """Ranks passages by the cosine between mean hidden states of the backbone's last layer; each passage is run once."""

    def __init__(self, model: LongMemForCausalLM) -> None:
        self.model = model
        self._known: dict[tuple[int, ...], Tensor] = {}

    def index(self, passages: Sequence[Passage]) -> None:
        """Rank these passages from now on."""
        before, self._known = self._known, {}
        for passage in map(tuple, passages):
            if passage not in self._known:
                self._known[passage] = before[passage] if passage in before else self._vector(passage)
        self._vectors = torch.stack([self._known[tuple(passage)] for passage in passages])

    def scores(self, query: Sequence[int]) -> Float[Tensor, " passages"]:
        """Return a score for each passage, -1 to 1."""
        return self._vectors @ self._vector(query)

    def _vector(self, token_ids: Sequence[int]) -> Float[Tensor, " hidden"]:
        ids = torch.tensor([list(token_ids)], device=self.model.input_device)
        states = self.model.backbone.base_model(ids, use_cache=False).last_hidden_state
        return nn.functional.normalize(states[0].float().mean(dim=0), dim=0).cpu()


RANKERS: dict[str, Any] = {"bm25": Bm25Ranker, "hidden": HiddenStateRanker}


class RetrievalSystem(System):
    """The backbone with the best passages of the stream pasted in front of its local context, in their order.

    Args:
        name: "bm25" or "hidden", what ranks.
        passage_tokens: tokens of a passage at most; what is fed in one piece is cut into passages, never joined.
        pasted_share: of the window that pasted passages may take; the local context has the rest.
        query_tokens: the query is the last so many tokens before the candidates; None: the question's own tokens, which
            what stands before it does not blur.
    """

    def __init__(
        self,
        name: Literal["bm25", "hidden"],
        model: LongMemForCausalLM,
        *,
        passage_tokens: int = 128,
        pasted_share: float = 0.5,
        query_tokens: int | None = 64,
        **options: Any,
    ) -> None:
        super().__init__(name, model, **options)
        self.passage_tokens, self.pasted_share, self.query_tokens = passage_tokens, pasted_share, query_tokens
        self._indexed: tuple[int, list[Passage]] | None = None  # tokens that were indexed, and their passages
        self._ranker = RANKERS[name](model)  # it outlives a reset, since the next stream may share passages

    def reset(self) -> None:
        super().reset()
        self._indexed = None

    def score(self, questions: Sequence[Question], prefix: Sequence[int] = ()) -> list[Any]:
        """Ask each question alone, because each has its own passages."""
        alone = super().score
        return [answer for question in questions for answer in alone([question], prefix)]

    def generate(self, queries: Sequence[Sequence[int]], prefix: Sequence[int] = (), **options: Any) -> list[list[int]]:
        """Answer each query alone, because each has its own passages."""
        alone = super().generate
        return [answer for query in queries for answer in alone([query], prefix, **options)]

    def context(self, prefix: Sequence[int], room: int, questions: Sequence[Question]) -> tuple[LocalModel, list[int]]:
        """Return the backbone, and the best passages followed by the end of stream and prefix."""
        stream = self.stream
        stop = max(0, len(stream) - self.local_tokens)
        local = [*stream[stop:], *prefix]
        query = list(questions[0].token_ids)
        if self.query_tokens is not None:
            query = [*local, *query][-self.query_tokens :]
        # Half of the window, and what the local context leaves free: a short question wastes no room.
        budget = max(int(self.pasted_share * self.window), self.window - room - len(local))
        budget = max(0, min(budget, self.window - room - 1))
        pasted = self._best(stop, query, budget)
        return LocalModel(self.model.backbone), [*pasted, *self.local(local, room + len(pasted))]

    def _best(self, stop: int, query: Sequence[int], budget: int) -> list[int]:
        """Return the best passages that fit `budget` tokens, in the order of the stream."""
        if not stop or not query:
            return []
        if self._indexed is None or self._indexed[0] != stop:
            self._indexed = stop, cut_passages(self.passages, stop, self.passage_tokens)
            self._ranker.index(self._indexed[1])
        _, passages = self._indexed
        chosen: list[int] = []
        for number in self._ranker.scores(query).argsort(descending=True, stable=True).tolist():
            if len(passages[number]) > budget:
                break  # a worse one that fits would not be what was looked for
            budget -= len(passages[number])
            chosen.append(number)
        return [token for number in sorted(chosen) for token in passages[number]]


def cut_passages(pieces: Sequence[Sequence[int]], stop: int, size: int) -> list[Passage]:
    """Return the first `stop` tokens of pieces, cut into passages of at most `size` that do not straddle pieces.

    >>> cut_passages([[1, 2, 3], [4, 5]], stop=4, size=2)
    [[1, 2], [3], [4]]
    """
    passages = []
    for piece in pieces:
        own = list(piece[:stop])
        stop -= len(own)
        passages += [own[start : start + size] for start in range(0, len(own), size)]
    return passages
