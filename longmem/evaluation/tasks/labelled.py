"""In-context learning on the paper's five classification sets: 20 demonstrations in the window, 2,000 in memory.

Sets, draws, prompts and the first of three measures are those of LongMem's released script (eval_longmem_icl.py).
"""

import csv
import dataclasses
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from longmem.data.sources import load_rows
from longmem.errors import name_known
from longmem.evaluation.folder import digest
from longmem.evaluation.systems import Answer, Question, System
from longmem.evaluation.task import Axis, Case, Item, Measure, Record, best
from longmem.evaluation.tasks.demonstrations import Demonstration, DemonstrationSettings, DemonstrationTask, Tokens
from longmem.model.modeling import LongMemForCausalLM
from longmem.settings import read_section


class Example(NamedTuple):
    """A text and the number of its label word."""

    text: str
    label: int


class LabelledSet(NamedTuple):
    """What a set is called and how it is asked, as in the released script."""

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


def rows_of_file(path: Path, kind: LabelledSet, *, official: bool) -> Iterator[tuple[str, str, str]]:
    """Yield place, text and label of a file in LongMem's layout: .tsv with a head, text and label; others without, label first.

    With `official` .csv is read line by line, as the released script does: the label is the first character, the text begins
    at the third, and quotation marks stay, but for those at the ends of a set that strips them.
    """
    if not path.is_file():
        raise ValueError(
            f"`data` must be a folder with LongMem's files of the classification sets, but {str(path)!r} is missing; name "
            "the folder that holds SST-2, mr, subj, sst-5 and mpqa, or choose other `sets`."
        )
    is_csv = path.suffix == ".csv" and not official
    with path.open(encoding="utf-8", newline="" if is_csv else None) as file:
        reader = csv.reader(file if is_csv else ())
        for row in reader:
            place = f"{path}, line {reader.line_num},"
            if len(row) != 2:
                raise ValueError(f"{place} must be label,text, got {len(row)} columns: {row!r}.")
            yield place, row[1], row[0]
        for number, line in enumerate(file, start=1):  # nothing is left of CSV
            line = line.strip("\n")
            text, label = line[2:].strip('"' if kind.strips_quotes else ""), line[:1]
            if path.suffix == ".tsv":
                text, _, label = line.rpartition("\t")
            if path.suffix != ".tsv" or label != "label":  # the head
                yield f"{path}, line {number},", text, label


def rows_of_columns(source: Source, split: str) -> Iterator[tuple[str, str, Any]]:
    """Yield place, text and label of the rows in one split of a data set."""
    for number, row in enumerate(load_rows(source.path, source.configuration, split), start=1):
        place = f"row {number} of {split} of {source.path!r}"
        for column in (source.text, source.label):
            if column not in row:
                raise ValueError(f"`sources` must name columns of {place}, got {column!r}; {name_known(column, row)}")
        if not isinstance(row[source.text], str):
            raise ValueError(f"`{source.text}` must be a column of texts, got {row[source.text]!r} in {place}.")
        yield place, row[source.text], row[source.label]


def examples_of(
    rows: Iterable[tuple[str, str, Any]], kind: LabelledSet, words: Sequence[str], name: str
) -> list[Example]:
    """Return the examples in rows, at least one; `words` say which labels the numbers are, `name` where the rows are from."""
    found = []
    for place, text, label in rows:
        if label not in words:
            number = int(label) if isinstance(label, str) and label.isdecimal() else label
            if not isinstance(number, int) or not 0 <= number < len(words):
                raise ValueError(
                    f"{place} must have as its label a number from 0 to {len(words) - 1} or one of {', '.join(words)}, got "
                    f"{label!r} with text {text[:40]!r}; name another column or file, or a split that has labels."
                )
            label = words[number]
        found.append(Example(text, kind.words.index(label)))
    if not found:
        raise ValueError(f"`data` must hold examples, got none in {name}.")
    return found


