"""LongEval's prompts (Li and others, LongChat, 2023), taken apart: the record is in memory, its question in the window."""

import dataclasses
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from longmem.evaluation.folder import spread
from longmem.evaluation.task import Axis, Case
from longmem.evaluation.tasks.facts import ValueSettings, ValueTask, shuffled, value_item
from longmem.evaluation.tasks.files import in_format, lines_of
from longmem.memory.memorize import encodable
from longmem.model.modeling import LongMemForCausalLM

QUARTERS = 4  # facts lie anywhere; the figure has a row for each quarter of the record


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongEvalSettings(ValueSettings):
    """LongEval's files; wrong values are always those of other facts in the record. `limit` is of each task."""

    data: str
    """Folder with lines_*.jsonl and topics_*.jsonl, which may be gzipped."""

    tasks: tuple[Literal["lines", "topics"], ...] = ("lines", "topics")
    """lines: a number among many, by its line; topics: the first of several conversations."""


class LongEval(ValueTask):
    """Facts in LongEval's records, by file and distance; the wrong memory is the next record of the same task."""

    name, title, kind = "longeval", "LongEval", LongEvalSettings
    axes = (Axis("task", "panel"), Axis("file"), Axis("depth", "detail", "distance, share of the record"))
    wrong_shares = ("task",)

    def cases(self, model: LongMemForCausalLM) -> list[Case]:
        """Return a case for each prompt that is asked, and for those that are only a wrong memory."""
        found = []
        for task in self.settings.tasks:
            prompts = read_longeval(self.settings.data, task)
            chosen = set(spread(len(prompts), self.settings.limit))
            needed = chosen | {(number + 1) % len(prompts) for number in chosen}
            found += [self._case(model, task, prompts[number], number in chosen) for number in sorted(needed)]
        return found

    def _case(self, model: LongMemForCausalLM, task: str, prompt: "Prompt", is_asked: bool) -> Case:
        """Return a prompt in tokens. Raises ValueError if the tokenizer does not say where in a text tokens are."""
        source = encodable(model, prompt.record)
        if source.char_ends is None:
            raise ValueError("`model` must have a fast tokenizer, which says where in a text tokens are, got another.")
        size, distance = len(source.token_ids), int((source.char_ends > prompt.fact_end).sum())
        file = prompt.path.name.partition(".")[0]
        right, *others = prompt.values
        generator = random.Random(f"{self.settings.seed}/{prompt.path.name}/{prompt.number}")
        wrong = generator.sample(others, min(len(others), self.settings.num_choices - 1))
        values, place = shuffled(generator, right, wrong)
        about = {"size": size, "distance": distance}
        item = value_item(model.tokenizer, prompt.question, values, place, before_value=prompt.before_value, **about)
        return Case(
            name=f"{file}/{prompt.number}",
            group=f"{file}/{prompt.number}",
            items=[item] if is_asked else [],
            memory=[source.token_ids.tolist()],
            axes={"task": task, "file": file, "depth": round(QUARTERS * distance / size) / QUARTERS},
            max_new_tokens=self.max_new_tokens,
            stage=f"prompts of LongEval, {task}",
        )


class Prompt(NamedTuple):
    """A prompt of a file, taken apart."""

    path: Path
    number: int
    record: str
    fact_end: int  # character of the record after what is asked for
    question: str
    before_value: str  # between the question and each value
    values: Sequence[str]  # the right one first


def read_longeval(folder: str | Path, task: str) -> list[Prompt]:
    """Return the prompts of a task, file by file, from `lines_*.jsonl` or `topics_*.jsonl`, which may be gzipped."""
    files = [path for path in Path(folder).glob(f"{task}_*") if path.name.endswith((".jsonl", ".jsonl.gz"))]
    if not files:
        raise ValueError(f"`data` must be a folder with files {task}_*.jsonl or .jsonl.gz, got {str(folder)!r}.")
    prompts = []
    for path in sorted(files, key=lambda path: ([int(part) for part in re.findall(r"\d+", path.name)], path)):
        for number, line in enumerate(lines_of(path)):
            with in_format("a prompt of LongEval", f"{path}, line {number + 1},"):
                prompts.append(Prompt(path, number, *TAKE_APART[task](json.loads(line))))
    return prompts


def lines_apart(row: Mapping[str, Any]) -> tuple[str, int, str, str, Sequence[str]]:
    """Return the parts of a prompt about lines with numbers; the model is led to the number in the words of the lines."""
    record, question = at_end(row["prompt"], "Now the record is over.")
    line = row["correct_line"].strip()
    numbers = [str(row["expected_number"]), *re.findall(r"REGISTER_CONTENT is <(\d+)>", record)]
    # With their end, without which 1234 is the likelier the likelier 12345 is.
    values = [f"{number}>" for number in dict.fromkeys(numbers)]
    question = f"{question}\n{line.partition(':')[0]}: REGISTER_CONTENT is <"
    before, found, _ = record.partition(line)
    if not found:
        raise LookupError("`prompt` must have its `correct_line`")
    return record, len(before + line), question, "", values


def topics_apart(row: Mapping[str, Any]) -> tuple[str, int, str, str, Sequence[str]]:
    """Return the parts of a prompt about conversations, whose topics are written as in the record."""
    record, question = at_end(row["prompt"], "Now the record ends.")
    topics = list(dict.fromkeys(as_written(topic, record) for topic in row["topics"]))
    fact_end = record.index(topics[0]) + len(topics[0]) if topics[0] in record else 0
    return record, fact_end, f"{question}\nThe first topic we discussed is", " ", topics


TAKE_APART = {"lines": lines_apart, "topics": topics_apart}


def at_end(prompt: str, end: str) -> tuple[str, str]:
    """Return the record and the question, which begins with `end`."""
    record, found, question = prompt.rpartition(end)
    if not found:
        raise LookupError(f"`prompt` must have {end!r} before its question")
    return record, (found + question).strip()


def as_written(topic: str, record: str) -> str:
    """Return a topic with the capitals that it has in the record.

    >>> as_written("The history of Rome", "Let us discuss the history of Rome.")
    'the history of Rome'
    """
    found = re.search(re.escape(topic), record, flags=re.IGNORECASE)
    return topic if found is None else found[0]
