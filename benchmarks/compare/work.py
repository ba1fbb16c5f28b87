"""The kinds of work on which systems are compared: tasks of the package, asked without writing answers."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longmem.evaluation.task import Task


@dataclasses.dataclass(frozen=True)
class Work:
    """A kind of work: its task, made from (data, tokens of a text, window), and which of its measures is told.

    `measure`: of the task's. `data`: what must be given for it, None for nothing. `unit`: "%" or "nats per token".
    """

    title: str
    make: Callable[[str, int, int], Task]
    measure: str
    data: str | None = None
    unit: str = "%"
    items_of_case: int = 2


def common(window: int) -> dict[str, Any]:
    """Return settings that all tasks share; the systems are others than theirs."""
    return {"output": "unused", "window": window, "systems": ("off",)}


def recall(data: str, size: int, window: int) -> Task:
    """Return the task of facts far back in a text."""
    from longmem.evaluation.tasks.facts import Facts, FactsSettings

    source = data or "python-manual"
    sizes = {"sizes": (size,), "depths": (0.0, 0.5, 1.0), "items": 20, "generate": False}
    return Facts(FactsSettings(tasks=("passkey", "needle"), haystack=source, **sizes, **common(window)))


def dated(kinds: tuple[str, ...]) -> Callable[[str, int, int], Task]:
    """Return what makes the task of dated texts with these kinds of questions."""

    def make(data: str, size: int, window: int) -> Task:
        from longmem.evaluation.tasks.dated import Dated, DatedSettings

        facts = "continuation" not in kinds
        scored = min(64, window // 8)
        own = {"num_texts": 4 if facts else 10, "tokens_per_text": size // 2 if facts else 2 * size, "generate": False}
        own |= {"continuation_tokens": scored, "local_tokens": window - scored - 1}
        return Dated(DatedSettings(data=data or "installed", kinds=kinds, **own, **common(window)))  # type: ignore[arg-type]

    return make


def longeval(data: str, size: int, window: int) -> Task:
    """Return the task of the first topic in a long record."""
    from longmem.evaluation.tasks.longeval import LongEval, LongEvalSettings

    return LongEval(LongEvalSettings(data=data, tasks=("topics",), generate=False, **common(window)))


def in_context(data: str, size: int, window: int) -> Task:
    """Return the task of labels after demonstrations, of about 25 tokens each."""
    from longmem.evaluation.tasks.labelled import Labelled, LabelledSettings

    shown = {"seeds": (1,), "demonstrations": 4, "memory_demonstrations": max(8, size // 25)}
    return Labelled(LabelledSettings(data=data, sets=("sst-2",), limit=60, **shown, **common(window)))


def quality(data: str, size: int, window: int) -> Task:
    """Return the task of multiple choice on stories."""
    from longmem.evaluation.tasks.quality import Quality, QualitySettings

    return Quality(QualitySettings(data=data, local_tokens=window // 4, **common(window)))


def babi(data: str, size: int, window: int) -> Task:
    """Return bAbI's questions with their stories at the start of a long text, as multiple choice among its answers."""
    from longmem.data.sample_texts import python_manual
    from longmem.evaluation.tasks.quality import Quality, QualitySettings
    from longmem.evaluation.tasks.reading import Asked, Document

    stories, lines, answers = [], [], set()
    for line in Path(data).read_text(encoding="utf-8").splitlines():
        number, _, text = line.partition(" ")
        lines = [] if number == "1" else lines
        if "\t" in text or "?" in text:
            question, answer = (part.strip() for part in text.replace("\t", "|").split("|")[:2])
            answers.add(answer)
            stories.append((tuple(lines), question, answer))
        else:
            lines = [*lines, text]
    options, filler = tuple(sorted(answers)), python_manual()
    documents = []
    for number, (story, question, answer) in enumerate(stories[::7]):
        start = 997 * number % (len(filler) // 2)
        passages = ("\n".join(story) + "\n\n", filler[start : start + 4 * size])
        asked = Asked(name="question", question=question, answer=answer, options=options)
        documents.append(Document(str(number), passages, (asked,)))
    settings = QualitySettings(data=data, local_tokens=window // 4, **common(window))
    return Quality(settings, documents)


def locomo(data: str, size: int, window: int) -> Task:
    """Return LoCoMo's questions whose evidence is in the first sessions of a conversation, as many as `size` tokens hold."""
    from longmem.evaluation.tasks.locomo import Locomo, LocomoSettings

    rows = []
    for row in json.loads(Path(data).read_text(encoding="utf-8")):
        talk, kept, room = row["conversation"], {}, 4 * size
        for number in range(1, 100):
            session = talk.get(f"session_{number}")
            if session is None or (room := room - sum(len(turn["text"]) + 40 for turn in session)) < 0:
                break
            kept |= {name: talk[name] for name in (f"session_{number}", f"session_{number}_date_time")}
        seen = {turn["dia_id"] for name, session in kept.items() if isinstance(session, list) for turn in session}
        asked = [each for each in row["qa"] if each["category"] in (1, 2, 4) and each["evidence"]]
        asked = [each for each in asked if set(each["evidence"]) <= seen]
        if asked:
            rows.append({"sample_id": row["sample_id"], "conversation": kept, "qa": asked})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "locomo.json")
        path.write_text(json.dumps(rows), encoding="utf-8")
        return Locomo(LocomoSettings(data=str(path), local_tokens=window // 4, **common(window)))


WORK = {
    "recall": Work("recall of a fact", recall, "accuracy"),
    "notes": Work("questions about dated notes", dated(("version", "latest")), "accuracy"),
    "technical": Work("technical text", dated(("continuation",)), "likelihood", unit="nats per token"),
    "books": Work("books", dated(("continuation",)), "likelihood", "folder of books", "nats per token"),
    "in-context": Work(
        "many-shot labels (SST-2)", in_context, "label words", "LongMem's files of classification sets", "%", 10
    ),
    "babi": Work("bAbI, stories in long text", babi, "per token", "a file of bAbI"),
    "longeval": Work("LongEval, topics", longeval, "accuracy", "folder of LongEval"),
    "locomo": Work("LoCoMo, first sessions", locomo, "likelihood", "locomo10.json", "nats per token", 5),
    "quality": Work("QuALITY", quality, "per token", "quality.jsonl", "%", 5),
}
