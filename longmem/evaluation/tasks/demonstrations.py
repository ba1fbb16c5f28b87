"""Learning from many demonstrations: some stand in the window, thousands more in memory, and none is ever cut."""

import dataclasses
import functools
import itertools
import random
import statistics
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from longmem.evaluation.folder import digest, spread
from longmem.evaluation.settings import Count, EvaluationSettings, Number
from longmem.evaluation.systems import BackboneSystem, LongBackbone, Question, RetrievalSystem, System, tokenize
from longmem.evaluation.task import Case, Item, Record, Task
from longmem.model.modeling import LongMemForCausalLM

Line = Sequence[int]
Tokens = Callable[[str], list[int]]  # of a demonstration or a question


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemonstrationSettings(EvaluationSettings):
    """Demonstrations in window and memory; `limit` counts the items of each set."""

    seeds: tuple[Number, ...] = (1, 2, 3, 4, 5, 6)
    """Each draws its own demonstrations; the default is that of LongMem's released script."""

    demonstrations: Count = 20
    """Demonstrations in the window (the script's k). As many as fit beside the longest question are kept, the last ones."""

    memory_demonstrations: Count = 2000
    """Demonstrations in memory (the script's cache_k)."""

    bos_per_line: bool = False
    """Begin every demonstration and every question with the tokenizer's bos token. The released script puts its bos before
    every line, and eos behind every demonstration. Only for models that were trained with bos."""


class Demonstration(NamedTuple):
    """A question in its prompt, and the answer with the blanks and marks around it."""

    question: str
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemonstrationCase(Case):
    """What is asked after one draw of demonstrations, each a line; those for memory are its `memory`."""

    window: Sequence[Line]  # demonstrations for the window
    exchanged: Sequence[Line] = ()  # memory with the answers of one another, if no other set can be the wrong memory
    content_free: Sequence[Item] = ()  # questions about nothing, for calibration

    @functools.cached_property
    def longest(self) -> int:
        """Return the tokens that the longest question and what follows it take in the window."""
        return max(self.room(item) for item in (*self.items, *self.content_free))


