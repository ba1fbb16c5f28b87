"""Questions about passages in the format of SQuAD v1.1, and their parting into what is shown and what is asked."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longmem.data.rows import load_rows
from longmem.evaluation.tasks.demonstrations import Demonstration


class PassageQuestion(NamedTuple):
    """A question with its gold answers, at least one."""

    id: str
    question: str
    answers: tuple[str, ...]


class Passage(NamedTuple):
    """A paragraph of an article, and the questions about it, at least one."""

    title: str
    context: str
    questions: tuple[PassageQuestion, ...]

    def prompt(self, asked: PassageQuestion) -> str:
        """Return the passage and a question, up to the answer."""
        return f"Passage: {self.context}\nQuestion: {asked.question}\nAnswer:"

    def shown(self, asked: PassageQuestion) -> Demonstration:
        """Return passage, question and the first gold answer."""
        return Demonstration(self.prompt(asked), f" {asked.answers[0]}\n\n")


def load_parted(data: str, demonstrations_data: str | None, seed: int) -> tuple[list[Passage], list[Passage]]:
    """Return the passages that demonstrations are drawn from and those that are asked about, none in both.

    Without a file of demonstrations the articles are parted in two halves; articles and not passages, since passages of
    one article answer each other's questions.
    """
    asked = load_passages(data)
    if demonstrations_data is None:
        shown, asked = parted(asked, seed)
    else:
        shown = load_passages(demonstrations_data)
    contexts = {passage.context for passage in asked}
    return [passage for passage in shown if passage.context not in contexts], asked


def parted(passages: Sequence[Passage], seed: int) -> tuple[list[Passage], list[Passage]]:
    """Return the passages of half of the articles, drawn by `seed`, and the others; of half the passages of one article."""
    by_title = len({passage.title for passage in passages}) > 1
    units = [passage.title if by_title else passage.context for passage in passages]
    different = list(dict.fromkeys(units))
    shown = set(random.Random(seed).sample(different, len(different) // 2))
    first = [passage for passage, unit in zip(passages, units, strict=True) if unit in shown]
    return first, [passage for passage, unit in zip(passages, units, strict=True) if unit not in shown]


def load_passages(name: str) -> list[Passage]:
    """Return the passages of a JSON file, or of a data set on the Hub whose split stands behind a colon.

    Raises:
        ValueError: there is no such file or data set, or it has another format.
    """
    if name.endswith(".json"):
        return from_json(Path(name).expanduser())
    path, colon, split = name.rpartition(":")
    if not colon or not path or not split:
        raise ValueError(
            f"`data` must be a .json file or, for a data set, name:split as in rajpurkar/squad:validation, got {name!r}."
        )
    return from_rows(load_rows(path, None, split), name)


def from_json(path: Path) -> list[Passage]:
    """Return the passages of a file in the format of SQuAD v1.1."""
    if not path.is_file():
        raise ValueError(f"`data` must be a file in the format of SQuAD v1.1, got {str(path)!r}, which is no file.")
    try:
        found = [
            _passage(article.get("title", str(number)), paragraph["context"], paragraph["qas"], str(path))
            for number, article in enumerate(json.loads(path.read_text(encoding="utf-8"))["data"])
            for paragraph in article["paragraphs"]
            if paragraph["qas"]
        ]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} must have the format of SQuAD v1.1: data, paragraphs, context, qas, answers; got {error!r}."
        ) from error
    return _some(found, str(path))


def from_rows(rows: Any, name: str) -> list[Passage]:
    """Return the passages of rows with the columns id, title, context, question and answers, one for each question."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        missing = [column for column in ("id", "title", "context", "question", "answers") if column not in row]
        if missing:
            raise ValueError(f"{name!r} must have the columns of SQuAD v1.1, got none called {', '.join(missing)}.")
        answers = [{"text": text} for text in row["answers"]["text"]]
        asked = {"id": row["id"], "question": row["question"], "answers": answers}
        found.setdefault((row["title"], row["context"]), []).append(asked)
    return _some([_passage(title, context, asked, name) for (title, context), asked in found.items()], name)


def _passage(title: str, context: str, asked: Sequence[Mapping[str, Any]], where: str) -> Passage:
    questions = []
    for each in asked:
        answers = tuple(answer["text"] for answer in each["answers"])
        if not answers:
            raise ValueError(
                f"{where} must have an answer to every question, as SQuAD v1.1 has, got none for {each['id']!r}; leave out "
                "what cannot be answered."
            )
        questions.append(PassageQuestion(str(each["id"]), each["question"], answers))
    # A line break ends an answer, and would end a passage.
    return Passage(title, " ".join(context.split("\n")), tuple(questions))


def _some(passages: list[Passage], where: str) -> list[Passage]:
    if not passages:
        raise ValueError(f"`data` must hold passages with questions, got none in {where}.")
    return passages
