"""A task: items to ask, demonstrations to draw, and the records of what a system made of them."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from longmem.evaluation.in_context import passages
from longmem.evaluation.in_context.labelled_files import load_examples
from longmem.evaluation.in_context.placing import Line, Shots, joined, read_lines, window_lines
from longmem.evaluation.in_context.rules import CONTENT_FREE
from longmem.evaluation.in_context.sets import SETS
from longmem.evaluation.in_context.settings import InContextSettings
from longmem.evaluation.runs import digest, spread
from longmem.evaluation.systems import Question, System
from longmem.evaluation.systems.system import text_before
from longmem.model.modeling import LongMemForCausalLM

ITEMS_PER_CALL = 256  # of label words: each call runs the window's demonstrations once more
ANSWERS_PER_CALL = 32
Records = list[dict[str, Any]]


class Task(ABC):
    """One set with a model's tokens; `digest` identifies its data.

    Args:
        name: of the set.
        settings: of the run.
        model: whose tokenizer is used.
        identity: all examples, for the digest.
    """

    def __init__(self, name: str, settings: InContextSettings, model: LongMemForCausalLM, identity: Any) -> None:
        self.name = name
        self.settings = settings
        self.tokenizer = model.tokenizer
        self.digest = digest(identity)
        self.bos: Line = []
        if settings.bos_per_line:
            if self.tokenizer.bos_token_id is None:
                raise ValueError("`bos_per_line` must be false for a tokenizer without a bos token, got true.")
            self.bos = [self.tokenizer.bos_token_id]

    def line(self, text: str) -> Line:
        """Return the tokens of a demonstration or question."""
        return [*self.bos, *self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def shots(self, seed: int, other: Task | None) -> Shots:
        """Return the demonstrations of a seed; `other` is the task whose demonstrations are the wrong memory."""
        window, memory = self.draw(seed)
        wrong = self.disguised(seed) if other is None else other.draw(seed)[1]
        return Shots(*([self.line(text) for text in lines] for lines in (window, memory, wrong)))

    def record_id(self, seed: int, system: System, item: int | None = None) -> str:
        """Return what an answer is called in the run's folder or, without an item, the preparation for all answers."""
        return f"{self.name}/{seed}/{system.name}" + ("" if item is None else f"/{item}")

    def prepare(self, system: System, shots: Shots) -> dict[str, Any]:
        """Have a system read and encode demonstrations, once for all items, and return what there is to record."""
        room = max(self.rooms)
        start = time.perf_counter()
        read = read_lines(system, shots, room)
        lines = window_lines(system, shots, room)
        system.context(joined(lines), room, [Question(self.lines[0], [[0]])])
        return {
            "window_demonstrations": len(lines),
            "read_demonstrations": len(read),
            "read_tokens": len(joined(read)),
            "preparing_seconds": time.perf_counter() - start,
        }

    lines: list[Line]
    """Tokens of each item's question."""
    rooms: list[int]
    """Tokens that each item's question and what follows it take in the window."""

    @abstractmethod
    def draw(self, seed: int) -> tuple[list[str], list[str]]:
        """Return the demonstrations for the window and for memory."""

    @abstractmethod
    def disguised(self, seed: int) -> list[str]:
        """Return the demonstrations for memory with the labels or answers of one another."""

    @abstractmethod
    def ask(self, system: System, shots: Shots, items: Sequence[int]) -> Iterator[Records]:
        """Yield one record for each item, some at a time; the system has read the demonstrations."""

    def _check_window(self) -> None:
        longest = max(self.rooms)
        if longest >= self.settings.window:
            raise ValueError(
                f"`window` must hold the longest question of {self.name} with what follows it and one token more, "
                f"{longest + 1} tokens, got {self.settings.window}; choose a larger one."
            )