CONTENT_FREE = ("N/A", "", "[MASK]")
SetName = Literal["sst-2", "mr", "subj", "sst-5", "mpqa"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledSettings(DemonstrationSettings):
    """Labels of texts, after demonstrations."""

    sets: tuple[SetName, ...] = ("sst-2", "mr", "subj", "sst-5", "mpqa")
    """What is asked."""

    data: str | None = None
    """Folder of the sets in the layout of LongMem's data/icl/original: SST-2, mr, subj, sst-5, mpqa."""

    sources: dict[str, Any] = dataclasses.field(default_factory=dict)
    """By set, what to read instead of files in `data`: sections with the fields of `Source`."""

    official_files: bool = True
    """Read the CSV files of mr, subj and mpqa line by line, as the released script does, so that most quotation marks of
    the CSV format stay in the texts; false: read CSV as CSV."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.sources:
            self.source(name)
        from_files = [name for name in self.sets if name not in self.sources]
        if from_files and self.data is None:
            names = ", ".join(from_files)
            raise ValueError(f"`data` must name the folder with the files of {names}; or give `sources`.")

    def source(self, name: str) -> Source:
        """Return where a set comes from that is not read from files in `data`."""
        if name not in SETS:
            raise ValueError(f"`sources` must name classification sets, got {name!r}; {name_known(name, SETS)}")
        source = read_section(Source, self.sources[name], place=f"sources.{name}")
        if source.labels is not None and sorted(source.labels) != sorted(SETS[name].words):
            raise ValueError(
                f"`sources.{name}.labels` must be the words {', '.join(SETS[name].words)}, got {list(source.labels)}."
            )
        return source


class Labelled(DemonstrationTask):
    """The likelihoods of label words are compared."""

    name, title, kind = "in-context", "in-context learning", LabelledSettings
    axes, pool = (Axis("set", "panel"), Axis("seed", "repeat")), "panels"
    baselines = {"majority": "most frequent label"}
    asked_at_once = 256  # each call runs the demonstrations in the window once more
    measures = {name: Measure(name) for name in ("prefix rule", "label words", "calibrated")}

    def __init__(self, settings: LabelledSettings) -> None:
        super().__init__(settings, settings.sets)

    def score(self, record: Record) -> Mapping[str, float]:
        gold = record["gold"]
        if "choice" in record:
            return dict.fromkeys(self.measures, float(record["choice"] == gold))
        logprobs = record["logprobs"]
        return {
            "prefix rule": float(prefix_rule(record["likeliest"], SETS[record["set"]].words[gold])),
            "label words": float(best(logprobs) == gold),
            "calibrated": float(calibrated_label(logprobs, record["content_free"]) == gold),
        }

    @property
    def run_title(self) -> str:
        return f"{self.settings.model_title}: {self.title}, {', '.join(self.sets)}"

    @property
    def notes(self) -> Sequence[str]:
        return (
            *super().notes,
            "Prefix rule: the likeliest token, blanks aside, begins the label word (LongMem's released script). Label words: "
            "the likeliest of the label words. Calibrated: the same after contextual calibration (Zhao et al. 2021).",
        )

    def load(self, name: str) -> tuple[list[Example], list[Example]]:
        """Return the examples to draw from and those that are asked, in the order of the files."""
        own, kind = self.settings, SETS[name]
        if name in own.sources:
            source = own.source(name)
            words, splits = source.labels or kind.words, ("train", source.split or kind.split)
            parts = [(f"{split} of {source.path!r}", rows_of_columns(source, split)) for split in splits]
        else:
            words, paths = kind.words, [Path(own.data).expanduser() / kind.folder / file for file in kind.files]
            parts = [(str(path), rows_of_file(path, kind, official=own.official_files)) for path in paths]
        shown, asked = (examples_of(rows, kind, words, place) for place, rows in parts)
        if max(own.demonstrations, own.memory_demonstrations) > len(shown):
            raise ValueError(
                f"`demonstrations` and `memory_demonstrations` must be at most the examples of {name}, {len(shown)}, got "
                f"{own.demonstrations} and {own.memory_demonstrations}; lower the larger."
            )
        return shown, asked

    def draw(self, name: str, seed: int) -> tuple[list[Demonstration], list[Demonstration], random.Random]:
        """Return the released script's demonstrations: two samples, one after the other, of one generator."""
        pool = [SETS[name].shown(each) for each in self.examples[name][0]]
        generator = random.Random(seed)
        window = generator.sample(pool, self.settings.demonstrations)
        return window, generator.sample(pool, self.settings.memory_demonstrations), generator

    def items(self, name: str, chosen: Sequence[Example], tokens: Tokens) -> Iterator[Item]:
        """Yield the texts with all label words; equal texts are one group."""
        words = label_words(SETS[name], tokens)
        ((majority, _),) = Counter(each.label for each in chosen).most_common(1)
        guesses = {"majority": {"choice": majority}}
        for number, each in enumerate(chosen):
            ids = tokens(SETS[name].prompt.format(each.text))
            about = {"group": digest(each.text), "number": number, "gold": each.label}
            yield Item(name=str(number), token_ids=ids, candidates=words, about=about, guesses=guesses)

    def content_free(self, name: str, tokens: Tokens) -> list[Item]:
        words = label_words(SETS[name], tokens)
        return [Item(token_ids=tokens(SETS[name].prompt.format(text)), candidates=words) for text in CONTENT_FREE]

    def prepare(self, system: System, case: Any, wrong: Case | None) -> dict[str, Any]:
        """Have a system read demonstrations; return how many, and what it makes of inputs without content."""
        counts = super().prepare(system, case, wrong)
        questions = [Question(item.token_ids, item.candidates) for item in case.content_free]
        answers = system.score(questions, self.prefix(system, case, case.items[0]))
        return {**counts, "content_free": [[each.total for each in answer.candidates] for answer in answers]}

    def answered(self, model: LongMemForCausalLM, answer: Answer) -> dict[str, Any]:
        """Return the log-likelihoods of the label words, and the likeliest token."""
        return {**super().answered(model, answer), "likeliest": str(model.tokenizer.decode([answer.likeliest]))}


def label_words(kind: LabelledSet, tokens: Tokens) -> list[list[int]]:
    """Return the words as they are tokenised behind a text, without what begins a line."""
    tail = kind.prompt.format("x")
    return [tokens(f"{tail} {word}")[len(tokens(tail)) :] for word in kind.words]


def prefix_rule(likeliest: str, gold_word: str) -> bool:
    """Return whether the likeliest token begins the gold label word, blanks aside (LongMem's released script).

    Nothing is restricted to label words, and a token may be as short as one letter.

    >>> prefix_rule(" pos", "positive"), prefix_rule(" ", "positive"), prefix_rule(" positively", "positive")
    (True, False, False)
    """
    token = likeliest.strip()
    return token != "" and gold_word.startswith(token)


def calibrated_label(logprobs: Sequence[float], content_free: Sequence[Sequence[float]]) -> int:
    """Return the likeliest label after contextual calibration (Zhao et al. 2021, arXiv 2102.09690).

    Probabilities are restricted to the label words, and divided by their mean over inputs without content.
    """
    probabilities = torch.tensor(content_free, dtype=torch.float64).softmax(dim=1)
    # In logarithms, and above 0: a label that was never likely does not divide by 0.
    means = probabilities.mean(dim=0).clamp_min(1e-300).log().tolist()
    return best([value - mean for value, mean in zip(logprobs, means, strict=True)])
