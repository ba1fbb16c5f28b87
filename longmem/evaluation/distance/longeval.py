"""LongEval's prompts (Li and others, LongChat, 2023), taken apart: the record is the stream, its last part the question."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longmem.evaluation.distance.facts import shuffled
from longmem.memory.memorize import encodable
from longmem.model.modeling import LongMemForCausalLM

# Where the record of a prompt ends and the question begins.
ENDS = {"longeval-lines": "Now the record is over.", "longeval-topics": "Now the record ends."}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt: `fact_end` is the character of the record after what is asked for.

    Values follow the question after `before_value`.
    """

    task: str
    file: str
    item: int
    record: str
    fact_end: int
    question: str
    values: tuple[str, ...]
    right: int
    before_value: str

    @property
    def trial_id(self) -> str:
        """Return the name of its record."""
        return f"{self.task}/{self.file}/{self.item}"


def read_longeval(folder: str | Path, task: str, num_choices: int, seed: int) -> list[Prompt]:
    """Return the prompts of a task, file by file, from `lines_*.jsonl` or `topics_*.jsonl`, which may be gzipped.

    Raises:
        ValueError: there are none, or a line is no prompt of LongEval.
    """
    start = task.partition("-")[2]
    files = sorted(path for path in Path(folder).glob(f"{start}_*") if path.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        raise ValueError(f"`longeval` must be a folder with files {start}_*.jsonl or .jsonl.gz, got {str(folder)!r}.")
    prompts = []
    for path in sorted(files, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)]):
        for number, row in enumerate(read_rows(path)):
            generator = random.Random(f"{seed}/{path.name}/{number}")
            try:
                prompts.append(PARSE[task](path.name.partition(".")[0], number, row, num_choices, generator))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number + 1}, must be a prompt of LongEval: {error!r}.") from error
    return prompts


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def parse_lines(file: str, item: int, row: Mapping[str, Any], num_choices: int, generator: random.Random) -> Prompt:
    """Return a prompt about lines with numbers; wrong values are numbers of other lines.

    The model is led to the number in the words of the lines.
    """
    record, question = split_prompt(row["prompt"], ENDS["longeval-lines"])
    line, right = row["correct_line"].strip(), str(row["expected_number"])
    key = line.partition(":")[0]
    fact_end = record.index(line) + len(line)
    numbers = dict.fromkeys(re.findall(r"REGISTER_CONTENT is <(\d+)>", record))
    others = [number for number in numbers if number != right]
    wrong = generator.sample(others, min(len(others), num_choices - 1))
    question = f"{question}\n{key}: REGISTER_CONTENT is <"
    # With their end, without which 1234 is the likelier the likelier 12345 is.
    values, place = shuffled(generator, f"{right}>", [f"{number}>" for number in wrong])
    return Prompt("longeval-lines", file, item, record, fact_end, question, values, place, before_value="")


def parse_topics(file: str, item: int, row: Mapping[str, Any], num_choices: int, generator: random.Random) -> Prompt:
    """Return a prompt about conversations; wrong values are the other topics, as the record writes them."""
    record, question = split_prompt(row["prompt"], ENDS["longeval-topics"])
    topics = list(dict.fromkeys(as_written(topic, record) for topic in row["topics"]))
    right, *others = topics
    wrong = generator.sample(others, min(len(others), num_choices - 1))
    fact_end = record.index(right) + len(right) if right in record else 0
    question = f"{question}\nThe first topic we discussed is"
    values, place = shuffled(generator, right, wrong)
    return Prompt("longeval-topics", file, item, record, fact_end, question, values, place, before_value=" ")


PARSE = {"longeval-lines": parse_lines, "longeval-topics": parse_topics}


def split_prompt(prompt: str, end: str) -> tuple[str, str]:
    """Return the record and the question, which begins with `end`."""
    place = prompt.rfind(end)
    if place < 0:
        raise ValueError(f"`prompt` must have {end!r} before its question")
    return prompt[:place], prompt[place:].strip()


def as_written(topic: str, record: str) -> str:
    """Return a topic with the capitals that it has in the record.

    >>> as_written("The history of Rome", "Let us discuss the history of Rome.")
    'the history of Rome'
    """
    found = re.search(re.escape(topic), record, flags=re.IGNORECASE)
    return topic if found is None else found[0]


def tokens_and_distance(model: LongMemForCausalLM, prompt: Prompt) -> tuple[list[int], int]:
    """Return the tokens of the record, and how many of them lie wholly behind the fact.

    Raises:
        ValueError: the tokenizer does not say which characters a token stands for.
    """
    source = encodable(model, prompt.record)
    if source.char_ends is None:
        raise ValueError(
            "`model` must have a fast tokenizer for LongEval: others do not say where in a text tokens are."
        )
    return source.ids.tolist(), int((source.char_ends > prompt.fact_end).sum())
