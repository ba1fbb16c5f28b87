"""LoCoMo: questions about months of conversation in dated sessions (Maharana et al. 2024; github.com/snap-research/locomo).

Scores follow its `task_eval/evaluation.py` (commit 9228632) but for the words: they are normalized as SQuAD does, without
stems, so that numbers differ a little from published ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longmem.evaluation.qa.documents import Document, Item, read_file
from longmem.evaluation.squad import exact_match, f1

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
MULTI_HOP, ADVERSARIAL = CATEGORIES[1], CATEGORIES[5]
REFUSAL = "Not mentioned in the conversation"  # the option that LoCoMo offers beside the trap
REFUSALS = ("not mentioned", "no information available")


def read_locomo(path: Path) -> list[Document]:
    """Return the conversations of a file, a passage for each turn, with the questions about them.

    Raises:
        ValueError: the file is not LoCoMo's.
    """
    try:
        rows = json.loads(read_file(path))
        return [_conversation(row) for row in rows]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`data` must be a list of conversations with sample_id, conversation and qa, as in locomo10.json; {path} is "
            f"none: {type(error).__name__} {error}."
        ) from error


def _conversation(row: Mapping[str, Any]) -> Document:
    name = row["sample_id"]
    items = [_item(f"{name}/{number}", each) for number, each in enumerate(row["qa"], start=1)]
    return Document(name, tuple(_turns(row["conversation"])), tuple(items))


def _turns(conversation: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each turn, in order. Each has the date, without which a retrieved turn could answer no "when"."""
    names = [name for name, value in conversation.items() if name.startswith("session_") and isinstance(value, list)]
    for name in sorted(names, key=lambda name: int(name.removeprefix("session_"))):
        date = conversation[f"{name}_date_time"]
        for turn in conversation[name]:
            photo = f" [shares {turn['blip_caption']}]" if turn.get("blip_caption") else ""
            yield f"[{date}] {turn['speaker']}: {turn['text']}{photo}\n"


def _item(item_id: str, row: Mapping[str, Any]) -> Item:
    category = CATEGORIES[row["category"]]
    if category == ADVERSARIAL:
        answer = REFUSAL
    else:
        answer = str(row["answer"])  # years are numbers
    if category == CATEGORIES[3]:
        answer = answer.partition(";")[0]  # what follows are reasons
    trap = str(row.get("adversarial_answer", ""))
    return Item(item_id=item_id, question=row["question"], answer=answer.strip(), category=category, trap=trap)


def locomo_prompt(item: Item) -> str:
    """Return what is asked after the conversation."""
    return f"\nQuestion: {item.question}\nAnswer:"


def is_refusal(text: str) -> bool:
    """Return whether an answer says that the conversation does not tell.

    >>> [is_refusal(text) for text in ("It is not mentioned.", "No information available", "No")]
    [True, True, False]
    """
    return any(refusal in text.lower() for refusal in REFUSALS)


def locomo_f1(prediction: str, answer: str, category: str) -> float:
    """Return the F1 of an answer, 0 to 1: of adversarial questions whether it refuses, of multi-hop questions by parts.

    The parts of a multi-hop answer are separated by commas; each counts the best F1 of any part of the prediction.

    >>> locomo_f1("Rome, the old harbour", "harbour, Paris", MULTI_HOP)  # 2/3 for the harbour, 0 for Paris
    0.3333333333333333
    """
    if category == ADVERSARIAL:
        return float(is_refusal(prediction))
    if category == MULTI_HOP:
        parts = answer.split(",")
        return sum(max(f1(said, [part]) for said in prediction.split(",")) for part in parts) / len(parts)
    return f1(prediction, [answer])


def locomo_exact_match(prediction: str, answer: str, category: str) -> float:
    """Return 1 for the answer itself, of adversarial questions for any refusal, else 0."""
    return float(is_refusal(prediction)) if category == ADVERSARIAL else exact_match(prediction, [answer])
