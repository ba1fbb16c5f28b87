"""Questions about passages in the format of SQuAD v1.1: loading, the parting of what is asked from what is shown."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longmem.evaluation.in_context.hub import load_rows
from longmem.evaluation.in_context.settings import SquadSettings

TEMPLATE = "Passage: {}\nQuestion: {}\nAnswer: {}\n\n"


@dataclasses.dataclass(frozen=True)
class PassageQuestion:
    """A question with its gold answers, at least one."""

    id: str
    question: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Passage:
    """A paragraph of an article, and the questions about it, at least one."""

    title: str
    context: str
    questions: tuple[PassageQuestion, ...]

    def line(self, asked: PassageQuestion) -> str:
        """Return a demonstration: passage, question and its first gold answer."""
        return TEMPLATE.format(self.context, asked.question, asked.answers[0])

    def query(self, asked: PassageQuestion) -> str:
        """Return a demonstration up to its answer."""
        return TEMPLATE.partition(" {}\n\n")[0].format(self.context, asked.question)


def load_parted(settings: SquadSettings, seed: int) -> tuple[list[Passage], list[Passage]]:
    """Return the passages that demonstrations are drawn from and those that are asked about, none in both.

    Without a file of demonstrations the articles are parted in two halves; articles and not passages, since passages of
    one article answer each other's questions.
    """
    evaluated = load_passages(str(settings.data))
    if settings.demonstrations_data is None:
        demonstrations, evaluated = parted(evaluated, seed)
    else:
        demonstrations = load_passages(settings.demonstrations_data)
    asked = {passage.context for passage in evaluated}
    demonstrations = [passage for passage in demonstrations if passage.context not in asked]
    needed = settings.demonstrations + settings.memory_demonstrations
    if len(demonstrations) < needed:
        raise ValueError(
            f"`squad.demonstrations` and `squad.memory_demonstrations` must be at most the passages to draw from, "
            f"{len(demonstrations)} together, got {settings.demonstrations} and {settings.memory_demonstrations}; lower "
            "one, or name a larger `squad.demonstrations_data`."
        )
    return demonstrations, evaluated


def parted(passages: Sequence[Passage], seed: int) -> tuple[list[Passage], list[Passage]]:
    """Return the passages of half of the articles, drawn by `seed`, and the others; of half the passages of one article."""
    units = list(dict.fromkeys(passage.title for passage in passages))
    by_title = len(units) > 1
    if not by_title:
        units = list(dict.fromkeys(passage.context for passage in passages))
    shown = set(random.Random(seed).sample(units, len(units) // 2))
    first: list[Passage] = []
    second: list[Passage] = []
    for passage in passages:
        (first if (passage.title if by_title else passage.context) in shown else second).append(passage)
    return first, second


def draw(passages: Sequence[Passage], seed: int, window: int, memory: int) -> tuple[list[str], list[str]]:
    """Return demonstrations for the window and for memory: different passages, with one of its questions each."""
    generator = random.Random(seed)
    lines = [
        passage.line(generator.choice(passage.questions)) for passage in generator.sample(passages, window + memory)
    ]
    return lines[:window], lines[window:]


def load_passages(name: str) -> list[Passage]:
    """Return the passages of a JSON file, or of a data set on the Hub whose split stands behind a colon."""
    if name.endswith(".json"):
        return from_json(Path(name).expanduser())
    path, colon, split = name.rpartition(":")
    if not colon or not path or not split:
        raise ValueError(
            f"`squad.data` must be a .json file or, for a data set, name:split as in rajpurkar/squad:validation, got {name!r}."
        )
    return from_rows(load_rows(path, None, split), name)


def from_json(path: Path) -> list[Passage]:
    """Return the passages of a file in the format of SQuAD v1.1."""
    if not path.is_file():
        raise ValueError(
            f"`squad.data` must be a file in the format of SQuAD v1.1, got {str(path)!r}, which is no file."
        )
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        return _some(
            [
                _passage(article.get("title", str(number)), paragraph["context"], paragraph["qas"], str(path))
                for number, article in enumerate(articles)
                for paragraph in article["paragraphs"]
                if paragraph["qas"]
            ],
            str(path),
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} must have the format of SQuAD v1.1: data, paragraphs, context, qas, answers; got {error!r}."
        ) from error


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
        raise ValueError(f"`squad.data` must hold passages with questions, got none in {where}.")
    return passages
