"""What an evaluation is: cases that are put into memory, what is asked about each, and what an answer counts."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from rich.console import Console

from longmem.evaluation.folder import MAY_CHANGE, RunFolder, digest
from longmem.evaluation.settings import EvaluationSettings
from longmem.evaluation.systems import Answer, Banks, System, title_of_system
from longmem.model.modeling import LongMemForCausalLM

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A question about a case, in tokens of the model.

    Args:
        name: unique in its case; may be empty where a case has one question.
        token_ids: end of what stands in the window; empty where the case itself is the question.
        candidates: continuations whose likelihoods are compared; none: the answer is only written.
        about: goes into the record as it is: the right answer, a category, or a `group` in the place of the case's.
        guesses: what baselines without a model answer, by their name: fields of a record.
    """

    name: str = ""
    token_ids: Sequence[int] = ()
    candidates: Sequence[Sequence[int]] = ()
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guesses: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked together because it shares a memory: a document, a draw of demonstrations, a haystack with a fact.

    Args:
        name: unique in the task; the id of a record is `name/item/system`.
        items: questions; none for a case that is only another's wrong memory.
        group: of cases that are not independent, such as those of one book; intervals are over groups.
        memory: passages in their order, one stream of tokens.
        local_tokens: of the end of the stream, which stand in the window before every question.
        prefix: tokens between stream and question.
        axes: values of the task's axes, for the records; a list stands for several at once.
        subject: what several cases are about, such as a document at several lengths; default: the name. Systems are compared
            on the same subject and item.
        systems: that are asked; None: all. With no systems, guesses alone are recorded.
        max_new_tokens: of a written answer; 0: none is written.
        stage: consecutive cases of one stage share a progress bar, whose title it is, and a call of `Task.begin`.
    """

    name: str
    items: Sequence[Item]
    group: str
    memory: Sequence[Sequence[int]] = ()
    local_tokens: int = 0
    prefix: Sequence[int] = ()
    axes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    subject: str = ""
    systems: Sequence[str] | None = None
    max_new_tokens: int = 0
    stage: str = "questions"

    @property
    def memorized(self) -> list[int]:
        """Return the tokens that are not in the window but in memory."""
        stream = [token for passage in self.memory for token in passage]
        return stream[: max(0, len(stream) - self.local_tokens)]

    def room(self, item: Item) -> int:
        """Return the tokens that a question and what follows it take in the window."""
        return len(item.token_ids) + max(self.max_new_tokens, *map(len, item.candidates), 0)


@dataclasses.dataclass(frozen=True)
class Axis:
    """What results are told apart by: a field of the records.

    Kinds, in the order of `Task.axes`: "panel": each value has its own table and panel of the figure; "column": values are
    columns, and numbers the x axis; "detail": in `metrics.json` alone, without intervals; "repeat": the same items under other
    draws, whose standard deviation is told.
    """

    name: str
    kind: Literal["panel", "column", "detail", "repeat"] = "column"
    title: str = ""
    values: tuple[Any, ...] = ()  # their order; without, numbers ascend and others come as they are met


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure of merit: scores from 0 to 1, told in percent, or, with another unit, told as they are.

    `baseline` is what systems are compared with, where it is there; else it is the first. `has_chance` says whether guessing
    among the candidates is right at times (`Task.chance`). `aggregate` makes one figure of what `score` returns for all items,
    which may then be anything; None: the mean, which alone has an interval.
    """

    title: str
    unit: str = "%"
    baseline: str = "backbone"
    has_chance: bool = False
    aggregate: Callable[[list[Any]], float] | None = None


