"""What is asked with demonstrations: sets, seeds, how many stand in the window and how many in memory."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from longmem.errors import did_you_mean
from longmem.evaluation.in_context.sets import SETS
from longmem.evaluation.runs import EvaluationSettings
from longmem.settings import From, read_section

Count = Annotated[int, From(1)]
Number = Annotated[int, From(0)]
SetName = Literal["sst-2", "mr", "subj", "sst-5", "mpqa", "squad"]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquadSettings:
    """Questions about passages, in the format of SQuAD v1.1."""

    data: str | None = None
    """JSON file that is evaluated; or a data set on the Hub with its split, as in rajpurkar/squad:validation."""

    demonstrations_data: str | None = None
    """The same, for demonstrations; None: half of the articles in `data`, drawn by `seed`, and the other half is asked."""

    demonstrations: Count = 3
    """Examples in the window: passage, question, answer. As many as fit beside the question are kept, the last ones."""

    memory_demonstrations: Count = 100
    """Further examples, in memory; each is about a passage of its own."""

    max_new_tokens: Count = 32
    """Of an answer, which ends at the first line break."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextSettings(EvaluationSettings):
    """Many-shot learning from demonstrations in memory."""

    sets: tuple[SetName, ...] = ("sst-2", "mr", "subj", "sst-5", "mpqa")
    """What is asked: the paper's five classification sets, and squad for questions about passages."""

    data: str | None = None
    """Folder of the classification sets in the layout of LongMem's data/icl/original: SST-2, mr, subj, sst-5, mpqa."""

    sources: dict[str, Any] = dataclasses.field(default_factory=dict)
    """By set, what to read instead of files in `data`: sections with the fields of `Source`."""

    official_files: bool = True
    """Read the CSV files of mr, subj and mpqa line by line, as the released script does, so that most quotation marks of
    the CSV format stay in the texts; false: read CSV as CSV."""

    seeds: tuple[Number, ...] = (1, 2, 3, 4, 5, 6)
    """Each draws its own demonstrations; the default is that of the released script, and so are the demonstrations."""

    demonstrations: Count = 20
    """Demonstrations in the window (the script's k). As many as fit beside the longest text are kept, the last ones."""

    memory_demonstrations: Count = 2000
    """Demonstrations in memory (the script's cache_k)."""

    bos_per_line: bool = False
    """Begin every demonstration and every question with the tokenizer's bos token. The released script puts its bos before
    every line, and eos behind every demonstration. Only for models that were trained with bos."""

    squad: SquadSettings = dataclasses.field(default_factory=SquadSettings)
    """Of the set squad."""

    def __post_init__(self) -> None:
        """Check what is beyond types and ranges."""
        super().__post_init__()
        for name, values in (("sets", self.sets), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"`{name}` must be at least one, and none twice, got {list(values)}.")
        for name in self.sources:
            if name not in SETS:
                raise ValueError(
                    f"`sources` must name classification sets, {', '.join(SETS)}, got {name!r}.{did_you_mean(name, SETS)}"
                )
            self.source(name)
        from_files = [name for name in self.labelled if name not in self.sources]
        if from_files and self.data is None:
            raise ValueError(
                f"`data` must name the folder with the files of {', '.join(from_files)}; add data=FOLDER, or give "
                "`sources` for them."
            )
        if "squad" in self.sets and self.squad.data is None:
            raise ValueError("`squad.data` must be given for the set squad; add squad.data=FILE, or leave squad out.")

    @property
    def labelled(self) -> tuple[str, ...]:
        """Return the classification sets among `sets`."""
        return tuple(name for name in self.sets if name in SETS)

    def source(self, name: str) -> Source | None:
        """Return where a classification set comes from; None: from files in `data`."""
        if name not in self.sources:
            return None
        source = read_section(Source, self.sources[name], place=f"sources.{name}")
        if source.labels is not None and sorted(source.labels) != sorted(SETS[name].words):
            raise ValueError(
                f"`sources.{name}.labels` must be the words {', '.join(SETS[name].words)} in the order of the data set's "
                f"numbers, got {list(source.labels)}."
            )
        return source
