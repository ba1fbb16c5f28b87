"""Settings of the experiments on staleness."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Annotated, Literal, TypeVar

from experiments.learned_recall.check import NUM_PAIRS
from experiments.learned_recall.task import RecallTask
from experiments.staleness.learning import SYSTEMS as LEARNING_SYSTEMS
from experiments.staleness.learning import LearningSettings
from experiments.staleness.systems import SYSTEMS
from longmem.evaluation.settings import load_evaluation
from longmem.settings import Above, From, UpTo

Count = Annotated[int, From(1)]
Number = Annotated[int, From(0)]
Positive = Annotated[float, Above(0)]

Experiment = Literal["policies", "learning", "content"]
Regime = Literal["swap", "fine-tune"]
Asking = Literal["shared", "selected"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReaderSettings:
    """How the models are made: optimizer steps, and how far the fine-tuned encoder moves."""

    backbone_steps: Count = 1000
    """Of both backbones, from their random start."""

    side_steps: Count = 200
    """Of the side networks of the writer and of the swapped reader."""

    practice_distance: Number = 1024
    """Tokens of other text in memory while they learn."""

    tune_steps: Count = 150
    """Of the fine-tuned backbone, after `backbone_steps`."""

    tune_rate: Positive = 3e-3
    """Its learning rate: that of its training."""

    side_tune_steps: Count = 100
    """Of the fine-tuned reader's side network, which starts as the writer's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LibrarySettings:
    """Sizes of a library, one bank of documents, and of the questions about it."""

    num_documents: Count = 20
    """In the bank."""

    num_pairs: Count = 8
    """Of keys and values that a document has, anywhere in its text."""

    min_tokens: Count = 1024
    """Of the shortest document."""

    max_tokens: Count = 2048
    """Of the longest."""

    asked_share: Annotated[float, Above(0), UpTo(1)] = 0.5
    """Of the documents that are ever asked about."""

    num_windows: Annotated[int, From(2)] = 40
    """Windows of questions, one after the other, each about one document."""

    num_questions: Count = 6
    """In a window, about different pairs."""

    words_before: Number = 32
    """A key that is asked."""

    def __post_init__(self) -> None:
        """Check what is beyond types and ranges."""
        if self.num_questions > self.num_pairs:
            raise ValueError(
                f"`num_questions` must be at most `num_pairs`, {self.num_pairs}, for a window asks about different pairs, got "
                f"{self.num_questions}."
            )
        if not 2 * self.num_pairs <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"`min_tokens` must be from {2 * self.num_pairs}, so that the pairs fit, to `max_tokens`, "
                f"{self.max_tokens}, got {self.min_tokens}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StalenessSettings:
    """What is measured, and where the results go."""

    output: str
    """Folder for everything that the run writes, trained models too. A run that was stopped goes on with the same settings."""

    experiment: Experiment = "policies"
    """policies: what each refresh policy costs and recovers when the encoder changes; learning: whether a reader learns
    beside a writer that moves; content: how superseded texts are kept from being read."""

    seeds: tuple[Number, ...] = (0, 1, 2)
    """Each gives models, documents and questions of its own; more may be added to a run that is finished."""

    num_keys: Count = 256
    """Of the recall task: token ids that can be asked about."""

    readers: ReaderSettings = dataclasses.field(default_factory=ReaderSettings)
    """The models."""

    library: LibrarySettings = dataclasses.field(default_factory=LibrarySettings)
    """The documents and questions of the policy table."""

    regimes: tuple[Regime, ...] = ("swap", "fine-tune")
    """swap: an encoder trained from another seed reads the bank; fine-tune: the one that wrote it, trained further."""

    askings: tuple[Asking, ...] = ("shared", "selected")
    """shared: documents have keys of their own, and every question searches all of them; selected: documents use the same
    keys, and every question names its document (`bank.select`)."""

    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Rows of the policy table: names of `experiments/staleness/systems.py`, never and eager among them."""

    learning: LearningSettings = dataclasses.field(default_factory=LearningSettings)
    """The learning experiment."""

    learning_systems: tuple[str, ...] = tuple(LEARNING_SYSTEMS)
    """Its rows: names of `experiments/staleness/learning.py`."""

    decoupled_steps: Count = 300
    """Of a side network beside a frozen backbone; what they do to banks written before is measured too."""

    def __post_init__(self) -> None:
        """Check what is beyond types and ranges."""
        for name in ("seeds", "regimes", "askings", "systems", "learning_systems"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"`{name}` must name at least one, and each once, got {list(values)}.")
        unknown = [name for name in self.systems if name not in SYSTEMS]
        if unknown or not {"never", "eager"} <= set(self.systems):
            raise ValueError(
                f"`systems` must name never, eager, and others of {', '.join(SYSTEMS)}, got {list(self.systems)}."
            )
        if unknown := [name for name in self.learning_systems if name not in LEARNING_SYSTEMS]:
            raise ValueError(f"`learning_systems` must name some of {', '.join(LEARNING_SYSTEMS)}, got {unknown}.")
        if self.num_keys <= NUM_PAIRS:
            raise ValueError(
                f"`num_keys` must be more than the {NUM_PAIRS} pairs that side networks practise on, got {self.num_keys}."
            )
        needed = self.library.num_pairs * (self.library.num_documents if "shared" in self.askings else 1)
        if self.experiment == "policies" and needed >= self.num_keys:
            raise ValueError(
                f"`num_keys` must be more than {needed}, so that every document has keys of its own and one is left for "
                f"distractors, got {self.num_keys}; give more, or fewer `library.num_pairs`."
            )

    @property
    def task(self) -> RecallTask:
        """Return the recall task."""
        return RecallTask(num_keys=self.num_keys)


Settings = TypeVar("Settings")


def read_arguments(kind: type[Settings], description: str | None) -> Settings:
    """Return the settings that the command line names: a YAML file, and changes to it; ends the program if one is wrong."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file with settings")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the file (values in YAML)"
    )
    arguments = parser.parse_args()
    try:
        return load_evaluation(kind, arguments.config, arguments.overrides)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
