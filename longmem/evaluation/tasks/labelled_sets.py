"""The five classification sets of the paper (arXiv 2306.07174): their files, prompts, label words and examples."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longmem.data.sources import load_rows
from longmem.errors import did_you_mean
from longmem.evaluation.tasks.demonstrations import Demonstration


class Example(NamedTuple):
    """A text and the number of its label word."""

    text: str
    label: int


class LabelledSet(NamedTuple):
    """What a set is called and how it is asked, as in LongMem's released script (eval_longmem_icl.py)."""

    folder: str  # of its files in LongMem's data/icl/original
    files: tuple[str, str]  # with the demonstrations, and with what is evaluated
    split: str  # that is evaluated, where splits have names; demonstrations are always from "train"
    prompt: str  # of a text, up to its label
    words: tuple[str, ...]  # of the labels 0, 1, ...
    strips_quotes: bool = False  # whether the released script takes quotation marks off both ends of a text

    def shown(self, example: Example) -> Demonstration:
        """Return an example with its label.

        >>> "".join(SETS["mr"].shown(Example("a quiet film", 1)))
        'Review: a quiet film Sentiment: positive. '
        """
        return Demonstration(self.prompt.format(example.text), f" {self.words[example.label]}. ")


_REVIEW, _INPUT = "Review: {} Sentiment:", "Input: {} Type:"
_TWO, _FIVE = ("negative", "positive"), ("terrible", "bad", "okay", "good", "great")
_CSV = ("train.csv", "test.csv")

SETS = {
    "sst-2": LabelledSet("SST-2", ("train.tsv", "dev.tsv"), "validation", _REVIEW, _TWO),
    "mr": LabelledSet("mr", _CSV, "test", _REVIEW, _TWO),
    "subj": LabelledSet("subj", _CSV, "test", _INPUT, ("subjective", "objective"), strips_quotes=True),
    "sst-5": LabelledSet("sst-5", ("stsa.fine.train", "stsa.fine.dev"), "validation", _REVIEW, _FIVE),
    "mpqa": LabelledSet("mpqa", _CSV, "test", _REVIEW, _TWO),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a classification set comes from if not from files in LongMem's layout."""

    path: str
    """Name of a data set on the Hub, folder that `Dataset.save_to_disk` wrote, or folder that `datasets.load_dataset` reads."""

    configuration: str | None = None
    """Of the data set, where it has several."""

    text: str = "text"
    """Column of the texts."""

    label: str = "label"
    """Column of the labels: numbers, or label words."""

    labels: tuple[str, ...] | None = None
    """Label words by the numbers that the column has, for data sets that count otherwise; None: those of the set, SST-5
    terrible, bad, okay, good, great; Subj subjective, objective; the others negative, positive."""

    split: str | None = None
    """Split that is evaluated; None: validation for SST-2 and SST-5, test for the others. Demonstrations are from train."""


def from_file(path: Path, kind: LabelledSet, *, official: bool) -> list[Example]:
    """Return the examples in a file of LongMem's layout: .tsv with a head, text and label; any other without, label and text.

    With `official` .csv is read line by line, as the released script does: the label is the first character, the text begins
    at the third, and quotation marks stay, but for those at the ends of a set that strips them.
    """
    if not path.is_file():
        raise ValueError(
            f"`data` must be a folder with LongMem's files of the classification sets, but {str(path)!r} is missing; name "
            "the folder that holds SST-2, mr, subj, sst-5 and mpqa, or choose other `sets`."
        )
    rows = csv_rows(path) if path.suffix == ".csv" and not official else lines(path, kind)
    return _some([_example(text, label, kind, kind.words, f"{path}, line {n},") for n, text, label in rows], str(path))


def csv_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield number of line, text and label of the rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        for row in reader:
            if len(row) != 2:
                raise ValueError(
                    f"{path}, line {reader.line_num}, must be label,text, got {len(row)} columns: {row!r}."
                )
            yield reader.line_num, row[1], row[0]


def lines(path: Path, kind: LabelledSet) -> Iterator[tuple[int, str, str]]:
    """Yield number, text and label of the lines of a file, read as the released script does."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            line = line.strip("\n")
            text, label = line[2:].strip('"' if kind.strips_quotes else ""), line[:1]
            if path.suffix == ".tsv":
                text, _, label = line.rpartition("\t")
            if path.suffix != ".tsv" or label != "label":  # the head
                yield number, text, label


def from_columns(source: Source, kind: LabelledSet, split: str) -> list[Example]:
    """Return the examples in one split of a data set."""
    examples = []
    for number, row in enumerate(load_rows(source.path, source.configuration, split), start=1):
        where = f"row {number} of {split} of {source.path!r}"
        for column in (source.text, source.label):
            if column not in row:
                raise ValueError(
                    f"`sources` must name columns that are there, got {column!r} for {where}, which has {', '.join(row)}."
                    f"{did_you_mean(column, row)}"
                )
        if not isinstance(row[source.text], str):
            raise ValueError(f"`{source.text}` must be a column of texts, got {row[source.text]!r} in {where}.")
        examples.append(_example(row[source.text], row[source.label], kind, source.labels or kind.words, where))
    return _some(examples, f"{split} of {source.path!r}")


def _example(text: str, label: Any, kind: LabelledSet, words: Sequence[str], where: str) -> Example:
    """Return an example; `words` say which labels the numbers are."""
    if label not in words:
        number = int(label) if isinstance(label, str) and label.isdecimal() else label
        if not isinstance(number, int) or not 0 <= number < len(words):
            raise ValueError(
                f"{where} must have as its label a number from 0 to {len(words) - 1} or one of {', '.join(words)}, got "
                f"{label!r} with text {text[:40]!r}; name another column or file, or a split that has labels."
            )
        label = words[number]
    return Example(text, kind.words.index(label))


def _some(examples: list[Example], where: str) -> list[Example]:
    if not examples:
        raise ValueError(f"`data` must hold examples, got none in {where}.")
    return examples