class LabelledTask(Task):
    """A classification set."""

    def __init__(self, name: str, settings: InContextSettings, model: LongMemForCausalLM) -> None:
        self.kind = SETS[name]
        self.pool, evaluated = load_examples(settings, name)
        super().__init__(name, settings, model, [self.pool, evaluated])
        most = max(settings.demonstrations, settings.memory_demonstrations)
        if most > len(self.pool):
            raise ValueError(
                f"`demonstrations` and `memory_demonstrations` must be at most the examples of {name}, {len(self.pool)}, got "
                f"{settings.demonstrations} and {settings.memory_demonstrations}; lower the larger."
            )
        self.items = [evaluated[number] for number in spread(len(evaluated), settings.limit)]
        self.lines = [self.line(self.kind.query(item.text)) for item in self.items]
        # The words as they are tokenised behind a question, without what a tokenizer puts before a text of its own.
        tail = self.kind.query("x")
        self.words = [self.line(f"{tail} {word}")[len(self.line(tail)) :] for word in self.kind.words]
        content_free = [self.line(self.kind.query(text)) for text in CONTENT_FREE]
        self.content_free = [Question(line, self.words) for line in content_free]
        self.questions = [Question(line, self.words) for line in self.lines]
        # The same demonstrations for all, so that the calibration holds for all: what fits beside the longest.
        longest = max(question.room for question in (*self.questions, *self.content_free))
        self.rooms = [longest] * len(self.items)
        self._check_window()

    def draw(self, seed: int) -> tuple[list[str], list[str]]:
        """Return the released script's demonstrations: two samples, one after the other, of one generator."""
        generator = random.Random(seed)
        window = generator.sample(self.pool, self.settings.demonstrations)
        memory = generator.sample(self.pool, self.settings.memory_demonstrations)
        return [self.kind.line(each) for each in window], [self.kind.line(each) for each in memory]

    def disguised(self, seed: int) -> list[str]:
        """Return the demonstrations for memory with their labels shuffled among them."""
        generator = random.Random(seed)
        generator.sample(self.pool, self.settings.demonstrations)
        memory = generator.sample(self.pool, self.settings.memory_demonstrations)
        labels = [each.label for each in memory]
        generator.shuffle(labels)
        return [self.kind.line(each._replace(label=label)) for each, label in zip(memory, labels, strict=True)]

    def prepare(self, system: System, shots: Shots) -> dict[str, Any]:
        """Return what `Task.prepare` does, and what the system makes of inputs without content."""
        record = super().prepare(system, shots)
        answers = system.score(self.content_free, self._prefix(system, shots))
        return {**record, "content_free": [[each.total for each in answer.candidates] for answer in answers]}

    def ask(self, system: System, shots: Shots, items: Sequence[int]) -> Iterator[Records]:
        """Yield the log-likelihoods of the label words and the likeliest token of each item."""
        prefix = self._prefix(system, shots)
        for first in range(0, len(items), ITEMS_PER_CALL):
            numbers = items[first : first + ITEMS_PER_CALL]
            start = time.perf_counter()
            answers = system.score([self.questions[number] for number in numbers], prefix)
            seconds = (time.perf_counter() - start) / len(numbers)
            yield [
                {
                    "item": number,
                    "group": digest(self.items[number].text),
                    "gold": self.items[number].label,
                    "likeliest": str(self.tokenizer.decode([answer.likeliest])),
                    "logprobs": [each.total for each in answer.candidates],
                    "seconds": seconds,
                }
                for number, answer in zip(numbers, answers, strict=True)
            ]

    def _prefix(self, system: System, shots: Shots) -> Line:
        return joined(window_lines(system, shots, self.rooms[0]))


class PassageTask(Task):
    """Questions about passages, answered in free text."""

    def __init__(self, name: str, settings: InContextSettings, model: LongMemForCausalLM) -> None:
        self.pool, evaluated = passages.load_parted(settings.squad, settings.seed)
        super().__init__(name, settings, model, repr((self.pool, evaluated)))
        items = [(passage, asked) for passage in evaluated for asked in passage.questions]
        self.items = [items[number] for number in spread(len(items), settings.limit)]
        self.lines = [self.line(passage.query(asked)) for passage, asked in self.items]
        self.rooms = [len(line) + settings.squad.max_new_tokens for line in self.lines]
        self._check_window()

    def draw(self, seed: int) -> tuple[list[str], list[str]]:
        """Return demonstrations, each about a passage of its own."""
        own = self.settings.squad
        return passages.draw(self.pool, seed, own.demonstrations, own.memory_demonstrations)

    def disguised(self, seed: int) -> list[str]:
        """Return the demonstrations for memory with the answers of one another."""
        heads, answers = zip(*(text.rsplit("\nAnswer:", 1) for text in self.draw(seed)[1]), strict=True)
        order = list(answers)
        random.Random(seed).shuffle(order)
        return [f"{head}\nAnswer:{answer}" for head, answer in zip(heads, order, strict=True)]

    def ask(self, system: System, shots: Shots, items: Sequence[int]) -> Iterator[Records]:
        """Yield the answer to each item; those with the same number of demonstrations before them share their run."""
        by_count: dict[int, list[int]] = {}
        for number in items:
            by_count.setdefault(len(window_lines(system, shots, self.rooms[number])), []).append(number)
        most = self.settings.squad.max_new_tokens
        for count, alike in sorted(by_count.items()):
            prefix = joined(shots.window[len(shots.window) - count :])
            for first in range(0, len(alike), ANSWERS_PER_CALL):
                numbers = alike[first : first + ANSWERS_PER_CALL]
                start = time.perf_counter()
                answers = system.generate([self.lines[number] for number in numbers], prefix, max_new_tokens=most)
                seconds = (time.perf_counter() - start) / len(numbers)
                yield [self._record(number, ids, count, seconds) for number, ids in zip(numbers, answers, strict=True)]

    def _record(self, number: int, ids: Line, count: int, seconds: float) -> dict[str, Any]:
        passage, asked = self.items[number]
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return {
            "item": number,
            "question": asked.id,
            "group": passage.title,
            "golds": list(asked.answers),
            "prediction": text_before(text, ["\n"]),
            "window_demonstrations": count,
            "seconds": seconds,
        }


def make_tasks(settings: InContextSettings, model: LongMemForCausalLM) -> dict[str, Task]:
    """Return the tasks of a run; whatever is wrong with data or window is found here."""
    return {name: (LabelledTask if name in SETS else PassageTask)(name, settings, model) for name in settings.sets}
