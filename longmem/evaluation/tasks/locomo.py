"""LoCoMo: questions about months of conversation in dated sessions (Maharana et al. 2024; github.com/snap-research/locomo).

Scores follow its `task_eval/evaluation.py` (commit 9228632) but for the words: they are normalized as SQuAD does, without
stems, so that numbers differ a little from published ones.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longmem.evaluation.settings import Count
from longmem.evaluation.task import Axis, Measure, Record, per_token
from longmem.evaluation.tasks.files import in_format, read_text
from longmem.evaluation.tasks.reading import Asked, Document, ReadingSettings, ReadingTask
from longmem.evaluation.tasks.squad import exact_match, f1

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
MULTI_HOP, ADVERSARIAL = CATEGORIES[1], CATEGORIES[5]
REFUSAL = "Not mentioned in the conversation"  # the option that LoCoMo offers beside the trap
REFUSALS = ("not mentioned", "no information available")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocomoSettings(ReadingSettings):
    """Written answers about conversations; `data` is locomo10.json."""

    max_new_tokens: Count = 32
    """Of a written answer, which ends with the line."""


class Locomo(ReadingTask):
    """Written answers, by category, and the likelihood of the right answers to questions that can be answered."""

    name, title, kind = "locomo", "LoCoMo", LocomoSettings
    axes = (Axis("category", values=tuple(CATEGORIES.values())),)
    measures = {
        "f1": Measure("F1"),
        "exact match": Measure("exact match"),
        "likelihood": Measure("log-likelihood of right answers", "nats per token"),
    }

    def __init__(self, settings: LocomoSettings, documents: Any = None) -> None:
        super().__init__(settings, documents)
        self.max_new_tokens = settings.max_new_tokens

    def score(self, record: Record) -> Mapping[str, float]:
        said = record["prediction"], record["gold"], record["category"]
        found = {"f1": locomo_f1(*said), "exact match": locomo_exact_match(*said)}
        if "logprobs" in record and record["category"] != ADVERSARIAL:
            found["likelihood"] = per_token(record)[0]
        return found

    def prompt(self, asked: Asked) -> str:
        return f"\nQuestion: {asked.question}\nAnswer:"

    def candidates(self, asked: Asked) -> list[str]:
        """Return the right answer, and the trap if there is one."""
        return [f" {answer}" for answer in (asked.answer, asked.trap) if answer]

    @staticmethod
    def read(path: Path) -> list[Document]:
        """Return the conversations of a file, a passage for each turn, with the questions about them."""
        with in_format("a list of conversations with sample_id, conversation and qa, as in locomo10.json", path):
            return [
                Document(row["sample_id"], tuple(turns(row["conversation"])), tuple(questions(row["qa"])))
                for row in json.loads(read_text(path))
            ]


def turns(sessions: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each turn, in order. Each has the date, without which a retrieved turn could answer no "when"."""
    names = [name for name, value in sessions.items() if name.startswith("session_") and isinstance(value, list)]
    for name in sorted(names, key=lambda name: int(name.removeprefix("session_"))):
        date = sessions[f"{name}_date_time"]
        for turn in sessions[name]:
            photo = f" [shares {turn['blip_caption']}]" if turn.get("blip_caption") else ""
            yield f"[{date}] {turn['speaker']}: {turn['text']}{photo}\n"


def questions(rows: Sequence[Mapping[str, Any]]) -> Iterator[Asked]:
    """Yield the questions about a conversation."""
    for number, row in enumerate(rows, start=1):
        category = CATEGORIES[row["category"]]
        answer = REFUSAL if category == ADVERSARIAL else str(row["answer"])  # years are numbers
        if category == CATEGORIES[3]:
            answer = answer.partition(";")[0]  # what follows are reasons
        trap = str(row.get("adversarial_answer", ""))
        yield Asked(name=str(number), question=row["question"], answer=answer.strip(), category=category, trap=trap)


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
