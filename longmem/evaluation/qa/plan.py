"""What is fed and asked, in tokens, so that every system sees the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from longmem.evaluation.qa.documents import Document, Item, choose_items
from longmem.evaluation.qa.locomo import locomo_prompt
from longmem.evaluation.qa.quality import quality_candidates, quality_prompt
from longmem.evaluation.qa.settings import QASettings
from longmem.evaluation.runs import digest
from longmem.evaluation.systems import Question
from longmem.model.modeling import LongMemForCausalLM


@dataclasses.dataclass(frozen=True)
class DocumentPlan:
    """A document in tokens, the questions that are asked about it, and how much of its end stays in the window."""

    document: Document
    items: Sequence[Item]
    passages: list[list[int]]
    questions: dict[str, Question]
    prefix: list[int]
    local_tokens: int

    @property
    def memorized(self) -> list[int]:
        """Return the tokens that are not in the window but in memory."""
        stream = [token for passage in self.passages for token in passage]
        return stream[: max(0, len(stream) - self.local_tokens)]


def plan_documents(
    model: LongMemForCausalLM, documents: Sequence[Document], settings: QASettings
) -> list[tuple[DocumentPlan, DocumentPlan | None]]:
    """Return the documents that are asked about, each with the one in its wrong memory: the next, after the last the first.

    Raises:
        ValueError: a question does not fit the window, or a wrong memory is wanted and there is a single document.
    """
    chosen = choose_items(documents, settings.limit)
    plans = [plan_document(model, document, items, settings) for document, items in chosen]
    if "wrong" not in settings.systems:
        return [(plan, None) for plan in plans]
    others = [*plans[1:], plans[0]]
    if len(plans) == 1:
        number = documents.index(chosen[0][0])
        if len(documents) == 1:
            raise ValueError(
                f"`systems` must be without wrong where the file has one document, got {list(settings.systems)}: there is "
                "no other that its memory could hold."
            )
        others = [plan_document(model, documents[(number + 1) % len(documents)], [], settings)]
    return list(zip(plans, others, strict=True))


def describe_plans(plans: Sequence[tuple[DocumentPlan, DocumentPlan | None]]) -> dict[str, str]:
    """Return digests of what is fed and asked, and of the wrong memories, for the configuration of a run."""
    asked = [[plan.document.passages, [dataclasses.asdict(item) for item in plan.items]] for plan, _ in plans]
    wrong = [other.document.passages for _, other in plans if other is not None]
    return {"documents": digest(asked), "wrong_documents": digest(wrong)}


def plan_document(
    model: LongMemForCausalLM, document: Document, items: Sequence[Item], settings: QASettings
) -> DocumentPlan:
    """Return a document in tokens.

    All its questions, asked or not, decide how much of its end stays in the window: a document is split between window and
    memory at one place, and encoded once.
    """

    def tokens(text: str) -> list[int]:
        return model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    questions = {}
    prefix = tokens(settings.prefix)
    left = settings.window
    for item in document.items:
        prompt, candidates = prompt_of(item, settings)
        question = Question(tokens(prompt), [tokens(candidate) for candidate in candidates])
        questions[item.item_id] = question
        room = max(question.room, 0 if item.options else len(question.token_ids) + settings.max_new_tokens)
        left = min(left, settings.window - len(prefix) - room)
        if left < 1:
            raise ValueError(
                f"`window` must hold instruction, question, answer and one token before them, got {settings.window} tokens "
                f"for the {len(prefix) + room} of question {item.item_id}; choose a larger `window`."
            )
    passages = [tokens(passage) for passage in document.passages]
    return DocumentPlan(document, items, passages, questions, prefix, min(settings.local_tokens, left))


def prompt_of(item: Item, settings: QASettings) -> tuple[str, list[str]]:
    """Return what is asked, and the continuations whose likelihood is measured, the right answer among them."""
    if item.options:
        return quality_prompt(item, settings.style), quality_candidates(item, settings.style)
    return locomo_prompt(item), [f" {answer}" for answer in (item.answer, item.trap) if answer]
