"""In-context learning on the paper's five classification sets: 20 demonstrations in the window, 2,000 in memory.

Draws, prompts and the first of three measures are those of LongMem's released script (eval_longmem_icl.py).
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from longmem.errors import did_you_mean
from longmem.evaluation.folder import digest
from longmem.evaluation.settings import validate_different
from longmem.evaluation.systems import Answer, Question, System
from longmem.evaluation.task import Axis, Case, Item, Measure, Record, best
from longmem.evaluation.tasks import demonstrations
from longmem.evaluation.tasks.demonstrations import Demonstration, Tokens
from longmem.evaluation.tasks.labelled_sets import SETS, Example, LabelledSet, Source, from_columns, from_file
from longmem.model.modeling import LongMemForCausalLM
from longmem.settings import read_section

CONTENT_FREE = ("N/A", "", "[MASK]")
SetName = Literal["sst-2", "mr", "subj", "sst-5", "mpqa"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledSettings(demonstrations.DemonstrationSettings):
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
        validate_different("sets", self.sets)
        for name in self.sources:
            self.source(name)
        from_files = [name for name in self.sets if name not in self.sources]
        if from_files and self.data is None:
            raise ValueError(
                f"`data` must name the folder with the files of {', '.join(from_files)}; add data=FOLDER, or give "
                "`sources` for them."
            )

    def source(self, name: str) -> Source:
        """Return where a set comes from that is not read from files in `data`."""
        if name not in SETS:
            raise ValueError(
                f"`sources` must name classification sets, {', '.join(SETS)}, got {name!r}.{did_you_mean(name, SETS)}"
            )
        source = read_section(Source, self.sources[name], place=f"sources.{name}")
        if source.labels is not None and sorted(source.labels) != sorted(SETS[name].words):
            raise ValueError(
                f"`sources.{name}.labels` must be the words {', '.join(SETS[name].words)} in the order of the data set's "
                f"numbers, got {list(source.labels)}."
            )
        return source


class Labelled(demonstrations.DemonstrationTask):
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
            shown, asked = (from_columns(source, kind, split) for split in ("train", source.split or kind.split))
        else:
            places = (Path(own.data).expanduser() / kind.folder / file for file in kind.files)
            shown, asked = (from_file(place, kind, official=own.official_files) for place in places)
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

    def items(self, name: str, chosen: Sequence[Example], tokens: Tokens) -> list[Item]:
        """Return the texts with all label words; equal texts are one group."""
        words = label_words(SETS[name], tokens)
        ((majority, _),) = Counter(each.label for each in chosen).most_common(1)
        return [
            Item(
                name=str(number),
                token_ids=tokens(SETS[name].prompt.format(each.text)),
                candidates=words,
                about={"group": digest(each.text), "number": number, "gold": each.label},
                guesses={"majority": {"choice": majority}},
            )
            for number, each in enumerate(chosen)
        ]

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
