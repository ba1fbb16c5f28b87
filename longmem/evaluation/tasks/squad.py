"""SQuAD v1.1 (Rajpurkar et al., 2016): questions about passages, after others with their answers; exact match and F1."""

import dataclasses
import json
import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longmem.data.sources import load_rows
from longmem.evaluation.settings import Count
from longmem.evaluation.systems import System
from longmem.evaluation.task import Axis, Item, Measure, Record
from longmem.evaluation.tasks.demonstrations import Demonstration, DemonstrationSettings, DemonstrationTask, Tokens
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
        parted_by = "article" if len({first.article for first, *_ in asked}) > 1 else "passage"
        units = list(dict.fromkeys(getattr(first, parted_by) for first, *_ in asked))
        chosen = set(random.Random(seed).sample(units, len(units) // 2))
        shown = [passage for passage in asked if getattr(passage[0], parted_by) in chosen]
        asked = [passage for passage in asked if getattr(passage[0], parted_by) not in chosen]
    else:
        shown = load_passages(demonstrations_data)
    texts = {first.passage for first, *_ in asked}
    return [passage for passage in shown if passage[0].passage not in texts], asked


def load_passages(name: str) -> list[Passage]:
    """Return the passages of a JSON file, or of a data set on the Hub whose split stands behind a colon."""
    path, _, split = name.rpartition(":")
    if name.endswith(".json"):
        rows: Iterable[dict[str, Any]] = rows_of(Path(name).expanduser())
    elif path and split:
        rows = load_rows(path, None, split)
    else:
        raise ValueError(f"`data` must be a .json file, or name:split as in rajpurkar/squad:validation, got {name!r}.")
    found: dict[tuple[str, str], Passage] = {}
    for row in rows:
        missing = [column for column in ("id", "title", "context", "question", "answers") if column not in row]
        if missing:
            raise ValueError(f"{name!r} must have the columns of SQuAD v1.1, got none called {', '.join(missing)}.")
        if not (answers := row["answers"]["text"]):
            raise ValueError(
                f"{name} must have an answer to every question, as SQuAD v1.1 has, got none for {row['id']!r}; leave it out."
            )
        passage = " ".join(row["context"].split("\n"))  # a line break ends an answer, and would end a passage
        asked = Asked(str(row["id"]), row["question"], tuple(answers), passage, row["title"])
        found.setdefault((row["title"], row["context"]), []).append(asked)
    if not found:
        raise ValueError(f"`data` must hold passages with questions, got none in {name}.")
    return list(found.values())


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the questions of a file in the format of SQuAD v1.1, as the rows of its data set."""
    with in_format("in the format of SQuAD v1.1 (data, paragraphs, context, qas, answers)", path):
        for number, article in enumerate(json.loads(read_text(path))["data"]):
            for paragraph in article["paragraphs"]:
                about = {"title": article.get("title", str(number)), "context": paragraph["context"]}
                for each in paragraph["qas"]:
                    yield {**each, **about, "answers": {"text": [answer["text"] for answer in each["answers"]]}}


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquadSettings(DemonstrationSettings):
    """Written answers to questions about passages; each demonstration is about a passage of its own."""

    data: str
    """JSON file that is evaluated; or a data set on the Hub with its split, as in rajpurkar/squad:validation."""

    demonstrations_data: str | None = None
    """The same, for demonstrations; None: half of the articles in `data`, drawn by `seed`, and the other half is asked."""

    demonstrations: Count = 3
    """Examples in the window: passage, question, answer. As many as fit beside the question are kept, the last ones."""

    memory_demonstrations: Count = 100
    """Further examples, in memory."""

    max_new_tokens: Count = 32
    """Of an answer, which ends at the first line break."""


class Squad(DemonstrationTask):
    """Written answers."""

    name, title, kind = "squad", "SQuAD", SquadSettings
    axes = (Axis("seed", "repeat"),)
    measures = {"f1": Measure("F1"), "exact match": Measure("exact match")}

    def __init__(self, settings: SquadSettings) -> None:
        super().__init__(settings, ("squad",))
        self.max_new_tokens = settings.max_new_tokens

    def score(self, record: Record) -> Mapping[str, float]:
        prediction, golds = record["prediction"], record["golds"]
        return {"f1": f1(prediction, golds), "exact match": exact_match(prediction, golds)}

    def load(self, name: str) -> tuple[list[Passage], list[Asked]]:
        own = self.settings
        shown, asked = load_parted(own.data, own.demonstrations_data, own.seed)
        if len(shown) < own.demonstrations + own.memory_demonstrations:
            raise ValueError(
                f"`demonstrations` and `memory_demonstrations` must be at most the passages to draw from, {len(shown)} "
                f"together, got {own.demonstrations} and {own.memory_demonstrations}; lower one, or take more data."
            )
        return shown, [each for passage in asked for each in passage]

    def draw(self, name: str, seed: int) -> tuple[list[Demonstration], list[Demonstration], random.Random]:
        """Return demonstrations about different passages, with one of its questions each."""
        generator, size = random.Random(seed), self.settings.demonstrations
        passages = generator.sample(self.examples[name][0], size + self.settings.memory_demonstrations)
        drawn = [generator.choice(passage).shown for passage in passages]
        return drawn[:size], drawn[size:], random.Random(seed)

    def items(self, name: str, chosen: Sequence[Asked], tokens: Tokens) -> Iterator[Item]:
        """Yield the questions behind their passages; intervals are over articles."""
        for number, asked in enumerate(chosen):
            about = {"group": asked.article, "number": number, "question": asked.id, "golds": list(asked.answers)}
            yield Item(name=str(number), token_ids=tokens(asked.prompt), about=about)

    def room_before(self, case: Any, item: Item) -> int:
        return case.room(item)

    def placed(self, system: System, case: Any, item: Item) -> dict[str, Any]:
        """Return how many demonstrations stood before the question."""
        return {"window_demonstrations": len(self.shown(system, case, case.room(item)))}


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """Return 1 if the prediction is one of the gold answers after normalisation, otherwise 0.

    >>> exact_match("The Denver Broncos.", ["Carolina", "denver broncos"])
    1.0
    """
    return float(normalized(prediction) in {normalized(gold) for gold in some(golds)})


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of words, 0 to 1, for the gold answer that fits best.

    As in SQuAD v1.1, two answers without any word, such as "the" and "a", share none: F1 is 0 where the match is exact.

    >>> f1("in the year 1066", ["1066"])
    0.5
    """
    said, best = normalized(prediction).split(), 0.0
    for gold in some(golds):
        words = normalized(gold).split()
        if shared := (Counter(said) & Counter(words)).total():
            precision, recall = shared / len(said), shared / len(words)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def normalized(answer: str) -> str:
    """Return an answer in lower case, without ASCII punctuation, the words a, an, the, and spare whitespace.

    >>> normalized("A  U.S. citizen")
    'us citizen'
    """
    plain = answer.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(?:an?|the)\b", " ", plain).split())


def some(golds: Sequence[str]) -> Sequence[str]:
    """Return the gold answers. Raises ValueError if there are none, or one text instead of a list."""
    if isinstance(golds, str) or not golds:
        raise ValueError(f"`golds` must be a list of at least one answer, got {golds!r}.")
    return golds
