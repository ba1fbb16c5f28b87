"""Examples of the classification sets, from files in LongMem's layout or from a data set's columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longmem.errors import did_you_mean
from longmem.evaluation.in_context.hub import load_rows
from longmem.evaluation.in_context.sets import SETS, Example, LabelledSet
from longmem.evaluation.in_context.settings import InContextSettings, Source


def load_examples(settings: InContextSettings, name: str) -> tuple[list[Example], list[Example]]:
    """Return the examples that demonstrations are drawn from and those that are evaluated, in the order of the files.

    Raises:
        ValueError: a file or column is missing, or a line or row has no text or no known label.
    """
    source, kind = settings.source(name), SETS[name]
    if source is not None:
        demonstrations, evaluated = (
            from_columns(source, kind, split) for split in ("train", source.split or kind.split)
        )
    else:
        folder = Path(settings.data or "") / kind.folder
        demonstrations, evaluated = (
            from_file(folder / file, kind, official=settings.official_files) for file in kind.files
        )
    return demonstrations, evaluated


def from_file(path: Path, kind: LabelledSet, *, official: bool) -> list[Example]:
    """Return the examples in a file of LongMem's layout.

    Args:
        path: .tsv with a head, text and label; .csv or any other without, label and text.
        kind: what its labels mean.
        official: read .csv line by line, as the released script does: the label is the first character, the text
            begins at the third, and quotation marks stay, but for those at the ends of a set that strips them.
    """
    if not path.is_file():
        raise ValueError(
            f"`data` must be a folder with LongMem's files of the classification sets, but {str(path)!r} is missing; name "
            "the folder that holds SST-2, mr, subj, sst-5 and mpqa, or choose other `sets`."
        )
    examples = []
    for number, text, label in _fields(path, kind, official):
        if not label.isdecimal() or int(label) >= len(kind.words):
            raise ValueError(
                f"{path}, line {number}, must have a label from 0 to {len(kind.words) - 1}, got {label!r} with text "
                f"{text[:40]!r}."
            )
        examples.append(Example(text, int(label)))
    return _some(examples, str(path))


def from_columns(source: Source, kind: LabelledSet, split: str) -> list[Example]:
    """Return the examples in one split of a data set."""
    words = source.labels or kind.words
    examples = []
    for number, row in enumerate(load_rows(source.path, source.configuration, split), start=1):
        where = f"row {number} of {split} of {source.path!r}"
        text, label = (_column(row, column, where) for column in (source.text, source.label))
        if isinstance(label, str) and label in words:
            word = label
        elif isinstance(label, int) and 0 <= label < len(words):
            word = words[label]
        else:
            raise ValueError(
                f"`{source.label}` must be a number from 0 to {len(words) - 1} or one of {', '.join(words)}, got {label!r} in "
                f"{where}; name another column with `label`, or a split that has labels."
            )
        if not isinstance(text, str):
            raise ValueError(f"`{source.text}` must be a column of texts, got {text!r} in {where}.")
        examples.append(Example(text, kind.words.index(word)))
    return _some(examples, f"{split} of {source.path!r}")


def _fields(path: Path, kind: LabelledSet, official: bool) -> Iterator[tuple[int, str, str]]:
    """Yield line number, text and label."""
    if path.suffix == ".csv" and not official:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if len(row) != 2:
                    raise ValueError(
                        f"{path}, line {reader.line_num}, must be label,text, got {len(row)} columns: {row!r}."
                    )
                yield reader.line_num, row[1], row[0]
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            line = line.strip("\n")
            if path.suffix == ".tsv":
                text, _, label = line.rpartition("\t")
                if label != "label":  # the head
                    yield number, text, label
            else:
                text = line[2:]
                yield number, text.strip('"') if kind.strips_quotes else text, line[:1]


def _column(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise ValueError(
            f"`sources` must name columns that are there, got {column!r} for {where}, which has {', '.join(row)}."
            f"{did_you_mean(column, row)}"
        )
    return row[column]


def _some(examples: list[Example], where: str) -> list[Example]:
    if not examples:
        raise ValueError(f"`data` must hold examples, got none in {where}.")
    return examples
