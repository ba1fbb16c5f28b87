"""Everything that is compared: reset, feed, then score candidates or answer; the backbone, and LongMem with its memory."""

import contextlib
import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from longmem.backbone.cache_names import as_keyword, named_for
from longmem.evaluation.systems.scoring import (
    Answer,
    Passages,
    Question,
    answer_questions,
    repeated,
    run_context,
    tokenize,
)
from longmem.memory import MemoryBank
from longmem.memory.protocols import Memory
from longmem.model.modeling import LongMemForCausalLM


class LongContextReader(Protocol):
    """What a benchmark of long contexts needs of a system: forget, take in text, answer a query in text."""

    def reset(self) -> None:
        """Forget everything that was fed."""

    def feed(self, chunk: str) -> None:
        """Take in the next piece of text."""

    def answer(self, query: str) -> str:
        """Return an answer to a query about what was fed; the query is not remembered."""


@dataclasses.dataclass(frozen=True)
class LocalModel:
    """What runs in the window: a backbone, or a LongMem model with what it reads, None for nothing."""

    model: Any
    memory: Any = None

    def __call__(self, input_ids: Int[Tensor, "rows tokens"], **options: Any) -> Any:
        """Return the model's output."""
        return self.model(input_ids, **self._inputs, **named_for(self.model, options))

    def generate(self, input_ids: Int[Tensor, "rows tokens"], **options: Any) -> Int[Tensor, "rows longer"]:
        """Return the tokens and their continuation."""
        return self.model.generate(input_ids, **self._inputs, **options)

    @property
    def _inputs(self) -> dict[str, Any]:
        return {} if self.memory is None or self.memory.is_empty else {"memory": self.memory}


class System(ABC):
    """One way of using a model on a text that is longer than its window; a `LongContextReader`.

    What is fed is one stream of tokens, whatever the pieces. Its last `local_tokens` stand in the window, before what is
    asked; how the rest is used is what systems differ in. All have the same window but the backbone with a longer one.

    Args:
        name: as in tables.
        model: read from, never changed.
        window: tokens the model sees at once, what is asked and answered included.
        local_tokens: tokens of the end of the stream that stay in the window, as many as find room there.
        batch_size: rows that are run at once.
    """

    def __init__(
        self, name: str, model: LongMemForCausalLM, *, window: int, local_tokens: int = 0, batch_size: int = 16
    ) -> None:
        self.name, self.model, self.window = name, model, window
        self.local_tokens, self.batch_size = local_tokens, batch_size
        self.passages: list[list[int]] = []
        self.instead: list[int] = []  # what a wrong memory holds
        self.preparing_seconds = 0.0  # what depends on the stream alone, such as encoding it
        self.answering_seconds = 0.0

    def reset(self) -> None:
        """Forget everything that was fed."""
        self.passages = []

    def feed(self, chunk: str | Sequence[int] | Int[Tensor, " tokens"]) -> None:
        """Take in the next piece: text, or token ids of the model's tokenizer."""
        if isinstance(chunk, str):
            chunk = tokenize(self.model.tokenizer, chunk, continues=bool(self.passages))
        self.passages.append(chunk.tolist() if isinstance(chunk, Tensor) else list(chunk))

    def read(self, passages: Passages, instead: Passages = (), local_tokens: int | None = None) -> None:
        """Forget everything and feed these passages. `instead`: what a wrong memory holds. `local_tokens`: None: as before."""
        self.reset()
        self.instead = [token for passage in instead for token in passage]
        if local_tokens is not None:
            self.local_tokens = local_tokens
        for passage in passages:
            self.feed(passage)

    @property
    def stream(self) -> list[int]:
        """Return all tokens that were fed."""
        return [token for passage in self.passages for token in passage]

    @torch.no_grad()
    def score(self, questions: Sequence[Question], prefix: Sequence[int] = ()) -> list[Answer]:
        """Return how likely the candidates of each question are after stream and prefix. ValueError if they do not fit."""
        room = max(question.room for question in questions)
        with self._answering(prefix, room, questions) as (local, context):
            device = self.model.input_device
            return answer_questions(local, context, questions, batch_size=self.batch_size, device=device)

    @torch.no_grad()
    def generate(
        self,
        queries: Sequence[Sequence[int]],
        prefix: Sequence[int] = (),
        *,
        max_new_tokens: int = 32,
        stop: Sequence[str] = ("\n",),
    ) -> list[list[int]]:
        """Return the greedy continuation of each query after stream and prefix, up to a stop string; ValueError as `score`."""
        room, questions = max(map(len, queries)) + max_new_tokens, [Question(ids, [[0]]) for ids in queries]
        options = {"stop_strings": list(stop), "tokenizer": self.model.tokenizer} if stop else {}
        answers = []
        with self._answering(prefix, room, questions) as (local, context):
            cache = run_context(local, context[:-1], self.model.input_device) if context[:-1] else None
            for query in queries:
                ids = torch.tensor([[*context, *query]], device=self.model.input_device)
                output = local.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=self.model.generation_config.pad_token_id or 0,
                    **as_keyword(None if cache is None else repeated(cache, 1)),
                    **options,
                )
                answers.append(output[0, ids.shape[1] :].tolist())
        return answers

    def answer(self, query: str, *, max_new_tokens: int = 32, stop: Sequence[str] = ("\n",)) -> str:
        """Return the greedy answer to a query about what was fed, up to a stop string; the query is not remembered."""
        (ids,) = self.generate([tokenize(self.model.tokenizer, query)], max_new_tokens=max_new_tokens, stop=stop)
        return text_before(str(self.model.tokenizer.decode(ids, skip_special_tokens=True)), stop)

    @abstractmethod
    def context(self, prefix: Sequence[int], room: int, questions: Sequence[Question]) -> tuple[LocalModel, list[int]]:
        """Return what runs in the window, and the tokens before every question.

        They end with `prefix` and leave `room` tokens free for the longest question and what follows it. A system that looks
        for passages needs the questions.
        """

    def begun(self, prefix: Sequence[int], room: int, questions: Sequence[Question]) -> tuple[LocalModel, list[int]]:
        """Return `context` as it is read: behind the model's start tokens, which do not count as part of the window."""
        local, context = self.context(prefix, room, questions)
        asked = questions[0].token_ids if questions else ()
        return local, [*self.model.config.missing_start([*context, *asked]), *context]

    def local(self, tokens: Sequence[int], room: int) -> list[int]:
        """Return the end of some tokens, as much as the window holds beside `room`."""
        if room >= self.window:
            raise ValueError(
                f"`window` must hold a question, its longest answer and one token before them, got {self.window} tokens "
                f"for {room}; choose a larger `window`, or shorter questions."
            )
        return list(tokens)[max(0, len(tokens) - (self.window - room)) :]

    @contextlib.contextmanager
    def _answering(
        self, prefix: Sequence[int], room: int, questions: Sequence[Question]
    ) -> Iterator[tuple[LocalModel, list[int]]]:
        """Give the block what runs in the window and the context; its seconds are those of answering, others of preparing."""
        start = time.perf_counter()
        local, context = self.begun(prefix, room, questions)
        prepared = time.perf_counter()
        self.preparing_seconds += prepared - start
        yield local, context
        self.answering_seconds += time.perf_counter() - prepared


