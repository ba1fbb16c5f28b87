"""The facts that are hidden, and the questions about them, drawn from a seed."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from longmem.evaluation.distance.settings import DistanceSettings
from longmem.evaluation.distance.words import ACTIVITIES, ADJECTIVES, CITIES, NOUNS

NUMBERS = range(10_000, 100_000)


class Fact(NamedTuple):
    """Lines to hide, the one that is asked for between others, the question, and the values to choose from.

    `text` ends with the line that is asked for, `after` follows it. Values follow the question after a blank.
    """

    text: str
    after: str
    question: str
    values: tuple[str, ...]
    right: int


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Values that do not occur in a text, so that only a fact can be where they come from."""

    activities: tuple[str, ...]
    taken_numbers: frozenset[int]

    @classmethod
    def absent_from(cls, text: str) -> Vocabulary:
        """Return what a text leaves."""
        taken = frozenset(int(number) for number in re.findall(r"(?<!\d)\d{5}(?!\d)", text))
        return cls(tuple(activity for activity in ACTIVITIES if activity not in text), taken)

    def numbers(self, generator: random.Random, count: int) -> list[str]:
        """Return different numbers of five digits."""
        drawn: dict[int, None] = {}
        while len(drawn) < count:
            number = generator.choice(NUMBERS)
            if number not in self.taken_numbers:
                drawn[number] = None
        return [str(number) for number in drawn]


def draw_facts(
    task: str, settings: DistanceSettings, vocabulary: Vocabulary, generator: random.Random, count: int
) -> list[Fact]:
    """Return `count` facts that may stand in memory together: each has a key and a value of its own."""
    return DRAW[task](settings, vocabulary, generator, count)


def draw_passkeys(
    settings: DistanceSettings, vocabulary: Vocabulary, generator: random.Random, count: int
) -> list[Fact]:
    """Return sentences with a number; the question does not say which of them it asks for."""
    facts = []
    for _ in range(count):
        right, *wrong = vocabulary.numbers(generator, settings.num_choices)
        text = f"\nThe pass key is {right}. Remember it. {right} is the pass key."
        question = "What is the pass key? The pass key is"
        facts.append(Fact(text, "\n", question, *shuffled(generator, right, wrong)))
    return facts


def draw_lines(settings: DistanceSettings, vocabulary: Vocabulary, generator: random.Random, count: int) -> list[Fact]:
    """Return blocks of lines "key: value", one line of each asked for."""
    pairs = settings.pairs
    names = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    keys = generator.sample(names, count * pairs)
    numbers = vocabulary.numbers(generator, count * (pairs + settings.num_choices))
    values, absent = numbers[: count * pairs], numbers[count * pairs :]
    facts = []
    for number in range(count):
        own = slice(number * pairs, (number + 1) * pairs)
        lines = [f"{key}: {value}" for key, value in zip(keys[own], values[own], strict=True)]
        asked = generator.randrange(pairs)
        key, right = keys[own][asked], values[own][asked]
        present = [value for value in values[own] if value != right]
        text, after = "\n" + "\n".join(lines[: asked + 1]), "".join(f"\n{line}" for line in lines[asked + 1 :]) + "\n"
        question = f"Which number stands behind {key} in the list?\n{key}:"
        wrong = wrong_values(settings, generator, present, absent[number * settings.num_choices :])
        facts.append(Fact(text, after, question, *shuffled(generator, right, wrong)))
    return facts


def draw_sentences(
    settings: DistanceSettings, vocabulary: Vocabulary, generator: random.Random, count: int
) -> list[Fact]:
    """Return sentences about a city, none of which names a value of another."""
    cities = generator.sample(CITIES, count)
    activities = generator.sample(vocabulary.activities, len(vocabulary.activities))
    values, absent = activities[:count], activities[count:]
    facts = []
    for city, right in zip(cities, values, strict=True):
        sentence = f"The best thing to do in {city} is"
        others = [value for value in values if value != right] if settings.needles == "together" else []
        wrong = wrong_values(settings, generator, others, generator.sample(absent, settings.num_choices - 1))
        question = f"What is the best thing to do in {city}? {sentence}"
        facts.append(Fact(f"\n{sentence} {right}.", "\n", question, *shuffled(generator, right, wrong)))
    return facts


DRAW: Mapping[str, Callable[[DistanceSettings, Vocabulary, random.Random, int], list[Fact]]] = {
    "passkey": draw_passkeys,
    "key-value": draw_lines,
    "needle": draw_sentences,
}


def wrong_values(
    settings: DistanceSettings, generator: random.Random, present: Sequence[str], absent: Sequence[str]
) -> list[str]:
    """Return the wrong values to choose from: those in memory come first where they are asked for."""
    chosen = generator.sample(present, len(present)) if settings.wrong_values == "present" else []
    return [*chosen, *absent][: settings.num_choices - 1]


def shuffled(generator: random.Random, right: str, wrong: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Return the values in a random order, and the place of the right one."""
    values = [right, *wrong]
    generator.shuffle(values)
    return tuple(values), values.index(right)
