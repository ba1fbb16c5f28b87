"""Settings of the evaluation of recall at a distance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from longmem.evaluation.distance.words import ACTIVITIES, ADJECTIVES, CITIES, NOUNS
from longmem.evaluation.runs.settings import Count, EvaluationSettings, Number
from longmem.memory.index import validate_index
from longmem.settings import From, UpTo

Task = Literal["passkey", "key-value", "needle", "longeval-lines", "longeval-topics"]
HAYSTACK_TASKS = ("passkey", "key-value", "needle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistanceSettings(EvaluationSettings):
    """What is hidden, where, and how it is asked for."""

    tasks: tuple[Task, ...] = ("passkey", "needle")
    """passkey: a number in a sentence; key-value: one of several lines; needle: a sentence about a city; longeval-lines and
    longeval-topics: the prompts of LongEval, whose length is their own."""

    haystack: str = "python-manual"
    """Text that the facts of the first three tasks are hidden in: a file, a folder of texts, "python-manual" (about 90,000
    tokens), or "filler", five short sentences again and again."""

    longeval: str | None = None
    """Folder with LongEval's files, lines_*.jsonl and topics_*.jsonl, which may be gzipped."""

    sizes: tuple[Count, ...] = (4096, 16384, 65536)
    """Tokens in memory: multiples of the model's `segment_length`. The largest is encoded once, the smaller are its start."""

    depths: tuple[Annotated[float, From(0), UpTo(1)], ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """How far back the fact lies, as a share of the memory: 0 in the last window of memory, 1 in the first."""

    distances: tuple[Number, ...] = ()
    """How far back the fact lies, in tokens, to within a window; given, they take the place of `depths`. A size has those
    that are smaller."""

    items: Count = 10
    """Trials of each task, size and depth: other facts, at other places of the window."""

    num_choices: Annotated[int, From(2)] = 10
    """Values whose likelihoods are compared: the right one and wrong ones of the same kind."""

    wrong_values: Literal["absent", "present"] = "absent"
    """Wrong values that occur nowhere in memory, or, as far as there are, those of other facts in memory. In LongEval they
    are always those of other facts."""

    pairs: Count = 16
    """Lines of the task key-value, one of which is asked for."""

    needles: Literal["alone", "together"] = "alone"
    """Each fact is in memory without others; or the facts of all depths are there at once, and each is asked for."""

    generate: bool = True
    """Let the model also write its answer, and count those that are exact."""

    max_new_tokens: Count = 16
    """Tokens of a written answer at most."""

    index: str = "auto"
    """Of the bank: see `MemoryBank`; "flat" is exact."""

    storage_dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Of stored keys and values; int8 takes about half the bytes of float16."""

    bank_folder: str | None = None
    """Keep the bank of the haystack in this folder and not in memory; encoding that was stopped then goes on."""

    def __post_init__(self) -> None:
        """Check what is beyond types and ranges."""
        super().__post_init__()
        for name in ("tasks", "sizes", "depths", "distances"):
            _validate_distinct(name, getattr(self, name))
        if not self.tasks or not self.sizes or not (self.depths or self.distances):
            raise ValueError("`tasks`, `sizes` and `depths` must name at least one each, got an empty list.")
        if any(task.startswith("longeval") for task in self.tasks) and self.longeval is None:
            raise ValueError(
                "`longeval` must name a folder for the tasks longeval-lines and longeval-topics, got null."
            )
        validate_index(self.index)
        if self.distances and min(self.distances) >= max(self.sizes):
            raise ValueError(
                f"`distances` must be smaller than the largest of `sizes`, {max(self.sizes):,} tokens, got "
                f"{list(self.distances)}; what lies further back is not in memory."
            )
        if self.needles == "together" and "passkey" in self.tasks:
            raise ValueError(
                "`needles` must be alone for the task passkey, got together: its facts cannot be told apart by their "
                "question; take key-value or needle."
            )
        places = len(self.distances or self.depths)
        limits = {"pairs": len(ADJECTIVES) * len(NOUNS) // places, "depths": len(CITIES)}
        for name, value in (("pairs", self.pairs), ("depths", places)):
            if value > limits[name]:
                raise ValueError(f"`{name}` must be at most {limits[name]} so that all keys differ, got {value}.")
        needed = places + self.num_choices - 1
        if "needle" in self.tasks and needed > len(ACTIVITIES):
            raise ValueError(
                f"`num_choices` must leave a value for every depth: the task needle has {len(ACTIVITIES)} values, "
                f"{needed} are needed; choose fewer."
            )

    @property
    def haystack_tasks(self) -> tuple[str, ...]:
        """Return the tasks whose facts are hidden in the haystack."""
        return tuple(task for task in self.tasks if task in HAYSTACK_TASKS)

    @property
    def longeval_tasks(self) -> tuple[str, ...]:
        """Return the tasks whose prompts are LongEval's."""
        return tuple(task for task in self.tasks if task not in HAYSTACK_TASKS)


def _validate_distinct(name: str, values: Sequence[object]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"`{name}` must name each once, got {list(values)}.")
