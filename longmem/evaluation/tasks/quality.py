"""QuALITY: multiple-choice questions about stories and articles of 2,000 to 8,000 tokens (Pang et al. 2022).

Two files are read: QuALITY's own (github.com/nyu-mll/quality, `QuALITY.v1.0.1.htmlstripped.dev` and its kin), which has a
line for each set of questions about an article, and L-Eval's selection `quality.jsonl` (github.com/OpenLMLab/LEval).
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from longmem.evaluation.task import Measure, Record, best, per_token
from longmem.evaluation.tasks.files import in_format, lines_of
from longmem.evaluation.tasks.reading import Asked, Document, ReadingSettings, ReadingTask

LETTERS = "ABCDEFGHIJ"

_OPTION = re.compile(r"\s*\n\s*\(([A-J])\)\s*")
_ANSWER = re.compile(r"\s*\(?([A-J])(?:[).:,]|\s*$)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualitySettings(ReadingSettings):
    """Multiple choice on articles; `data` is QuALITY's own file or L-Eval's quality.jsonl."""

    style: Literal["text", "letter"] = "text"
    """text: the options are compared as continuations, per token and summed. letter: they stand in the question, and their
    letters are compared."""


class Quality(ReadingTask):
    """Multiple choice: the choice is the likeliest option or, of a written answer, the letter with which it begins."""

    name, title, kind = "quality", "QuALITY", QualitySettings
    baselines = {"longest": "longest option"}  # the one with the most characters, which needs no reading

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Return the rules by which an option is chosen."""
        rules = ("by letter",) if self.settings.style == "letter" else ("per token", "summed")
        return {rule: Measure(f"accuracy, {rule}", has_chance=True) for rule in rules}

    def score(self, record: Record) -> Mapping[str, float]:
        if "choice" in record:
            choices = dict.fromkeys(self.measures, record["choice"])
        elif "prediction" in record:
            choices = {"by letter": chosen_letter(record["prediction"])}
        elif self.settings.style == "letter":
            choices = {"by letter": best(record["logprobs"])}
        else:
            choices = {"per token": best(per_token(record)), "summed": best(record["logprobs"])}
        golds = {number for number, option in enumerate(record["options"]) if option == record["gold"]}
        return {rule: float(choice in golds) for rule, choice in choices.items()}

    def chance(self, record: Record) -> float:
        return 1 / len(record["options"])

    def prompt(self, asked: Asked) -> str:
        """Return what is asked after the article; with letters, the options are in it."""
        if self.settings.style == "text":
            return f"\n\nQuestion: {asked.question}\nAnswer:"
        options = "".join(f"\n({letter}) {option}" for letter, option in zip(LETTERS, asked.options, strict=False))
        return f"\n\nQuestion: {asked.question}{options}\nAnswer: ("

    def candidates(self, asked: Asked) -> list[str]:
        """Return one continuation for each option."""
        if self.settings.style == "text":
            return [f" {option}" for option in asked.options]
        return list(LETTERS[: len(asked.options)])

    @staticmethod
    def read(path: Path) -> list[Document]:
        """Return the articles of a file with their questions; its lines say which of the two formats it has."""
        documents: dict[str, Document] = {}
        with in_format("JSON on each line", path):
            rows = [json.loads(line) for line in lines_of(path)]
        for number, row in enumerate(rows, start=1):
            if isinstance(row, dict) and {"article", "questions"} <= row.keys():
                # Several lines, of different authors of questions, may share an article: it is read once.
                name = str(row.get("article_id", number))
                text, asked = row["article"], official(name, str(row.get("set_unique_id", number)), row["questions"])
            elif isinstance(row, dict) and {"input", "instructions", "outputs"} <= row.keys():
                name = str(number)
                text, asked = row["input"], leval(name, row["instructions"], row["outputs"])
            else:
                raise ValueError(
                    f"`data` must have lines with article and questions (QuALITY) or with input, instructions and outputs "
                    f"(L-Eval), line {number} of {path} has neither."
                )
            before = documents[name].asked if name in documents else ()
            documents[name] = Document(name, (text,), (*before, *asked))
        return list(documents.values())


def official(document: str, part: str, questions: Sequence[Mapping[str, Any]]) -> Iterator[Asked]:
    """Yield the questions of a line of QuALITY's own file."""
    for number, each in enumerate(questions, start=1):
        options, gold = tuple(option.strip() for option in each["options"]), each.get("gold_label")
        name = f"{part}/{number}"
        if not isinstance(gold, int) or not 1 <= gold <= len(options):
            place = f"question {document}/{name}; the test split has no public answers, use dev"
            raise ValueError(f"`gold_label` must be from 1 to {len(options)}, got {gold!r} in {place}.")
        yield Asked(name=name, question=each["question"].strip(), options=options, answer=options[gold - 1])


def leval(document: str, instructions: Sequence[str], outputs: Sequence[str]) -> Iterator[Asked]:
    """Yield the questions of a line of L-Eval's file."""
    for number, (instruction, output) in enumerate(zip(instructions, outputs, strict=True), start=1):
        question, *rest = _OPTION.split(instruction)
        letters, options = rest[::2], tuple(option.strip() for option in rest[1::2])
        gold = _ANSWER.match(output)
        if letters != list(LETTERS[: len(options)]) or len(options) < 2 or gold is None or gold[1] not in letters:
            raise ValueError(
                f"`instructions` must end with options (A), (B), ... on lines of their own, and `outputs` name one of them, "
                f"got options {letters} and output {output!r} in question {document}/{number}."
            )
        answer = options[letters.index(gold[1])]
        yield Asked(name=str(number), question=question.strip(), options=options, answer=answer)


def chosen_letter(text: str) -> int | None:
    """Return the number of the option whose letter a written answer begins with, None where it begins with none.

    >>> [chosen_letter(text) for text in ("B", " (C) the whale", "A whale", "D. No")]
    [1, 2, None, 3]
    """
    found = _ANSWER.match(text)
    return LETTERS.index(found[1]) if found else None