class DemonstrationTask(Task):
    """Sets of items, asked after demonstrations that each seed draws anew."""

    sort_by = ("seed", "number")
    retrieval = {"passage_tokens": sys.maxsize, "query_tokens": None}  # whole lines, looked up with the question alone
    wrong_shares = ("seed",)
    max_new_tokens = 0

    def __init__(self, settings: Any, sets: Sequence[str]) -> None:
        super().__init__(settings)
        self.sets = tuple(sets)
        self.examples = {name: self.load(name) for name in self.sets}

    @abstractmethod
    def load(self, name: str) -> tuple[list[Any], list[Any]]:
        """Return the examples of a set: those to draw demonstrations from, and those that are asked."""

    @abstractmethod
    def draw(self, name: str, seed: int) -> tuple[list[Demonstration], list[Demonstration], random.Random]:
        """Return the demonstrations for window and memory, and the generator that exchanges answers."""

    @abstractmethod
    def items(self, name: str, chosen: Sequence[Any], tokens: Tokens) -> Iterator[Item]:
        """Yield chosen examples as questions; `about` has their `group` and `number`."""

    def content_free(self, name: str, tokens: Tokens) -> list[Item]:
        """Return questions about nothing."""
        return []

    @property
    def notes(self) -> Sequence[str]:
        """Return how to read the tables."""
        held = "its own, labels or answers shuffled among them"
        if len(self.sets) > 1:
            held = "as many of the next. All: the mean over sets, each counting the same"
        return (
            "Each number is the mean over seeds, ± its standard deviation over seeds (divided by their number, as numpy's "
            "std), with the 95 % interval over items in brackets. Seconds per item are without those for reading "
            f"demonstrations into memory; those in the window are run again for every {self.asked_at_once} items.",
            f"The wrong memory of a set holds {held}.",
        )

    def cases(self, model: LongMemForCausalLM) -> list[Case]:
        """Return a case for each seed and set; neighbours, since the wrong memory of one is the right one of the next."""
        start = [model.tokenizer.bos_token_id] if self.settings.bos_per_line else []
        if start == [None]:
            raise ValueError("`bos_per_line` must be false for a tokenizer without a bos token, got true.")

        def tokens(text: str) -> list[int]:
            return [*start, *tokenize(model.tokenizer, text, continues=True)]

        asked = {}
        for name, (_, examples) in self.examples.items():
            chosen = [examples[number] for number in spread(len(examples), self.settings.limit)]
            asked[name] = list(self.items(name, chosen, tokens))
        return [self._case(name, seed, asked[name], tokens) for seed in self.settings.seeds for name in self.sets]

    def _case(self, name: str, seed: int, items: list[Item], tokens: Tokens) -> DemonstrationCase:
        window, memory, generator = self.draw(name, seed)
        answers = [each.answer for each in memory]
        generator.shuffle(answers)
        exchanged = [each._replace(answer=answer) for each, answer in zip(memory, answers, strict=True)]
        case = DemonstrationCase(
            name=f"{name}/{seed}",
            subject=name,
            group=name,
            axes={"set": name, "seed": seed},
            items=items,
            window=[tokens("".join(each)) for each in window],
            memory=[tokens("".join(each)) for each in memory],
            exchanged=[tokens("".join(each)) for each in exchanged] if len(self.sets) == 1 else [],
            content_free=self.content_free(name, tokens),
            max_new_tokens=self.max_new_tokens,
        )
        if case.longest >= self.settings.window:
            raise ValueError(
                f"`window` must hold the longest question of {name} with what follows it and one token more, "
                f"{case.longest + 1} tokens, got {self.settings.window}; choose a larger one."
            )
        return case

    def identity(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Return a digest of the examples of each set."""
        return {name: digest(examples) for name, examples in self.examples.items()}

    def wrong(self, case: Any, cases: Sequence[Case]) -> Case | None:
        """Return the draw of the same seed from the next set, or of a single set its own, answers exchanged."""
        return dataclasses.replace(case, memory=case.exchanged) if len(self.sets) == 1 else super().wrong(case, cases)

    def prepare(self, system: System, case: Any, wrong: Case | None) -> dict[str, Any]:
        """Have a system read demonstrations, a longer window as many as fit before its others, and return how many."""
        shown = self.shown(system, case, case.longest)
        memory, instead = case.memory, [] if wrong is None else wrong.memory
        if isinstance(system, LongBackbone):
            left = system.window - case.longest - len(joined(shown))
            memory = last_that_fit(memory, left if len(shown) == len(case.window) else 0)
        elif isinstance(system, BackboneSystem):
            memory = []
        system.read(memory, instead)
        system.context(joined(shown), case.longest, [Question(case.items[0].token_ids, [[0]])])
        read = {"off": [], "wrong": instead}.get(system.name, memory)
        counts = {"read_demonstrations": len(read), "read_tokens": len(joined(read))}
        return {"window_demonstrations": len(shown), **counts}

    def room_before(self, case: Any, item: Item) -> int:
        """Return the tokens to leave free behind demonstrations: the same for all items, so that a calibration holds."""
        return case.longest

    def shown(self, system: System, case: Any, room: int) -> Sequence[Line]:
        """Return the demonstrations in the window, the last that leave `room` tokens, and what passages need, free."""
        pasted = int(system.pasted_share * system.window) if isinstance(system, RetrievalSystem) else 0
        return last_that_fit(case.window, system.window - pasted - room)

    def prefix(self, system: System, case: Any, item: Item) -> list[int]:
        """Return the demonstrations in the window."""
        return joined(self.shown(system, case, self.room_before(case, item)))

    def tables(self, records: Sequence[Record]) -> dict[str, list[list[str]]]:
        """Return what each system had before a question; means over seeds."""
        columns = ("window_demonstrations", "read_demonstrations", "read_tokens")
        rows = [["set, system", "in the window", "read", "tokens read"]]
        for name, system in itertools.product(self.sets, self.settings.systems):
            own = [each for each in records if (each["set"], each["system"]) == (name, system)]
            means = [statistics.fmean(each[column] for each in own if column in each) for column in columns]
            rows.append([f"{name}, {self.title_of(system)}", *(f"{mean:,.1f}" for mean in means)])
        return {"Demonstrations before a question": rows}


def last_that_fit(lines: Sequence[Line], size: int) -> Sequence[Line]:
    """Return as many whole lines from the end as `size` tokens hold.

    >>> last_that_fit([[1], [2, 2], [3, 3, 3]], 5)
    [[2, 2], [3, 3, 3]]
    """
    start = len(lines)
    while start and len(lines[start - 1]) <= size:
        start -= 1
        size -= len(lines[start])
    return lines[start:]


def joined(lines: Iterable[Line]) -> list[int]:
    """Return the tokens of lines one after the other."""
    return [token for line in lines for token in line]
