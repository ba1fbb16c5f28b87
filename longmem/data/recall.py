"""Recall to train on, made from any text: facts are hidden in it, and asked for further on.

A document with facts and questions is a text like any other, so a training run needs to know nothing of it: when a question
comes, the fact has left the window and is in memory. All words are the text's own but for those of the sentences below, which
no evaluation of this package uses.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

PROPERTIES = ("password", "room", "telephone number", "ticket", "account", "shelf", "favourite word", "secret", "seat")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November")
LINES = ("{key} = {value}", "{key} -> {value}", "[{key}] {value}", "{key} is {value}", "{key}, {value}")
ITEMS = 6  # things that can be asked for, in what is hidden at one place
WORDS_OF_QUOTE = 7
CHARACTERS_BETWEEN_FACTS = 3_000  # some 700 tokens
FACTS_BETWEEN_QUESTIONS = 4
SHARE_OF_OLD = 0.4  # of the questions: about facts that were asked for before, so far back as the document goes
SHARE_ALONE = 0.25  # of the questions: between paragraphs, and not in a block of questions
SHARE_OF_CHATS = 0.4  # of the blocks of questions, where there is a chat format
NEW_LINES = "\n\n"
FORMAT = 1  # raise it when the same text gets other facts or questions

Turns = Sequence[tuple[str, str]]


class Question(NamedTuple):
    """What is asked, how the answer begins, and the answer; the last two stand so in the fact, with a space between."""

    ask: str
    cue: str
    answer: str

    @property
    def plain(self) -> str:
        """Return question and answer as running text."""
        return f"{self.ask} {self.cue} {self.answer}".strip()


class Facts(NamedTuple):
    """A few facts of one kind, as they stand in a text, and what can be asked about them."""

    text: str
    questions: list[Question]


class FactMaker:
    """A maker of facts from the words of a text.

    >>> facts = FactMaker("It was the best of times, and Charles went to London with Lucie. " * 9).draw(random.Random(1))
    >>> all(f"{question.cue} {question.answer}" in facts.text for question in facts.questions), len(facts.questions)
    (True, 6)
    """

    def __init__(self, text: str) -> None:
        words = set(re.findall(r"\b[A-Za-z]{3,10}\b", text))
        self.names = sorted(word for word in words if word.istitle()) or ["Alice", "Robert", "Clara"]
        self.words = sorted(word for word in words if word.islower()) or ["first", "second", "third"]
        self.running = text.split() or self.words

    def draw(self, generator: random.Random) -> Facts:
        """Return facts of a random kind."""
        kinds: tuple[Callable[[random.Random], Facts], ...] = (
            self._lines,
            self._properties,
            self._letters,
            self._dates,
        )
        return generator.choices(kinds, weights=(3, 2, 1, 1))[0](generator)

    def _lines(self, generator: random.Random) -> Facts:
        form, joint = generator.choice(LINES), generator.choice(("-", "_", " "))
        keys = [f"{generator.choice(self.words)}{joint}{generator.choice(self.words)}" for _ in range(ITEMS)]
        ask = generator.choice(("Look up {key}:", "What is given for {key}?", "Find {key}."))
        cues = [form.format(key=key, value="").rstrip() for key in keys]
        return self._facts([ask.format(key=key) for key in keys], cues, self._values(generator), "\n", "")

    def _properties(self, generator: random.Random) -> Facts:
        names, kind = self._names(generator), generator.choice(PROPERTIES)
        ask = generator.choice(("Tell me {name}'s {kind}.", "What is {name}'s {kind}?"))
        asks = [ask.format(name=name, kind=kind) for name in names]
        cues = [f"{name}'s {kind} is" for name in names]
        return self._facts(asks, cues, self._values(generator), generator.choice((" ", "\n")), ".")

    def _letters(self, generator: random.Random) -> Facts:
        names = self._names(generator)
        starts = [generator.randrange(max(len(self.running) - WORDS_OF_QUOTE, 1)) for _ in names]
        answers = [" ".join(self.running[start : start + WORDS_OF_QUOTE]).strip(".,;:") for start in starts]
        cues = [f"{name} wrote in a letter:" for name in names]
        return self._facts([f"What did {name} write?" for name in names], cues, answers, "\n", ".")

    def _dates(self, generator: random.Random) -> Facts:
        names = self._names(generator)
        answers = [
            f"{generator.randint(1, 28)} {generator.choice(MONTHS)} {generator.randint(1500, 2000)}" for _ in names
        ]
        cues = [f"{name} was born on" for name in names]
        return self._facts([f"When was {name} born?" for name in names], cues, answers, " ", ".")

    def _facts(self, asks: list[str], cues: list[str], answers: list[str], between: str, end: str) -> Facts:
        questions = [Question(*parts) for parts in zip(asks, cues, answers, strict=True)]
        # Of two with the same cue nobody could say which answer is right.
        different = list({question.cue: question for question in questions}.values())
        return Facts(between.join(f"{each.cue} {each.answer}{end}" for each in different), different)

    def _names(self, generator: random.Random) -> list[str]:
        return [f"{generator.choice(self.names)} {generator.choice(self.names)}" for _ in range(ITEMS)]

    def _values(self, generator: random.Random) -> list[str]:
        kind = generator.randrange(3)
        if kind == 0:
            return [str(generator.randint(100, 9_999_999)) for _ in range(ITEMS)]
        return [" ".join(generator.choices(self.words, k=kind)) for _ in range(ITEMS)]


def hide_and_ask(text: str, share: float, generator: random.Random, chat: Callable[[Turns], str] | None = None) -> str:
    """Return the text with facts hidden between its paragraphs, and questions about them further on.

    Args:
        text: the text.
        share: of the result that is questions and answers, about; below 1.
        generator: draws facts, places and questions.
        chat: writes questions and answers as a conversation; None: all stand as running text.
    """
    maker, known = FactMaker(text), list[Question]()
    fresh: list[Question] = []
    parts: list[str] = []
    since_fact = hidden = owed = 0
    for paragraph in paragraphs(text):
        parts.append(paragraph)
        since_fact += len(paragraph)
        owed += len(paragraph)
        if since_fact < CHARACTERS_BETWEEN_FACTS:
            continue
        facts = maker.draw(generator)
        parts.append(f"{'' if paragraph.endswith(NEW_LINES) else NEW_LINES}{facts.text}{NEW_LINES}")
        fresh += facts.questions
        since_fact, hidden = 0, hidden + 1
        if known and generator.random() < SHARE_ALONE:
            parts.append(generator.choice(known).plain + NEW_LINES)
        if hidden % FACTS_BETWEEN_QUESTIONS == 0:
            wanted = int(owed * share / (1 - share))
            asked = list(drawn(fresh, known, wanted, generator))
            if chat is not None and generator.random() < SHARE_OF_CHATS:
                parts.append(chat([(each.ask, f"{each.cue} {each.answer}") for each in asked]) + NEW_LINES)
            else:
                parts.append("\n".join(each.plain for each in asked) + NEW_LINES)
            known += fresh
            fresh, owed = [], 0
    return "".join(parts)


def paragraphs(text: str) -> Iterator[str]:
    """Yield the text in pieces that end with an empty line, or, where there is none for long, with a space.

    >>> list(paragraphs("One.\\n\\nTwo.\\n"))
    ['One.\\n\\n', 'Two.\\n']
    """
    for paragraph in re.split(r"(?<=\n\n)(?=\S)", text):
        yield from re.findall(rf".{{1,{CHARACTERS_BETWEEN_FACTS}}}(?:\s|$)|\S+", paragraph, flags=re.DOTALL)


def drawn(
    fresh: Iterable[Question], known: Iterable[Question], wanted: int, generator: random.Random
) -> Iterator[Question]:
    """Yield different questions, some of them old, until they are about `wanted` characters or none is left."""
    pools = {False: list(fresh), True: list(known)}
    for pool in pools.values():
        generator.shuffle(pool)
    length = 0
    while length < wanted and any(pools.values()):
        pool = pools[generator.random() < SHARE_OF_OLD] or pools[False] or pools[True]
        question = pool.pop()
        length += len(question.plain) + 1
        yield question
