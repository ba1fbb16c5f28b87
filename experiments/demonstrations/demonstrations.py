"""Documents of labelled sentences, made from books and other texts, to train a side network on what demonstrations say.

Every document is one task: sentences in a form of its own, each with a label. Labels mean what they say in most documents,
and in the others nothing, so that only the demonstrations tell them apart.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

FORMS = (
    ("Text: ", " Label: "),
    ("Sentence: ", " Feeling: "),
    ("Comment: ", " Opinion: "),
    ("Input: ", " Class: "),
    ("Passage: ", " Kind: "),
    ("Extract: ", " Mark: "),
    ("Quote: ", " Mood: "),
    ("Q: ", " A: "),
    ("", " = "),
    ("Line: ", " Tag: "),
)
ENDS = (". ", ". ", "\n", ".\n", "; ")
TWO = (("negative", "positive"), ("bad", "good"), ("sad", "happy"), ("terrible", "great"))
FIVE = (("terrible", "bad", "okay", "good", "great"), ("awful", "poor", "fair", "fine", "excellent"))
KINDS = (("fiction", "fact"), ("story", "report"), ("novel", "manual"), ("opinion", "description"))
PERSONS = {"man": {"he", "him"}, "woman": {"she", "her"}, "self": {"i", "me"}}
TOPICS = {
    "sea": {"sea", "ship", "boat", "sail", "sailor", "waves", "shore"},
    "money": {"money", "pounds", "dollars", "paid", "rich", "fortune", "bank"},
    "love": {"love", "loved", "heart", "kiss", "kissed", "marry", "wife"},
    "death": {"dead", "death", "died", "die", "killed", "grave", "blood"},
    "house": {"room", "door", "window", "house", "chair", "table"},
    "road": {"road", "horse", "carriage", "walked", "street", "train"},
}
NAMES = "table river stone apple window garden silver north paper candle bridge winter copper forest letter marble"
LIMITS = ((-math.inf, -3.2), (-2.4, -1.2), (-0.5, 0.5), (1.2, 2.4), (3.2, math.inf))  # of five grades of tone
TONE = 2.2  # least tone, to either side, of what is called positive or negative
SHARE_OF_MEANING = 0.65  # of the documents whose labels could mean something: they do
LEAST_SENTENCES = 150  # of every label


class Labelled(NamedTuple):
    """Sentences of each label, and words for the labels where there are some that say what they mean."""

    groups: Sequence[Sequence[str]]
    words: Sequence[str] | None


def read_lexicon(text: str) -> dict[str, float]:
    """Return how positive words are, from lines of a word and a number between tabs, as vaderSentiment's file has them.

    >>> read_lexicon("glad\\t2.0\\t0.7\\n:-)\\t1.3\\n")
    {'glad': 2.0}
    """
    rows = (line.split("\t")[:2] for line in text.splitlines() if line.strip())
    return {word: float(score) for word, score in rows if word.isalpha()}


def tone_of(sentence: str, lexicon: Mapping[str, float]) -> float | None:
    """Return how positive a sentence is: None where no word of it is known, or where something is denied.

    >>> tone_of("A glad day.", {"glad": 2.0}), tone_of("Not a glad day.", {"glad": 2.0})
    (2.0, None)
    """
    words = re.findall(r"[a-z']+", sentence.lower())
    known = [lexicon[word] for word in words if word in lexicon]
    denied = any(word in ("not", "no", "never", "without", "hardly") or word.endswith("n't") for word in words)
    return None if denied or not known else sum(known) / math.sqrt(len(known))


def sentences_of(text: str) -> list[str]:
    """Return the sentences of 30 to 170 characters in a text, but for those with marks of a markup."""
    found = re.findall(r"[A-Z\"“][^.!?\n]{30,170}[.!?]", text)
    return [" ".join(each.split()) for each in found if not re.search(r"[\\{}$|_]", each)]


class DemonstrationMaker:
    """A maker of documents, each of one task that is drawn.

    Args:
        stories: sentences of stories, by who wrote them.
        others: sentences of other texts, by what they are about.
        lexicon: how positive words are.
        generator: draws tasks, words and sentences.
    """

    def __init__(
        self,
        stories: Mapping[str, Sequence[str]],
        others: Mapping[str, Sequence[str]],
        lexicon: Mapping[str, float],
        generator: random.Random,
    ) -> None:
        self.stories, self.others, self.lexicon, self.generator = stories, others, lexicon, generator
        self.all = [sentence for author in stories for sentence in stories[author]]
        generator.shuffle(self.all)

    def draw(self, characters: int) -> str:
        """Return a document of about so many characters.

        Raises ValueError where the texts have too few sentences for any task.
        """
        for _ in range(100):
            groups, words = self._task()
            if len(groups) > 1 and min(map(len, groups)) >= LEAST_SENTENCES:
                return self._written(groups, words, characters)
        raise ValueError(f"`stories` and `others` must have {LEAST_SENTENCES} sentences for each label, got too few.")

    def _task(self) -> Labelled:
        kinds: tuple[tuple[int, Callable[[], Labelled]], ...] = (
            (5, self._tone),
            (3, self._grade),
            (2, self._phrase),
            (2, self._author),
            (3, self._source),
            (1, self._speech),
            (1, self._end),
            (1, self._person),
            (2, self._topic),
        )
        weights, makers = zip(*kinds, strict=True)
        return self.generator.choices(makers, weights)[0]()

    @functools.cached_property
    def _tones(self) -> list[tuple[str, float]]:
        found = ((sentence, tone_of(sentence, self.lexicon)) for sentence in self.all)
        return [(sentence, tone) for sentence, tone in found if tone is not None]

    @functools.cached_property
    def _two_tones(self) -> tuple[list[str], list[str]]:
        return [each for each, tone in self._tones if tone < -TONE], [each for each, tone in self._tones if tone > TONE]

    def _tone(self) -> Labelled:
        return Labelled(self._two_tones, self.generator.choice(TWO))

    def _grade(self) -> Labelled:
        groups = [[each for each, tone in self._tones if low <= tone < high] for low, high in LIMITS]
        return Labelled(groups, self.generator.choice(FIVE))

    def _phrase(self) -> Labelled:
        """Return pieces of two to six words of what is positive and negative, which are so themselves."""
        groups: tuple[list[str], list[str]] = ([], [])
        for side, sentences in enumerate(self._two_tones):
            for sentence in sentences:
                words = sentence.split()
                start = self.generator.randrange(max(1, len(words) - 6))
                piece = " ".join(words[start : start + self.generator.randint(2, 6)]).strip(".,;:!?")
                if (tone_of(piece, self.lexicon) or 0) * (2 * side - 1) > 1.5:
                    groups[side].append(piece)
        return Labelled(groups, self.generator.choice(TWO))

    def _author(self) -> Labelled:
        some = self._some(self.stories, 2, 4)
        return Labelled([self.stories[each] for each in some], [each.split()[-1].lower() for each in some])

    def _source(self) -> Labelled:
        if self.generator.random() < 0.5:
            story, other = self._some(self.stories, 1, 1)[0], self._some(self.others, 1, 1)[0]
            return Labelled((self.stories[story], self.others[other]), self.generator.choice(KINDS))
        some = self._some(self.others, 2, 3)
        return Labelled([self.others[each] for each in some], some)

    def _speech(self) -> Labelled:
        words = ("speech", "story")
        return Labelled(self._by(words, lambda each: [words[re.search('["“”]', each) is None]]), words)

    def _end(self) -> Labelled:
        return Labelled(self._by(".!?", lambda each: each[-1]), None)

    def _person(self) -> Labelled:
        some = self._some(PERSONS, 2, 3)
        return Labelled(self._by(some, lambda each: who if len(who := _about(each, PERSONS)) == 1 else ()), some)

    def _topic(self) -> Labelled:
        some = self._some(TOPICS, 2, 4)
        return Labelled(self._by(some, lambda each: _about(each, TOPICS)), some)

    def _by(self, labels: Sequence[str], labels_of: Callable[[str], Iterable[str]]) -> list[list[str]]:
        """Return the sentences of stories that have each of these labels."""
        groups: dict[str, list[str]] = {label: [] for label in labels}
        for sentence in self.all:
            for label in labels_of(sentence):
                if label in groups:
                    groups[label].append(sentence)
        return list(groups.values())

    def _some(self, choices: Mapping[str, object], least: int, most: int) -> list[str]:
        return self.generator.sample(sorted(choices), min(self.generator.randint(least, most), len(choices)))

    def _written(self, groups: Sequence[Sequence[str]], words: Sequence[str] | None, characters: int) -> str:
        draw = self.generator
        if words is None or draw.random() >= SHARE_OF_MEANING:
            words = draw.sample(NAMES.split(), len(groups))
        groups = [draw.sample(list(each), min(len(each), draw.choice((150, 400, 2_000)))) for each in groups]
        (before, between), end, is_lower = draw.choice(FORMS), draw.choice(ENDS), draw.random() < 0.5
        parts, length = list[str](), 0
        while length < characters:
            label = draw.randrange(len(groups))
            sentence = draw.choice(groups[label])
            if is_lower:  # as classification sets have it: small letters, blanks before marks
                sentence = re.sub(r" *([.,;:!?])", r" \1", re.sub('["“”]', "", sentence.lower())).strip()
            parts.append(f"{before}{sentence}{between}{words[label]}{end}")
            length += len(parts[-1])
        return "".join(parts)


def _about(sentence: str, kinds: Mapping[str, set[str]]) -> set[str]:
    """Return the kinds of which a sentence has a word."""
    words = set(re.findall(r"[a-z]+", sentence.lower()))
    return {kind for kind, own in kinds.items() if own & words}
