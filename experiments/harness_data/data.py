"""Data of the tasks in `longmem/evaluation/configs/harness_tasks`, and of BABILong, from files of the published sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from longmem.evaluation.tasks.quality import Quality

BABILONG = tuple(f"babilong_qa{number}" for number in range(1, 21))
_SEPARATOR = re.compile(r"[\t|]")  # a copy of bAbI has bars for tabs


def quality_items(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the questions of QuALITY's own files, or of L-Eval's `quality.jsonl` (texts of 2,000 to 5,000 words).

    Raises:
        ValueError: the file is of another kind, or a question has no right option.
    """
    for number, document in enumerate(Quality.read(path)):
        for asked in document.asked:
            yield {
                "group": f"text {number}",
                "text": document.passages[0].strip(),
                "question": asked.question,
                "options": [" ".join(option.split()) for option in asked.options],
                "answer": asked.options.index(asked.answer),
            }


def babi_items(path: Path, filler: str = "", filler_words: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the questions of a bAbI file (`qa1_single-supporting-fact_test.txt`), each with the story up to it.

    Args:
        path: numbered sentences; a line with tabs (or bars) is a question, its answer and the sentences that tell.
        filler: another text, whose next words are spread between the sentences of each story.
        filler_words: so many words of it for each question, beginning anew at its end.

    Raises:
        ValueError: a line has no number, or there is no filler to take words from.
    """
    words = filler.split()
    if filler_words and not words:
        raise ValueError(f"`filler` must be a text to take {filler_words} words from, got none.")
    story: list[str] = []
    number, place = 0, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        index, _, rest = line.partition(" ")
        if not index.isdecimal():
            raise ValueError(f"{path} must be numbered sentences of bAbI, got {line!r}.")
        if index == "1":
            story, number = [], number + 1
        question, *answer = (part.strip() for part in _SEPARATOR.split(rest))
        if not answer:
            story.append(question)
            continue
        chosen = [words[(place + each) % len(words)] for each in range(filler_words)]
        place += filler_words
        text = " ".join(spread_between(story, chosen))
        yield {"group": f"story {number}", "text": text, "question": question, "answer": answer[0]}


def as_babilong(item: dict[str, Any]) -> dict[str, Any]:
    """Return a question of bAbI with the fields that lm-eval's tasks of BABILong read."""
    return {"group": item["group"], "input": item["text"], "question": item["question"], "target": item["answer"]}


def spread_between(sentences: Sequence[str], words: Sequence[str]) -> list[str]:
    """Return sentences with about the same number of words before each of them, and after the last.

    >>> spread_between(["Mary left.", "John came."], ["a", "b", "c"])
    ['a', 'Mary left.', 'b', 'John came.', 'c']
    """
    count = len(sentences) + 1
    ends = [number * len(words) // count for number in range(count + 1)]
    found: list[str] = []
    for number in range(count):
        found += words[ends[number] : ends[number + 1]]
        found += sentences[number : number + 1]
    return found


def write_items(path: Path, items: Iterable[dict[str, Any]]) -> int:
    """Write items as JSON lines and return how many they are.

    Raises:
        ValueError: there are none.
    """
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    if not lines:
        raise ValueError(f"`items` must be at least one for {path}, got none; is the source the right file?")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
