"""A library of documents in one bank, and questions about them that arrive one window after the other.

In the plain recall task documents use the same keys, and a question must say which document it is about. Here the documents
of a library can have keys of their own, so that one search over all of them has one right answer.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from experiments.learned_recall.task import (
    PAIR,
    PASSAGE,
    RecallTask,
    draw_questions,
    draw_starts,
    draw_text,
    write_pairs,
)
from experiments.staleness.settings import Asking, LibrarySettings


@dataclasses.dataclass(frozen=True)
class LibraryDocument:
    """A text with pairs of keys and values in it; `starts` are where the keys stand."""

    document_id: str
    token_ids: Int[Tensor, " tokens"]
    keys: Int[Tensor, " pairs"]
    values: Int[Tensor, " pairs"]
    starts: Int[Tensor, " pairs"]


@dataclasses.dataclass(frozen=True)
class AskedWindow:
    """Questions about one document, the values that answer them, and where these stand in its text."""

    document_id: str
    questions: Int[Tensor, "questions tokens"]
    values: Int[Tensor, " questions"]
    places: Int[Tensor, " questions"]


def draw_library(
    task: RecallTask, settings: LibrarySettings, asking: Asking, generator: Generator
) -> list[LibraryDocument]:
    """Return the documents of a library.

    Asked as "shared", each document has keys of its own, and distractors have keys that no document has. Asked as
    "selected", a document's keys are drawn from all keys, and its distractors have the keys that it has not.
    """
    documents, num_pairs = settings.num_documents, settings.num_pairs
    taken = documents * num_pairs
    order = torch.randperm(task.num_keys, generator=generator)
    library = []
    for number in range(documents):
        if asking == "shared":
            keys, others = order[number * num_pairs : (number + 1) * num_pairs], order[taken:]
        else:
            order = torch.randperm(task.num_keys, generator=generator)
            keys, others = order[:num_pairs], order[num_pairs:]
        length = int(torch.randint(settings.min_tokens, settings.max_tokens + 1, (), generator=generator))
        passages = -(-length // PASSAGE)
        text = draw_text(task, passages, PASSAGE, generator, others.expand(passages, -1)).flatten()[:length]
        values = torch.randint(task.num_values, (num_pairs,), generator=generator) + task.num_keys
        starts = draw_starts(num_pairs, length, generator)
        write_pairs(text[None], starts, keys[None], values[None])
        library.append(LibraryDocument(f"document {number}", text, keys, values, starts))
    return library


def draw_stream(
    task: RecallTask, settings: LibrarySettings, library: list[LibraryDocument], generator: Generator
) -> list[AskedWindow]:
    """Return windows of questions; each is about one document, drawn from those that are asked about at all."""
    count = max(1, round(settings.asked_share * len(library)))
    asked = torch.randperm(len(library), generator=generator)[:count]
    stream = []
    for _ in range(settings.num_windows):
        document = library[int(asked[torch.randint(count, (), generator=generator)])]
        picks = torch.randperm(len(document.keys), generator=generator)[: settings.num_questions]
        questions = draw_questions(task, document.keys[picks], settings.words_before, generator)
        answers = document.starts[picks] + PAIR - 1
        stream.append(AskedWindow(document.document_id, questions, document.values[picks], answers))
    return stream
