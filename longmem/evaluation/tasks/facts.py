"""Recall at a distance: one fact far back in a long text, and a question about it at the end.

`passkey` hides a number in a sentence (Mohtashami and Jaggi, arXiv 2305.16300), `key-value` one of several lines, `needle` a
sentence about a city. The question stands in the window alone; the text is in memory, or among the passages.
"""

import dataclasses
import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from longmem.console import token_progress
from longmem.evaluation.folder import MAY_CHANGE, digest, spread
from longmem.evaluation.settings import Count, EvaluationSettings, Number
from longmem.evaluation.systems import Banks, tokenize
from longmem.evaluation.task import Axis, Case, Item, Measure, Record, Task, best, per_token
from longmem.evaluation.tasks.haystack import HaystackBanks, Window, cut, hide, read_haystack
from longmem.memory.index import validate_index
from longmem.model.modeling import LongMemForCausalLM
from longmem.settings import From, UpTo

Kind = Literal["passkey", "key-value", "needle"]

_WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
CITIES, ACTIVITIES = _WORDS["cities"].split(), _WORDS["activities"]
KEYS = [f"{adjective}-{noun}" for adjective in _WORDS["adjectives"].split() for noun in _WORDS["nouns"].split()]
NUMBERS = range(10_000, 100_000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenSettings(EvaluationSettings):
    """Answers that are written, with the bank's form."""

    max_new_tokens: Count = 16
    """Tokens of a written answer at most."""

    index: str = "auto"
    """Of the bank: see `MemoryBank`; "flat" is exact."""

    storage_dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Of stored keys and values; int8 takes about half the bytes of float16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_index(self.index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueSettings(WrittenSettings):
    """Questions whose answer is a value: the right one is compared with wrong ones, and may also be written."""

    num_choices: Annotated[int, From(2)] = 10
    """Values whose likelihoods are compared: the right one and wrong ones of the same kind."""

    generate: bool = True
    """Let the model also write its answer, and count those that are exact."""


class BankTask(Task):
    """A task that settings tell the form of its banks."""

    def banks(self, model: LongMemForCausalLM) -> Banks:
        return Banks(model, index=self.settings.index, storage_dtype=self.settings.storage_dtype)


class ValueTask(BankTask):
    """A choice is right if the right value is the likeliest per token, a written answer if it begins with it."""

    measures = {"accuracy": Measure("accuracy", has_chance=True), "exact": Measure("written exactly")}
    sort_by = ("size", "case")

    @property
    def max_new_tokens(self) -> int:
        """Return the tokens of a written answer, 0 where none is written."""
        return self.settings.max_new_tokens if self.settings.generate else 0

    def score(self, record: Record) -> Mapping[str, float]:
        found = {"accuracy": float(best(per_token(record)) == record["right"])}
        if "prediction" in record:
            found["exact"] = float(is_exact(record["prediction"], record["values"][record["right"]]))
        return found


def value_item(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    values: Sequence[str],
    right: int,
    *,
    before_value: str = " ",
    **about: Any,
) -> Item:
    """Return a question with the values to choose from, which follow it after `before_value`."""
    return Item(
        token_ids=tokenize(tokenizer, question, continues=True),
        candidates=[tokenize(tokenizer, before_value + value, continues=True) for value in values],
        about={"question": question, "values": list(values), "right": right, **about},
    )


def is_exact(text: str, value: str) -> bool:
    """Return whether a written answer begins with the value, but for capitals and punctuation.

    >>> [is_exact(text, "12345") for text in ("12345.", "<12345>", "123456", "it is 12345")]
    [True, True, False, False]
    """
    words, wanted = (re.findall(r"\w+", each.lower()) for each in (text, value))
    return words[: len(wanted)] == wanted


def shuffled(generator: random.Random, right: str, wrong: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Return the values in a random order, and the place of the right one."""
    values = [right, *wrong]
    generator.shuffle(values)
    return tuple(values), values.index(right)


# The evaluation --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactsSettings(ValueSettings):
    """What is hidden, where, and how it is asked for; `limit` is of each kind of fact."""

    tasks: tuple[Kind, ...] = ("passkey", "needle")
    """passkey: a number in a sentence; key-value: one of several lines; needle: a sentence about a city."""

    haystack: str = "python-manual"
    """Text that facts are hidden in: a file, a folder of texts, "python-manual" (about 90,000 tokens), or "filler", five
    short sentences again and again."""

    sizes: tuple[Count, ...] = (4096, 16384, 65536)
    """Tokens in memory: multiples of the model's `segment_length`. The largest is encoded once, the smaller are its start."""

    depths: tuple[Annotated[float, From(0), UpTo(1)], ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """How far back the fact lies, as a share of the memory: 0 in the last window of memory, 1 in the first."""

    distances: tuple[Number, ...] = ()
    """How far back the fact lies, in tokens, to within a window; given, they take the place of `depths`. A size has those
    that are smaller."""

    items: Count = 10
    """Facts for each kind, size and depth, at other places of the window."""

    wrong_values: Literal["absent", "present"] = "absent"
    """Wrong values that occur nowhere in memory, or, as far as there are, those of other facts in memory."""

    pairs: Count = 16
    """Lines of the kind key-value, one of which is asked for."""

    needles: Literal["alone", "together"] = "alone"
    """Each fact is in memory without others; or the facts of all depths are there at once, and each is asked for."""

    bank_folder: str | None = None
    """Keep the bank of the haystack in this folder and not in memory; encoding that was stopped then goes on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distances and min(self.distances) >= max(self.sizes):
            raise ValueError(f"`distances` must be smaller than the largest of `sizes`, got {list(self.distances)}.")
        if self.needles == "together" and "passkey" in self.tasks:
            raise ValueError("`needles` must be alone for the task passkey, of one question for all, got together.")
        places = len(self.distances or self.depths)
        for name, value, limit in (("pairs", self.pairs, len(KEYS) // places), ("depths", places, len(CITIES))):
            if value > limit:
                raise ValueError(f"`{name}` must be at most {limit} so that all keys differ, got {value}.")
        if "needle" in self.tasks and self.needed_activities > len(ACTIVITIES):
            most = len(ACTIVITIES) - places + 1
            raise ValueError(
                f"`num_choices` must leave a value for every depth, {most} at most, got {self.num_choices}."
            )

    @property
    def needed_activities(self) -> int:
        """Return how many values the kind needle needs: one for each depth, and wrong ones."""
        return len(self.distances or self.depths) + self.num_choices - 1

    def windows(self, size: int, length: int) -> dict[float, int]:
        """Return the number of the window for each depth, or distance, of a memory of `size` tokens.

        >>> FactsSettings(output="x").windows(16384, 1024)
        {0.0: 15, 0.25: 11, 0.5: 8, 0.75: 4, 1.0: 0}
        """
        if self.distances:
            return {each: (size - 1 - each) // length for each in self.distances if each < size}
        last = size // length - 1
        return {each: int((1 - each) * last + 0.5) for each in self.depths}


class Facts(ValueTask):
    """Facts in a text, by size of the memory and distance; the wrong memory is the same text without any of them."""

    name, title, kind = "recall", "recall at a distance", FactsSettings
    may_change = (*MAY_CHANGE, "bank_folder")
    notes = (
        "The text is encoded once, before any question: the costs are those of windows with facts. The wrong memory is the "
        "text without facts.",
    )
    axes = (
        Axis("task", "panel", values=get_args(Kind)),
        Axis("size", title="tokens in memory"),
        Axis("depth", "detail", "distance (share of memory, or tokens)"),
    )
    windows: Sequence[Window] = ()  # of the haystack, from `cases` on
    _banks: HaystackBanks | None = None

    def cases(self, model: LongMemForCausalLM) -> list[Case]:
        """Return a case for each fact, the smallest memory first: the larger ones go on from it."""
        settings, tokenizer = self.settings, model.tokenizer
        validate_sizes(settings, model)
        ids = read_haystack(tokenizer, settings.haystack, max(settings.sizes))
        self.windows = cut(ids, model.config.segment_length)
        maker = FactMaker(str(tokenizer.decode(ids)), settings)
        found: list[Case] = []
        for task in settings.tasks:
            places = [(size, item) for size in settings.sizes for item in range(settings.items)]
            own = [case for size, item in places for case in self._hidden(task, size, item, maker, tokenizer)]
            found += [own[number] for number in spread(len(own), settings.limit)]
        return sorted(found, key=lambda case: case.axes["size"])

    def _hidden(
        self, task: str, size: int, item: int, maker: "FactMaker", tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[Case]:
        settings, length = self.settings, len(self.windows[0])
        tokens = functools.partial(tokenize, tokenizer, continues=True)
        generator = random.Random(f"{settings.seed}/{task}/{size}/{item}")
        places = settings.windows(size, length)
        facts = list(maker.draw(task, generator, len(places)))
        hidden, together = [], {}
        for window, fact in zip(places.values(), facts, strict=True):
            hidden.append(hide(self.windows[window], tokens(fact.text), tokens(fact.after), generator))
            together[window] = hidden[-1][0]
        for (depth, window), fact, (ids, stop) in zip(places.items(), facts, hidden, strict=True):
            replaced = together if settings.needles == "together" else {window: ids}
            distance = size - window * length - stop  # tokens after the line that is asked for
            place = f"{depth} tokens" if settings.distances else f"{depth:g}"
            name = f"{task}/{size}/{place}/{item}"
            yield Case(
                name=name,
                group=name,
                items=[value_item(tokenizer, fact.question, fact.values, fact.right, distance=distance)],
                memory=[replaced.get(number, own) for number, own in enumerate(self.windows[: size // length])],
                axes={"task": task, "size": size, "depth": depth},
                max_new_tokens=self.max_new_tokens,
                stage=f"facts in {size:,} tokens",
            )

    def wrong(self, case: Case, cases: Sequence[Case]) -> Case:
        """Return the text alone, as much of it as the case has."""
        return Case(name="haystack", group="haystack", items=(), memory=self.windows[: len(case.memory)])

    def identity(self, cases: Sequence[Case]) -> dict[str, Any]:
        asked = []
        for case in cases:
            hidden = [own for own, plain in zip(case.memory, self.windows, strict=False) if own is not plain]
            asked.append([case.name, hidden, case.items[0].about])
        return {"haystack": digest(self.windows), "asked": digest(asked)}

    def banks(self, model: LongMemForCausalLM) -> Banks:
        settings, length = self.settings, len(self.windows[0])
        replaceable = {window for size in settings.sizes for window in settings.windows(size, length).values()}
        options = {"index": settings.index, "storage_dtype": settings.storage_dtype, "folder": settings.bank_folder}
        self._banks = HaystackBanks(model, self.windows, sizes=settings.sizes, replaceable=replaceable, **options)
        return self._banks

    def begin(self, cases: Sequence[Case], console: Console) -> None:
        """Encode what a size has more than the one before it."""
        if self._banks is not None and {"on", "wrong"}.intersection(self.settings.systems):
            size = cases[0].axes["size"]
            with token_progress(f"encoding {size:,} tokens", console) as report:
                self._banks.encode(size, report)

    def close(self) -> None:
        if self._banks is not None:
            self._banks.bank.close()


def validate_sizes(settings: FactsSettings, model: LongMemForCausalLM) -> None:
    """Raise ValueError unless sizes are whole windows of whole chunks, and facts that stand together have windows enough."""
    length, chunk = model.config.segment_length, model.config.chunk_size
    if length % chunk:
        raise ValueError(
            f"`config.segment_length` must be a multiple of `config.chunk_size`, got {length} and {chunk}; choose another."
        )
    for size in settings.sizes:
        if size % length:
            above = size + length - size % length
            raise ValueError(
                f"`sizes` must be multiples of the model's `segment_length`, {length}, got {size}; the next is {above}."
            )
        windows = list(settings.windows(size, length).values())
        if settings.needles == "together" and len(set(windows)) < len(windows):
            raise ValueError(
                f"`sizes` must have a window of {length} tokens for every depth where needles are together, got {size} "
                f"with {len(windows)} depths in windows {windows}; choose fewer depths, or larger sizes."
            )


class Fact(NamedTuple):
    """Lines to hide, the one that is asked for between others, the question, and the values that follow it after a blank."""

    text: str  # ends with the line that is asked for
    after: str  # follows it
    question: str
    values: tuple[str, ...]
    right: int


class FactMaker:
    """Draws facts whose values do not occur in a text (ValueError if it leaves too few), so that no value comes from there."""

    def __init__(self, text: str, settings: FactsSettings) -> None:
        self.settings = settings
        self.taken_numbers = {int(number) for number in re.findall(r"(?<!\d)\d{5}(?!\d)", text)}
        self.activities = [activity for activity in ACTIVITIES if activity not in text]
        if "needle" in settings.tasks and len(self.activities) < settings.needed_activities:
            raise ValueError(
                f"`haystack` must leave {settings.needed_activities} values for the task needle, got "
                f"{len(self.activities)} that do not occur in it; choose another text, or fewer `num_choices`."
            )

    def draw(self, task: str, generator: random.Random, count: int) -> Iterator[Fact]:
        """Return `count` facts that may stand in memory together: each has a key and a value of its own."""
        return {"passkey": self._passkeys, "key-value": self._lines, "needle": self._sentences}[task](generator, count)

    def _passkeys(self, generator: random.Random, count: int) -> Iterator[Fact]:
        """Yield sentences with a number; the question does not say which of them it asks for."""
        for _ in range(count):
            right, *wrong = self._numbers(generator, self.settings.num_choices)
            text = f"\nThe pass key is {right}. Remember it. {right} is the pass key."
            yield Fact(text, "\n", "What is the pass key? The pass key is", *shuffled(generator, right, wrong))

    def _lines(self, generator: random.Random, count: int) -> Iterator[Fact]:
        """Yield blocks of lines "key: value", one line of each asked for."""
        pairs, choices = self.settings.pairs, self.settings.num_choices
        keys = generator.sample(KEYS, count * pairs)
        numbers = self._numbers(generator, count * (pairs + choices))
        absent = numbers[count * pairs :]
        for start in range(0, count * pairs, pairs):
            asked = start + generator.randrange(pairs)
            lines = [f"\n{keys[place]}: {numbers[place]}" for place in range(start, start + pairs)]
            text, after = "".join(lines[: asked - start + 1]), "".join(lines[asked - start + 1 :])
            question = f"Which number stands behind {keys[asked]} in the list?\n{keys[asked]}:"
            present = [*numbers[start:asked], *numbers[asked + 1 : start + pairs]]
            wrong = self._wrong(generator, present, absent[start // pairs * choices :])
            yield Fact(text, f"{after}\n", question, *shuffled(generator, numbers[asked], wrong))

    def _sentences(self, generator: random.Random, count: int) -> Iterator[Fact]:
        """Yield sentences about a city, none of which names a value of another."""
        cities = generator.sample(CITIES, count)
        activities = generator.sample(self.activities, len(self.activities))
        values, absent = activities[:count], activities[count:]
        for city, right in zip(cities, values, strict=True):
            sentence = f"The best thing to do in {city} is"
            others = [value for value in values if value != right] if self.settings.needles == "together" else []
            wrong = self._wrong(generator, others, generator.sample(absent, self.settings.num_choices - 1))
            question = f"What is the best thing to do in {city}? {sentence}"
            yield Fact(f"\n{sentence} {right}.", "\n", question, *shuffled(generator, right, wrong))

    def _numbers(self, generator: random.Random, count: int) -> list[str]:
        drawn: dict[int, None] = {}
        while len(drawn) < count:
            number = generator.choice(NUMBERS)
            if number not in self.taken_numbers:
                drawn[number] = None
        return [str(number) for number in drawn]

    def _wrong(self, generator: random.Random, present: Sequence[str], absent: Sequence[str]) -> list[str]:
        """Return the wrong values to choose from: those in memory come first where they are asked for."""
        chosen = generator.sample(present, len(present)) if self.settings.wrong_values == "present" else []
        return [*chosen, *absent][: self.settings.num_choices - 1]
