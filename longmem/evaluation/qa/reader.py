"""Question answering with any system that can reset, feed and answer: text in, text out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from longmem.evaluation.qa.documents import Document, Item
from longmem.evaluation.qa.locomo import locomo_prompt
from longmem.evaluation.qa.quality import quality_prompt
from longmem.evaluation.qa.run import describe_item
from longmem.evaluation.systems import LongContextReader


def answer_documents(
    reader: LongContextReader,
    documents: Sequence[tuple[Document, Sequence[Item]]],
    *,
    name: str = "reader",
    instruction: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a record for each question, as `evaluate_qa` writes them but without likelihoods.

    A document is fed piece by piece, once, then all its questions are asked; an answer begins with the letter of an option
    where there are options. Any object with `reset`, `feed` and `answer` will do, such as a client of a service:

        class Client:
            def reset(self):
                self.text = ""

            def feed(self, chunk):
                self.text += chunk

            def answer(self, query):
                return service.complete(self.text + query, max_tokens=32).partition("\\n")[0]

        documents = choose_items(read_locomo(Path("locomo10.json")), limit=40)
        records = list(answer_documents(Client(), documents, name="service"))
        metrics = summarize_locomo(records)

    With the records of several systems in one list they are compared on the same questions.

    Args:
        reader: is asked.
        documents: of `choose_items`.
        name: of the reader, in records and tables.
        instruction: as `QASettings.instruction`.
        progress: called with (questions done, questions in all).
    """
    total = sum(len(items) for _, items in documents)
    done = 0
    for document, items in documents:
        reader.reset()
        for passage in document.passages:
            reader.feed(passage)
        for item in items:
            start = time.perf_counter()
            text = reader.answer(query_of(item, instruction))
            seconds = time.perf_counter() - start
            yield {**describe_item(item, document.document_id, name, text), "seconds": seconds}
            done += 1
            if progress is not None:
                progress(done, total)


def query_of(item: Item, instruction: str | None = None) -> str:
    """Return the query for a question, instruction included."""
    prompt = quality_prompt(item, "letter").removesuffix(" (") if item.options else locomo_prompt(item)
    return prompt if instruction is None else f"\n{instruction}{prompt}"
