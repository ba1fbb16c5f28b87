"""Questions about passages in the format of SQuAD v1.1, and their parting into what is shown and what is asked."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longmem.data.sources import load_rows
from longmem.evaluation.tasks.demonstrations import Demonstration
from longmem.evaluation.tasks.files import in_format, read_text


class Asked(NamedTuple):
    """A question about a passage of an article, with its gold answers, at least one."""

    id: str
    question: str
    answers: tuple[str, ...]
    passage: str
    article: str

    @property
    def prompt(self) -> str:
        """Return passage and question, up to the answer."""
        return f"Passage: {self.passage}\nQuestion: {self.question}\nAnswer:"

    @property
    def shown(self) -> Demonstration:
        """Return passage, question and the first gold answer."""
        return Demonstration(self.prompt, f" {self.answers[0]}\n\n")


Passage = list[Asked]  # all questions about it, at least one


def load_parted(data: str, demonstrations_data: str | None, seed: int) -> tuple[list[Passage], list[Passage]]:
    """Return the passages that demonstrations are drawn from and those that are asked about, none in both.

    Without a file of demonstrations the articles are parted in two halves, drawn by `seed`; articles and not passages, since
    passages of one article answer each other's questions. Of a single article the passages are parted.
    """
    asked = load_passages(data)
    if demonstrations_data is None:
        units = [first.article for first, *_ in asked]
        if len(set(units)) == 1:
            units = [first.passage for first, *_ in asked]
        different = list(dict.fromkeys(units))
        chosen = set(random.Random(seed).sample(different, len(different) // 2))
        shown = [passage for passage, unit in zip(asked, units, strict=True) if unit in chosen]
        asked = [passage for passage, unit in zip(asked, units, strict=True) if unit not in chosen]
    else:
        shown = load_passages(demonstrations_data)
    texts = {first.passage for first, *_ in asked}
    return [passage for passage in shown if passage[0].passage not in texts], asked


def load_passages(name: str) -> list[Passage]:
    """Return the passages of a JSON file, or of a data set on the Hub whose split stands behind a colon."""
    if name.endswith(".json"):
        found = from_json(Path(name).expanduser())
    else:
        path, _, split = name.rpartition(":")
        if not path or not split:
            raise ValueError(
                "`data` must be a .json file or, for a data set, name:split as in rajpurkar/squad:validation, got "
                f"{name!r}."
            )
        found = from_rows(load_rows(path, None, split), name)
    if not found:
        raise ValueError(f"`data` must hold passages with questions, got none in {name}.")
    return found


def from_json(path: Path) -> list[Passage]:
    """Return the passages of a file in the format of SQuAD v1.1."""
    found = []
    with in_format("in the format of SQuAD v1.1 (data, paragraphs, context, qas, answers)", path):
        for number, article in enumerate(json.loads(read_text(path))["data"]):
            title = article.get("title", str(number))
            for paragraph in article["paragraphs"]:
                asked = [(each, [answer["text"] for answer in each["answers"]]) for each in paragraph["qas"]]
                found.append([_asked(*each, paragraph["context"], title, str(path)) for each in asked])
    return [passage for passage in found if passage]


def from_rows(rows: Any, name: str) -> list[Passage]:
    """Return the passages of rows with the columns id, title, context, question and answers, one for each question."""
    found: dict[tuple[str, str], Passage] = {}
    for row in rows:
        missing = [column for column in ("id", "title", "context", "question", "answers") if column not in row]
        if missing:
            raise ValueError(f"{name!r} must have the columns of SQuAD v1.1, got none called {', '.join(missing)}.")
        asked = _asked(row, row["answers"]["text"], row["context"], row["title"], name)
        found.setdefault((row["title"], row["context"]), []).append(asked)
    return list(found.values())


def _asked(row: Any, answers: Sequence[str], context: str, title: str, where: str) -> Asked:
    if not answers:
        raise ValueError(
            f"{where} must have an answer to every question, as SQuAD v1.1 has, got none for {row['id']!r}; leave out what "
            "cannot be answered."
        )
    # A line break ends an answer, and would end a passage.
    return Asked(str(row["id"]), row["question"], tuple(answers), " ".join(context.split("\n")), title)
