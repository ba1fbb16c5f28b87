"""The five classification sets of the paper (arXiv 2306.07174): their files, prompts and label words."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class Example(NamedTuple):
    """A text and the number of its label word."""

    text: str
    label: int


@dataclasses.dataclass(frozen=True)
class LabelledSet:
    """What a set is called and how it is asked, as in LongMem's released script (eval_longmem_icl.py).

    Args:
        folder: of its files in LongMem's `data/icl/original`.
        files: with the demonstrations, and with what is evaluated.
        split: that is evaluated, where splits have names; demonstrations are always from "train".
        template: of a demonstration: text, label word.
        words: of the labels 0, 1, ...
        strips_quotes: whether the released script takes quotation marks off both ends of a text.
    """

    folder: str
    files: tuple[str, str]
    split: str
    template: str
    words: tuple[str, ...]
    strips_quotes: bool = False

    def line(self, example: Example) -> str:
        """Return a demonstration.

        >>> SETS["mr"].line(Example("a quiet film", 1))
        'Review: a quiet film Sentiment: positive. '
        """
        return self.template.format(example.text, self.words[example.label])

    def query(self, text: str) -> str:
        """Return a demonstration up to its label.

        >>> SETS["subj"].query("a ship sails")
        'Input: a ship sails Type:'
        """
        return self.template.rpartition(" {}")[0].format(text)


_REVIEW, _INPUT = "Review: {} Sentiment: {}. ", "Input: {} Type: {}. "
_TWO, _FIVE = ("negative", "positive"), ("terrible", "bad", "okay", "good", "great")
_CSV = ("train.csv", "test.csv")

SETS = {
    "sst-2": LabelledSet("SST-2", ("train.tsv", "dev.tsv"), "validation", _REVIEW, _TWO),
    "mr": LabelledSet("mr", _CSV, "test", _REVIEW, _TWO),
    "subj": LabelledSet("subj", _CSV, "test", _INPUT, ("subjective", "objective"), strips_quotes=True),
    "sst-5": LabelledSet("sst-5", ("stsa.fine.train", "stsa.fine.dev"), "validation", _REVIEW, _FIVE),
    "mpqa": LabelledSet("mpqa", _CSV, "test", _REVIEW, _TWO),
}