class BackboneSystem(System):
    """The plain backbone on the end of the stream, as much of it as finds room: what a user does without memory."""

    def context(self, prefix: Sequence[int], room: int, questions: Sequence[Question]) -> tuple[LocalModel, list[int]]:
        """Return the backbone and the end of stream and prefix."""
        tail = self.stream[-self.local_tokens :] if self.local_tokens else []
        return LocalModel(self.model.backbone), self.local([*tail, *prefix], room)


class LongBackbone(BackboneSystem):
    """The backbone with a window of its own, filled with the stream as far back as it goes."""

    def __init__(self, name: str, model: LongMemForCausalLM, *, window: int, batch_size: int = 16) -> None:
        super().__init__(name, model, window=window, local_tokens=window, batch_size=batch_size)

    def read(self, passages: Passages, instead: Passages = (), local_tokens: int | None = None) -> None:
        """Forget everything and feed these passages; the whole window is for them, whatever others keep."""
        super().read(passages, instead)


def text_before(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first stop string, without blanks around it.

    >>> text_before(" a white whale\\nQ:", ["\\n"])
    'a white whale'
    """
    places = [place for each in stop if (place := text.find(each)) >= 0]
    return text[: min(places, default=len(text))].strip()


class Banks:
    """Banks of streams: each is encoded once, and a longer stream continues the bank of its start.

    The last `keep` are kept, so that the wrong memory of one text can be the right memory of the next; `batch_size` windows
    are encoded at once. Options are those of `MemoryBank.for_model`; without a capacity nothing is ever evicted.
    """

    def __init__(self, model: LongMemForCausalLM, keep: int = 2, batch_size: int = 1, **options: Any) -> None:
        self.model, self.keep, self.batch_size = model, keep, batch_size
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
        options: dict[str, Any] = {"append": append, "batch_size": self.batch_size}
        encoded = self.model.memorize(bank, torch.tensor(list(token_ids)), name, **options).num_encoded
        self.encoded_tokens += encoded
        return encoded


class MemorySystem(System):
    """LongMem: the end of the stream in the window, everything before it in memory, so that no token is in both, or neither.

    All systems with one window have the same tokens in it.

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
        if self.name == "wrong" and not self.instead:
            raise ValueError("`instead` must hold the text of the wrong memory, got none; give it to `read`.")
        memorized = {"off": [], "wrong": self.instead}.get(self.name, stream[:stop])
        local = LocalModel(self.model, self.banks.of(memorized) if memorized else None)
        return local, self.local([*stream[stop:], *prefix], room)
