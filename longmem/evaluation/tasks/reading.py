"""Questions about long documents, as QuALITY and LoCoMo have them: the end stands in the window, the rest is in memory."""

import dataclasses
import functools
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from longmem.evaluation.folder import spread
from longmem.evaluation.runner import described, guessed, record_id
from longmem.evaluation.settings import EvaluationSettings, Number
from longmem.evaluation.systems import LongContextReader, tokenize
from longmem.evaluation.task import Case, Item, Task, best
from longmem.model.modeling import LongMemForCausalLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A question about a document."""

    name: str  # unique in the document
    question: str
    answer: str  # the right one, of multiple choice one of `options`
    options: tuple[str, ...] = ()
    category: str = ""
    trap: str = ""  # a wrong answer that the document suggests, where the right one is that it does not tell


@dataclasses.dataclass(frozen=True)
class Document:
    """A long text in the pieces in which it is fed, and the questions about it."""

    name: str
    passages: tuple[str, ...]
    asked: tuple[Asked, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingSettings(EvaluationSettings):
    """Questions about long documents; `limit` counts questions."""

    data: str
    """File of the benchmark."""

    instruction: str | None = None
    """Stands between document and question, as a line of its own; None: nothing does."""

    local_tokens: Number = 512
    """Tokens of the end of a document that stay in the window of every system but context-N; fewer for documents whose
    longest question leaves less room."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local_tokens >= self.window:
            sizes = f"{self.local_tokens} and {self.window}"
            raise ValueError(f"`local_tokens` must be below `window`, got {sizes}: the question needs room.")

    @property
    def prefix(self) -> str:
        """Return what stands between document and question."""
        return "" if self.instruction is None else f"\n{self.instruction}"


class ReadingTask(Task):
    """A benchmark of questions about documents, by default those of the file that the settings name."""

    retrieval = {"query_tokens": None}  # passages for the question, whatever the document ends with
    max_new_tokens = 0

    def __init__(self, settings: Any, documents: Sequence[Document] | None = None) -> None:
        super().__init__(settings)
        self.documents = self.read(Path(settings.data).expanduser()) if documents is None else list(documents)

    @staticmethod
    @abstractmethod
    def read(path: Path) -> list[Document]:
        """Return the documents of a file. Raises ValueError if it is missing or of another kind."""

    @abstractmethod
    def prompt(self, asked: Asked) -> str:
        """Return what is asked after the document."""

    @abstractmethod
    def candidates(self, asked: Asked) -> list[str]:
        """Return the continuations whose likelihood is measured, the right answer among them."""

    def chosen(self) -> list[tuple[Document, list[Asked]]]:
        """Return the documents with the questions that are asked about them: `limit` in all, evenly spread.

        Where one document has them all, the next is there without any: a wrong memory needs it.
        """
        pairs = [(number, asked) for number, document in enumerate(self.documents) for asked in document.asked]
        found: dict[int, list[Asked]] = {}
        for place in spread(len(pairs), self.settings.limit):
            number, asked = pairs[place]
            found.setdefault(number, []).append(asked)
        if len(found) == 1 and len(self.documents) > 1:
            found.setdefault((next(iter(found)) + 1) % len(self.documents), [])
        return [(self.documents[number], items) for number, items in found.items()]

    def cases(self, model: LongMemForCausalLM) -> list[Case]:
        """Return the documents in tokens."""
        return [self._case(model, document, asked) for document, asked in self.chosen()]

    def item(self, asked: Asked, tokens: Callable[[str], list[int]] = lambda text: []) -> Item:
        """Return a question in tokens."""
        about: dict[str, Any] = {"question": asked.question, "gold": asked.answer}
        guesses: dict[str, Any] = {}
        if asked.options:
            about["options"] = list(asked.options)
            guesses["longest"] = {"choice": best([len(option) for option in asked.options])}
        else:
            about |= {"category": asked.category, "trap": asked.trap}
        ids, candidates = tokens(self.prompt(asked)), [tokens(candidate) for candidate in self.candidates(asked)]
        return Item(name=asked.name, token_ids=ids, candidates=candidates, about=about, guesses=guesses)

    def _case(self, model: LongMemForCausalLM, document: Document, asked: Sequence[Asked]) -> Case:
        """Return a document in tokens, split between window and memory at one place, so that it is encoded once."""
        tokens = functools.partial(tokenize, model.tokenizer, continues=True)
        items = {each: self.item(each, tokens) for each in document.asked}  # also those that are not asked need room
        case = Case(
            name=document.name,
            group=document.name,
            memory=[tokens(passage, continues=number > 0) for number, passage in enumerate(document.passages)],
            prefix=tokens(self.settings.prefix),
            items=[items[each] for each in asked],
            max_new_tokens=self.max_new_tokens,
        )
        rooms = {name: len(case.prefix) + case.room(item) for name, item in items.items()}
        longest = max(rooms, key=rooms.__getitem__)
        left = self.settings.window - rooms[longest]
        if left < 1:
            raise ValueError(
                f"`window` must hold instruction, question, answer and one token before them, {rooms[longest] + 1} of "
                f"question {document.name}/{longest.name}, got {self.settings.window}; choose a larger one."
            )
        return dataclasses.replace(case, local_tokens=min(self.settings.local_tokens, left))


def answer_documents(task: ReadingTask, reader: LongContextReader, *, name: str = "reader") -> Iterator[dict[str, Any]]:
    """Yield a record for each question, as a run writes them but without likelihoods.

    A document is fed piece by piece, once, then all its questions are asked. Any object with `reset`, `feed` and `answer` will
    do, such as a client of a service:

        task = Locomo(LocomoSettings(output="results/service", data="locomo10.json", limit=40))
        metrics = summarize(task, list(answer_documents(task, Client(), name="service")))

    With the records of several systems in one list, told apart by `name`, they are compared on the same questions. Of multiple
    choice an answer begins with a letter, and `style` must be letter (ValueError).
    """
    if getattr(task.settings, "style", "letter") != "letter":
        raise ValueError(f"`style` must be letter where answers are written, got {task.settings.style!r}.")
    for document, own in task.chosen():
        case = Case(name=document.name, group=document.name, items=[task.item(asked) for asked in own])
        yield from guessed(case)
        reader.reset()
        for passage in document.passages:
            reader.feed(passage)
        for asked, item in zip(own, case.items, strict=True):
            start = time.perf_counter()
            text = reader.answer(task.settings.prefix + task.prompt(asked).removesuffix(" ("))
            seconds = time.perf_counter() - start
            record = {"id": record_id(case, item, name), "system": name, **described(case, item), "prediction": text}
            yield {**record, "seconds": seconds}
