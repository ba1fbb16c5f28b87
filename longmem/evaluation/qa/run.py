"""The run: every document is fed to every system once, and all its questions are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from longmem.evaluation.qa.documents import Item
from longmem.evaluation.qa.plan import DocumentPlan
from longmem.evaluation.qa.settings import QASettings
from longmem.evaluation.runs import RunFolder
from longmem.evaluation.systems import Answer, Banks, RetrievalSystem, System, make_systems
from longmem.evaluation.systems.system import text_before
from longmem.model.modeling import LongMemForCausalLM

# Written down together: what a stopped run may lose. All that are asked together share one run of the local context.
ASKED_AT_ONCE = 32


def evaluate_qa(
    model: LongMemForCausalLM,
    plans: Sequence[tuple[DocumentPlan, DocumentPlan | None]],
    settings: QASettings,
    run: RunFolder,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Ask all questions of all systems, and write a record for each pair; those in the folder are not asked again.

    A record has "prediction" (written answers) and, for each candidate, "logprobs", the log-likelihood in nats, and
    "tokens". "seconds" are those of answering, "preparing_seconds" and "encoded_tokens" a question's share of what the
    document cost: LongMem's systems share banks, so the one that first needs a document pays for it.

    Args:
        model: is asked.
        plans: of `plan_documents`.
        settings: of the run.
        run: gets the records.
        progress: called with (pairs of question and system done, pairs in all).
    """
    total = len(settings.systems) * sum(len(plan.items) for plan, _ in plans)
    done = sum(record_id(item, name) in run for plan, _ in plans for item in plan.items for name in settings.systems)
    banks = Banks(model)
    for plan, other in plans:
        options: dict[str, Any] = {"local_tokens": plan.local_tokens, "batch_size": settings.batch_size, "banks": banks}
        for system in make_systems(settings.systems, model, window=settings.window, **options):
            left = [item for item in plan.items if record_id(item, system.name) not in run]
            if not left:
                continue
            if isinstance(system, RetrievalSystem):
                system.query_tokens = None  # passages for the question, whatever the document ends with
            system.read(plan.passages, instead=[] if other is None else [other.memorized])
            for start in range(0, len(left), ASKED_AT_ONCE):
                items = left[start : start + ASKED_AT_ONCE]
                run.write(ask(system, plan, items, settings, banks))
                done += len(items)
                if progress is not None:
                    progress(done, total)


def record_id(item: Item, system: str) -> str:
    """Return the id of a record."""
    return f"{item.item_id}/{system}"


def ask(
    system: System, plan: DocumentPlan, items: Sequence[Item], settings: QASettings, banks: Banks
) -> Iterator[dict[str, Any]]:
    """Yield a record for each question to a system that has read the document."""
    before = (system.answering_seconds, system.preparing_seconds, banks.encoded_tokens)
    questions = [plan.questions[item.item_id] for item in items]
    written: Iterable[str | None] = [None] * len(items)
    if settings.task == "locomo":
        queries = [question.token_ids for question in questions]
        ids = system.generate(queries, plan.prefix, max_new_tokens=settings.max_new_tokens)
        written = [
            text_before(str(system.model.tokenizer.decode(each, skip_special_tokens=True)), ("\n",)) for each in ids
        ]
    answers = system.score(questions, plan.prefix)
    after = (system.answering_seconds, system.preparing_seconds, banks.encoded_tokens)
    names = ("seconds", "preparing_seconds", "encoded_tokens")
    costs = {name: (end - start) / len(items) for name, start, end in zip(names, before, after, strict=True)}
    for item, prediction, answer in zip(items, written, answers, strict=True):
        yield {
            **describe_item(item, plan.document.document_id, system.name, prediction),
            **_likelihoods(answer),
            **costs,
        }


def describe_item(item: Item, document: str, system: str, prediction: str | None) -> dict[str, Any]:
    """Return what a record says of question and answer."""
    record: dict[str, Any] = {
        "id": record_id(item, system),
        "document": document,
        "item": item.item_id,
        "system": system,
    }
    record |= {"question": item.question, "gold": item.answer}
    record |= {"options": list(item.options)} if item.options else {"category": item.category, "trap": item.trap}
    return record if prediction is None else {**record, "prediction": prediction}


def _likelihoods(answer: Answer) -> dict[str, Any]:
    return {
        "logprobs": [each.total for each in answer.candidates],
        "tokens": [len(each.logprobs) for each in answer.candidates],
    }