class Task(ABC):
    """One evaluation: `cases` says what is asked, `score` what a record counts; all else are hooks with defaults."""

    name: ClassVar[str]
    """In `longmem.evaluation.TASKS`; that of its default settings, `NAME.yaml` in the folder `configs`."""

    title: ClassVar[str]
    """In titles of tables and figures."""

    kind: ClassVar[type[EvaluationSettings]]
    """Type of its settings."""

    axes: ClassVar[tuple[Axis, ...]] = ()

    pool: ClassVar[Literal["items", "panels", "none"]] = "items"
    """How a figure over all is made: of all items; as the mean of panels, each counting the same; or not at all, where values
    of the first axis have other systems."""

    sort_by: ClassVar[tuple[str, ...]] = ()
    """Fields of records whose order decides which numbers a seed draws for an interval; default: the order of asking."""

    baselines: ClassVar[Mapping[str, str]] = {}
    """Titles of what guesses without a model (`Item.guesses`)."""

    retrieval: ClassVar[Mapping[str, Any]] = {}
    """Options of the systems that paste passages, such as query_tokens."""

    asked_at_once: ClassVar[int] = 32
    """Questions that share one run of what stands before them, and are written down together."""

    wrong_shares: ClassVar[tuple[str, ...] | None] = None
    """Axes that a case and the one in its wrong memory have in common; None: all."""

    may_change: ClassVar[tuple[str, ...]] = MAY_CHANGE
    """Settings that change no number."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @property
    @abstractmethod
    def measures(self) -> Mapping[str, Measure]:
        """Return what is measured, the main figure first."""

    @abstractmethod
    def cases(self, model: LongMemForCausalLM) -> Sequence[Case]:
        """Return the cases in the order in which they are asked; ValueError if settings, model and data do not go together."""

    @abstractmethod
    def score(self, record: Record) -> Mapping[str, float]:
        """Return what an answer counts by each measure; a measure that is left out does not count this record.

        A record has `case`, `item`, `system`, `group`, the axes, what `Item.about` says, then `logprobs` and `tokens` of the
        candidates, `prediction` if an answer was written, and what `prepare` recorded; of a guess, its fields.
        """

    @property
    def run_title(self) -> str:
        """Return the title of a run."""
        return f"{self.settings.model_title} on {self.title}"

    @property
    def notes(self) -> Sequence[str]:
        """Return what a reader of the tables must know, a paragraph each."""
        return ()

    def title_of(self, system: str) -> str:
        """Return what a system or a baseline of the task is called."""
        return self.baselines.get(system) or title_of_system(system)

    def chance(self, record: Record) -> float:
        """Return how probable it is that a guess is right."""
        return 1 / len(record["logprobs"])

    def identity(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Return digests of all that is asked, so that a stopped run does not go on with other data."""
        asked = [
            [case.name, case.memory, case.local_tokens, case.prefix, case.max_new_tokens]
            + [[item.name, item.token_ids, item.candidates, item.about, item.guesses] for item in case.items]
            for case in cases
        ]
        return {"cases": digest(asked)}

    def banks(self, model: LongMemForCausalLM) -> Banks:
        """Return what keeps memories between systems and cases."""
        return Banks(model)

    def wrong(self, case: Case, cases: Sequence[Case]) -> Case | None:
        """Return the case in the wrong memory: the next of another group, alike in `wrong_shares` and systems, with a memory.

        After the last case comes the first. None where no case is needed (`prepare`).
        """
        place = next(number for number, each in enumerate(cases) if each is case)
        shared = case.axes.keys() if self.wrong_shares is None else self.wrong_shares
        for other in (*cases[place + 1 :], *cases[:place]):
            is_alike = other.systems == case.systems and all(other.axes[name] == case.axes[name] for name in shared)
            if other.group != case.group and is_alike and other.memorized:
                return other
        raise ValueError(
            f"`systems` must leave out `wrong` where there is no other group, got {list(self.settings.systems)} and nothing "
            f"that the wrong memory of {case.name} could hold; or raise `limit`, or take other data."
        )

    def ask(self, model: LongMemForCausalLM, run: RunFolder, console: Console) -> bool:
        """Write all records that a run lacks, if the task asks without the runner; return whether it does."""
        return False

    def begin(self, cases: Sequence[Case], console: Console) -> None:  # noqa: B027  a hook
        """Do what is done once for the cases of a stage, before the first of them is asked."""

    def prepare(self, system: System, case: Case, wrong: Case | None) -> Mapping[str, Any]:
        """Have a system read a case; what is returned goes into a record of its own, without an item."""
        system.read(case.memory, [] if wrong is None else [wrong.memorized], case.local_tokens)
        return {}

    def prefix(self, system: System, case: Case, item: Item) -> Sequence[int]:
        """Return the tokens between stream and question; questions with the same are asked together."""
        return case.prefix

    def placed(self, system: System, case: Case, item: Item) -> Mapping[str, Any]:
        """Return what a record says of what stood before a question, where that is not the same for all of its case."""
        return {}

    def answered(self, model: LongMemForCausalLM, answer: Answer) -> dict[str, Any]:
        """Return what a record says of likelihoods: of each candidate the log-likelihood in nats, and its tokens."""
        return {
            "logprobs": [each.total for each in answer.candidates],
            "tokens": [len(each.logprobs) for each in answer.candidates],
        }

    def tables(self, records: Sequence[Record]) -> Mapping[str, list[list[str]]]:
        """Return tables beside those of the measures, by their headings, the head of each first."""
        return {}

    def close(self) -> None:  # noqa: B027  a hook
        """Give back what `begin` has opened."""


def per_token(record: Record) -> list[float]:
    """Return the log-likelihood of each candidate per token, in nats."""
    return [total / count for total, count in zip(record["logprobs"], record["tokens"], strict=True)]


def best(values: Sequence[float]) -> int:
    """Return the place of the highest value, the first of equals."""
    return values.index(max(values))
