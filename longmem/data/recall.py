"""Recall to train on, made from any text: facts are hidden in it, and asked for further on.

A document with facts and questions is a text like any other, so a training run needs to know nothing of it: when a question
comes, the fact has left the window and is in memory. Facts are sentences by themselves, in the middle of a paragraph, or
several together; a question repeats the words of its fact or says the same in others, and some ask for the label of a
passage after many labelled ones. All words are the text's own but for those of the sentences below, which no evaluation of
this package uses.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

PROPERTIES = ("password", "room", "telephone number", "ticket", "account", "shelf", "favourite word", "secret", "seat")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "grey", "brown", "purple", "silver")
LINES = (
    "{key} = {value}",
    "{key} -> {value}",
    "[{key}] {value}",
    "{key} is {value}",
    "{key}, {value}",
    "entry {key} contains {value}",
)
ASKS = (("", ""), ("Question: ", "Answer:"), ("Q: ", "A:"))  # before a question, and before an answer without a cue
ITEMS = 6  # things that can be asked for, in what is hidden at one place
EXAMPLES = 24  # labelled passages at one place
WORDS_OF_QUOTE = 7
CHARACTERS_BETWEEN_FACTS = 3_000  # some 700 tokens
CHARACTERS_BETWEEN_SENTENCES = 1_200  # facts that stand by themselves
FACTS_BETWEEN_QUESTIONS = 4
SHARE_OF_OLD = 0.4  # of the questions: about facts that were asked for before, so far back as the document goes
SHARE_ALONE = 0.25  # of the questions: between paragraphs, and not in a block of questions
SHARE_OF_CHATS = 0.4  # of the blocks of questions, where there is a chat format
SHARE_IN_ITS_WORDS = 0.5  # of the questions: the answer begins as the fact does
NEW_LINES = "\n\n"
FORMAT = 2  # raise it when the same text gets other facts or questions

Turns = Sequence[tuple[str, str]]


class Relation(NamedTuple):
    """What can be said of something, asked, and answered in fewer words than it was said; `value` says what is drawn."""

    says: str
    ask: str
    short: str
    value: str


# {subject} is a person; "the ... of ..."; or somebody's thing. {they} stands for the subject.
RELATIONS: Mapping[str, Sequence[Relation]] = {
    "person": (
        Relation("{subject} grew up in", "Where did {subject} grow up?", "{they} grew up in", "place"),
        Relation("{subject} is married to", "Who is {subject} married to?", "{they} is married to", "name"),
        Relation("{subject} works as a", "What does {subject} do for a living?", "{they} works as a", "noun"),
        Relation("{subject} always carries a", "What does {subject} always carry?", "It is a", "words"),
        Relation("{subject} is afraid of the", "What is {subject} afraid of?", "{they} is afraid of the", "noun"),
        Relation("{subject} arrives on", "On which day does {subject} arrive?", "{they} arrives on", "day"),
        Relation("{subject} lives at number", "At which number does {subject} live?", "The number is", "number"),
        Relation(
            "{subject} hid the letter inside the", "Where did {subject} hide the letter?", "It is inside the", "words"
        ),
        Relation("{subject} has never been to", "Where has {subject} never been?", "{they} has never been to", "place"),
        Relation("{subject} learned to dance from", "Who taught {subject} to dance?", "{they} learned it from", "name"),
        Relation("{subject} sold the house to", "Who bought the house of {subject}?", "It was sold to", "name"),
        Relation("{subject} left for {place} in", "In which month did {subject} leave?", "{they} left in", "month"),
        Relation("{subject} likes to eat", "What does {subject} like to eat?", "{they} likes", "noun"),
    ),
    "thing": (
        Relation("{subject} belongs to", "Who owns {subject}?", "The owner is", "name"),
        Relation("{subject} was found in", "In which year was {subject} found?", "It was found in", "year"),
        Relation("{subject} is made of", "What is {subject} made of?", "It is made of", "noun"),
        Relation("{subject} opens at", "When does {subject} open?", "It opens at", "time"),
        Relation("{subject} stands beside the", "Where does {subject} stand?", "It stands beside the", "words"),
        Relation("{subject} was stolen by", "Who stole {subject}?", "The thief was", "name"),
        Relation("{subject} is known as", "By which name is {subject} known?", "It is known as", "words"),
        Relation("{subject} weighs exactly", "How many pounds does {subject} weigh?", "It weighs", "number"),
    ),
    "possession": (
        Relation("{subject} is", "Which colour has {subject}?", "Its colour is", "colour"),
        Relation("{subject} was left at the", "Where was {subject} left?", "It was left at the", "noun"),
        Relation("{subject} is named", "What is the name of {subject}?", "The name is", "place"),
        Relation("{subject} was a gift from", "Who gave away {subject}?", "It came from", "name"),
        Relation("{subject} must be returned by", "When must {subject} be returned?", "It must be returned by", "date"),
        Relation("{subject} costs", "How much does {subject} cost?", "The price is", "number"),
    ),
}


class Question(NamedTuple):
    """What is asked, how the answer may begin, and the answer.

    The first cue and the answer stand so in the fact, with a space between. An empty cue: the answer alone.
    """

    ask: str
    cues: tuple[str, ...]
    answer: str

    def cue(self, generator: random.Random) -> str:
        """Return how the answer begins: as in the fact, or otherwise."""
        others = self.cues[1:]
        return self.cues[0] if not others or generator.random() < SHARE_IN_ITS_WORDS else generator.choice(others)

    def beginning(self, generator: random.Random) -> str:
        """Return the question as running text, up to where the answer comes."""
        cue = self.cue(generator)
        before, instead = ("", "") if cue else generator.choice(ASKS)
        return " ".join(part for part in (f"{before}{self.ask}", cue or instead) if part)

    def plain(self, generator: random.Random) -> str:
        """Return question and answer as running text."""
        return " ".join(part for part in (self.beginning(generator), self.answer) if part)

    def turn(self, generator: random.Random) -> tuple[str, str]:
        """Return question and answer as two turns of a conversation."""
        return self.ask, f"{self.cue(generator)} {self.answer}".strip()


class Facts(NamedTuple):
    """One fact or a few of one kind, as they stand in a text, and what can be asked about them."""

    text: str
    questions: list[Question]


class FactMaker:
    """A maker of facts from the words of a text.

    >>> maker = FactMaker("It was the best of times, and Charles went to London with Lucie. " * 9, random.Random(1))
    >>> facts = maker.draw()
    >>> all(f"{question.cues[0]} {question.answer}" in facts.text for question in facts.questions), len(facts.questions)
    (True, 6)
    """

    def __init__(self, text: str, generator: random.Random, items: int = ITEMS) -> None:
        self.generator, self.items = generator, items
        words = sorted(set(re.findall(r"\b[A-Za-z]{3,10}\b", text)))
        inside = sorted(set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,9}\b", text)))  # not capitals that begin a sentence
        self.names = inside or [word for word in words if word.istitle()] or ["Alice", "Robert", "Clara"]
        self.words = [word for word in words if word.islower()] or ["first", "second", "third"]
        counted = Counter(re.findall(r"\bthe ([a-z]{3,10})\b", text))
        self.nouns = sorted(counted) or self.words
        self.running = text.split() or self.words
        self.examples = LabelledPassages(text, [noun for noun, _ in counted.most_common(12)], self.nouns, generator)
        self._drawn: set[str] = set()  # beginnings of facts, which have one answer in the whole text

    def draw(self) -> Facts:
        """Return a few facts of a random kind."""
        kinds: tuple[Callable[[], Facts], ...] = (
            self._lines,
            self._properties,
            self._letters,
            self._dates,
            self._relations,
            self.examples.draw,
        )
        return self.generator.choices(kinds, weights=(3, 2, 1, 1, 2, 2 if self.examples.labels else 0))[0]()

    def sentence(self) -> Facts:
        """Return one fact, to stand by itself in a paragraph."""
        return self._relations(1)

    def _lines(self) -> Facts:
        form, joint = self._one(LINES), self._one(("-", "_", " "))
        keys = [f"{self._one(self.words)}{joint}{self._one(self.words)}" for _ in range(self.items)]
        ask = self._one(("Look up {key}:", "What is given for {key}?", "Find {key}."))
        cues = [(form.format(key=key, value="").rstrip(), "") for key in keys]
        return self._facts([ask.format(key=key) for key in keys], cues, self._values(), "\n", "")

    def _properties(self) -> Facts:
        names, kind = self._names(), self._one(PROPERTIES)
        ask = self._one(("Tell me {name}'s {kind}.", "What is {name}'s {kind}?"))
        asks = [ask.format(name=name, kind=kind) for name in names]
        cues = [(f"{name}'s {kind} is", "It is", "") for name in names]
        return self._facts(asks, cues, self._values(), self._one((" ", "\n")), ".")

    def _letters(self) -> Facts:
        names = self._names()
        starts = [self.generator.randrange(max(len(self.running) - WORDS_OF_QUOTE, 1)) for _ in names]
        answers = [" ".join(self.running[start : start + WORDS_OF_QUOTE]).strip(".,;:") for start in starts]
        cues = [(f"{name} wrote in a letter:", "") for name in names]
        return self._facts([f"What did {name} write?" for name in names], cues, answers, "\n", ".")

    def _dates(self) -> Facts:
        names = self._names()
        cues = [(f"{name} was born on", "The date is", "") for name in names]
        return self._facts([f"When was {name} born?" for name in names], cues, [self._date() for _ in names], " ", ".")

    def _relations(self, count: int | None = None) -> Facts:
        asks, cues, answers = [], [], []
        for _ in range(self.items if count is None else count):
            kind = self._one(tuple(RELATIONS))
            subject, they = {
                "person": lambda: (self._name(), self._one(("He", "She"))),
                "thing": lambda: (f"the {self._one(self.nouns)} of {self._one(self.names)}", "It"),
                "possession": lambda: (f"{self._name()}'s {self._one(self.nouns)}", "It"),
            }[kind]()
            relation = self.generator.choice(RELATIONS[kind])
            place = self._one(self.names)
            says, ask, short = (
                text.format(subject=subject, they=they, place=place)
                for text in (relation.says, relation.ask, relation.short)
            )
            asks.append(ask)
            cues.append((f"{says[0].upper()}{says[1:]}", short, ""))
            answers.append(self._value(relation.value))
        return self._facts(asks, cues, answers, " ", ".")

    def _facts(
        self, asks: Sequence[str], cues: Sequence[tuple[str, ...]], answers: Sequence[str], between: str, end: str
    ) -> Facts:
        questions = [Question(*parts) for parts in zip(asks, cues, answers, strict=True)]
        # Of two with the same cue nobody could say which answer is right.
        different = {question.cues[0]: question for question in questions if question.cues[0] not in self._drawn}
        self._drawn.update(different)
        kept = list(different.values())
        return Facts(between.join(f"{each.cues[0]} {each.answer}{end}" for each in kept), kept)

    def _one(self, choices: Sequence[str]) -> str:
        return self.generator.choice(choices)

    def _name(self) -> str:
        return f"{self._one(self.names)} {self._one(self.names)}"

    def _names(self) -> list[str]:
        return [self._name() for _ in range(self.items)]

    def _date(self) -> str:
        return f"{self.generator.randint(1, 28)} {self._one(MONTHS)} {self.generator.randint(1500, 2000)}"

    def _value(self, kind: str) -> str:
        draw: Mapping[str, Callable[[], str]] = {
            "name": self._name,
            "place": lambda: self._one(self.names),
            "noun": lambda: self._one(self.nouns),
            "words": lambda: f"{self._one(self.words)} {self._one(self.nouns)}",
            "number": lambda: str(self.generator.randint(3, 9_999)),
            "year": lambda: str(self.generator.randint(1200, 2020)),
            "time": lambda: f"{self.generator.randint(1, 12)}:{self.generator.randrange(12) * 5:02}",
            "date": self._date,
            "day": lambda: self._one(DAYS),
            "month": lambda: self._one(MONTHS),
            "colour": lambda: self._one(COLOURS),
        }
        return draw[kind]()

    def _values(self) -> list[str]:
        kind = self.generator.randrange(3)
        if kind == 0:
            return [str(self.generator.randint(100, 9_999_999)) for _ in range(self.items)]
        return [" ".join(self.generator.choices(self.words, k=kind)) for _ in range(self.items)]


class LabelledPassages:
    """Sentences of a text with labels that mean nothing by themselves: only earlier examples say which is which.

    One rule for the whole text: who it is about, how it ends, whether somebody speaks, or which of its words it has.
    """

    def __init__(self, text: str, common: Sequence[str], nouns: Sequence[str], generator: random.Random) -> None:
        self.generator = generator
        sentences = [" ".join(each.split()) for each in re.findall(r"[A-Z\"“][^.!?]{30,160}[.!?]", text)]
        rules: tuple[Callable[[str], str], ...] = (
            lambda each: (re.findall(r"\b(?:he|she|they|we|I)\b", each) or [""])[0],
            lambda each: each[-1],
            lambda each: "speech" if re.search('["“”]', each) else "none",
            lambda each: next((noun for noun in common if f" {noun}" in each), ""),
        )
        rule = generator.choice(rules)
        groups: dict[str, list[str]] = {}
        for sentence in sentences:
            groups.setdefault(rule(sentence), []).append(sentence)
        groups.pop("", None)
        most = sorted(groups, key=lambda each: (-len(groups[each]), each))[: generator.randint(2, 4)]
        self.groups = [groups[each] for each in most if len(groups[each]) >= EXAMPLES]
        names = generator.sample(sorted(set(nouns)), min(len(self.groups), len(set(nouns))))
        self.labels = names if len(names) > 1 else []
        forms = (("Passage", "Kind"), ("Text", "Group"), ("Sentence", "Class"), ("Extract", "Mark"))
        self.form = generator.choice(forms)

    def draw(self) -> Facts:
        """Return labelled sentences, and others to be labelled."""
        drawn = [self._example() for _ in range(EXAMPLES + ITEMS)]
        asks = [(f"{self.form[0]}: {sentence}", label) for sentence, label in drawn]
        lines = [f"{ask} {self.form[1]}: {label}" for ask, label in asks[:EXAMPLES]]
        questions = [Question(ask, (f"{self.form[1]}:",), label) for ask, label in asks[EXAMPLES:]]
        return Facts("\n".join(lines), questions)

    def _example(self) -> tuple[str, str]:
        number = self.generator.randrange(len(self.labels))
        return self.generator.choice(self.groups[number]), self.labels[number]


def hide_and_ask(text: str, share: float, generator: random.Random, chat: Callable[[Turns], str] | None = None) -> str:
    """Return the text with facts hidden between its paragraphs, and questions about them further on.

    Args:
        text: the text.
        share: of the result that is questions and answers, about; below 1.
        generator: draws facts, places and questions.
        chat: writes questions and answers as a conversation; None: all stand as running text.
    """
    maker, known = FactMaker(text, generator), list[Question]()
    fresh: list[Question] = []
    parts: list[str] = []
    since_sentence = since_fact = hidden = owed = 0
    for paragraph in paragraphs(text):
        owed += len(paragraph)
        since_fact += len(paragraph)
        since_sentence += len(paragraph)
        if since_sentence >= CHARACTERS_BETWEEN_SENTENCES:
            sentence, since_sentence = maker.sentence(), 0
            paragraph = with_sentence(paragraph, sentence.text, generator)
            fresh += sentence.questions
        parts.append(paragraph)
        if since_fact < CHARACTERS_BETWEEN_FACTS:
            continue
        facts = maker.draw()
        parts.append(f"{'' if paragraph.endswith(NEW_LINES) else NEW_LINES}{facts.text}{NEW_LINES}")
        fresh += facts.questions
        since_fact, hidden = 0, hidden + 1
        if known and generator.random() < SHARE_ALONE:
            parts.append(generator.choice(known).plain(generator) + NEW_LINES)
        if hidden % FACTS_BETWEEN_QUESTIONS == 0:
            wanted = int(owed * share / (1 - share))
            asked = list(drawn(fresh, known, wanted, generator))
            if chat is not None and generator.random() < SHARE_OF_CHATS:
                parts.append(chat([each.turn(generator) for each in asked]) + NEW_LINES)
            else:
                parts.append("\n".join(each.plain(generator) for each in asked) + NEW_LINES)
            known += fresh
            fresh, owed = [], 0
    return "".join(parts)


def with_facts(text: str, generator: random.Random, items: int = ITEMS) -> Iterator[tuple[str, list[Question]]]:
    """Yield the text in pieces, each with what can be asked about it: facts stand before it and between its paragraphs.

    Args:
        text: the text.
        generator: draws facts.
        items: things that can be asked for, in what is hidden at one place.
    """
    maker, since = FactMaker(text, generator, items), CHARACTERS_BETWEEN_FACTS
    before = NEW_LINES
    for paragraph in paragraphs(text):
        if since >= CHARACTERS_BETWEEN_FACTS:
            facts, since = maker.draw(), 0
            yield f"{'' if before.endswith(NEW_LINES) else NEW_LINES}{facts.text}{NEW_LINES}", facts.questions
        yield paragraph, []
        since += len(paragraph)
        before = paragraph


def with_sentence(paragraph: str, sentence: str, generator: random.Random) -> str:
    """Return a paragraph with one more sentence, behind one of its own, or in front where none ends inside it.

    >>> with_sentence("It rained. They left.\\n\\n", "The door is red.", random.Random(1))
    'It rained. The door is red. They left.\\n\\n'
    """
    ends = [found.end() for found in re.finditer(r"[.!?][\"”]? (?=[A-Z\"“])", paragraph)]
    place = generator.choice(ends or [0])
    return f"{paragraph[:place]}{sentence}{' ' if sentence else ''}{paragraph[place:]}"


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
        length += len(question.ask) + len(question.cues[0]) + len(question.answer) + 3
        yield question
