"""The kinds of work on which systems are compared: tasks of the package, asked without writing answers.

Few texts are read, and many questions are asked about each, because reading costs most.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longmem.data.sample_texts import python_manual
from longmem.evaluation.systems import tokenize
from longmem.evaluation.task import Case, Task, per_token
from longmem.evaluation.tasks.dated import Dated, DatedSettings
from longmem.evaluation.tasks.facts import Facts, FactsSettings
from longmem.evaluation.tasks.locomo import Locomo, LocomoSettings
from longmem.evaluation.tasks.longeval import read_longeval
from longmem.evaluation.tasks.notes import Notes, NotesSettings
from longmem.evaluation.tasks.quality import Quality, QualitySettings
from longmem.evaluation.tasks.reading import Asked, Document
from longmem.evaluation.tasks.squad import load_passages

CHOICES = 5  # values that are compared, where the work leaves it open


@dataclasses.dataclass(frozen=True)
class Work:
    """A kind of work: its task, made from (data, tokens of a text, window), and which of its measures is told.

    `measure`: of the task's. `data`: what must be given for it, None for nothing. `unit`: "%" or "nats per token". `chance`:
    per cent that a guess is right, None where nothing is chosen. `items_of_case`: questions about one text at most.
    """

    title: str
    make: Callable[[str, int, int], Task]
    measure: str
    note: str
    data: str | None = None
    unit: str = "%"
    chance: float | None = 100 / CHOICES
    items_of_case: int = 24


def common(window: int) -> dict[str, Any]:
    """Return settings that all tasks share; the systems are others than theirs."""
    return {"output": "unused", "window": window, "systems": ("off",)}


def spread_over(found: Sequence[Any], count: int) -> list[Any]:
    """Return `count` of some things, evenly spread, or all where there are fewer."""
    return [found[number * len(found) // count] for number in range(count)] if len(found) > count else list(found)


def others(values: Sequence[str], number: int) -> tuple[str, ...]:
    """Return a value with the next different ones, all of them in the order of the alphabet."""
    different = list(dict.fromkeys([*values[number:], *values[:number]]))
    return tuple(sorted(different[:CHOICES]))


class Recall(Facts):
    """Needles and key-value lines, each in a window of its own of one text; wrong values are those of the other facts."""

    def cases(self, model: Any) -> list[Case]:
        """Return one case with all facts."""
        settings, text, items = self.settings, list[Sequence[int]](), []
        for task, depths in (("needle", settings.depths[::2]), ("key-value", settings.depths[1::2])):
            own = Facts(dataclasses.replace(settings, tasks=(task,), depths=depths, needles="together"))
            cases = own.cases(model)
            text = text or list(own.windows)
            for number, (told, plain) in enumerate(zip(cases[0].memory, own.windows, strict=True)):
                text[number] = text[number] if told is plain else told
            for case in cases:
                about = {**case.items[0].about, "group": case.name}
                items.append(dataclasses.replace(case.items[0], name=case.name, about=about))
            self.windows = own.windows
        return [dataclasses.replace(cases[0], name="facts", group="facts", memory=text, items=items)]

    def identity(self, cases: Sequence[Case]) -> dict[str, Any]:
        return Task.identity(self, cases)

    def banks(self, model: Any) -> Any:
        from longmem.evaluation.systems import Banks

        return Banks(model, index="flat")


def recall(share: int) -> Callable[[str, int, int], Task]:
    """Return what makes the task of facts in a text of `share` times the tokens."""

    def make(data: str, size: int, window: int) -> Task:
        depths = tuple(number / 11 for number in range(12))
        own = {"sizes": (share * size,), "depths": depths, "items": 1, "generate": False, "pairs": 4}
        own |= {"wrong_values": "present", "num_choices": CHOICES, "haystack": data or "python-manual"}
        return Recall(FactsSettings(**own, **common(window)))  # type: ignore[arg-type]

    return make


class Unseen(Dated):
    """Dated texts; of a folder with a manifest whose entries have a `split`, those that nothing was trained on."""

    def cases(self, model: Any) -> list[Case]:
        """Return the cases of the task."""
        manifest = Path(self.settings.data, "manifest.json")
        if not manifest.is_file():
            return super().cases(model)
        with tempfile.TemporaryDirectory() as folder:
            for entry in json.loads(manifest.read_text(encoding="utf-8")):
                if entry["split"] == "test":
                    Path(folder, entry["file"]).symlink_to(manifest.parent.resolve() / entry["file"])
            self.settings = dataclasses.replace(self.settings, data=folder)
            return super().cases(model)


def dated(task: type[Dated], *kinds: str) -> Callable[[str, int, int], Task]:
    """Return what makes a task of dated texts with these kinds of questions."""

    def make(data: str, size: int, window: int) -> Task:
        scored = min(64, window // 8)
        own: dict[str, Any] = {"num_texts": 4, "tokens_per_text": size // 4, "num_choices": CHOICES}
        if "continuation" in kinds:  # half of a text is read, at least a window is before what stands in the window
            local = window - scored - 1
            own = {"num_texts": 10, "tokens_per_text": max(4 * local, 3 * size // 2), "continuations_per_text": 3}
            own |= {"continuation_tokens": scored, "local_tokens": local}
        own |= {"data": data or "installed", "kinds": kinds, "generate": False, "index": "flat"}
        return task(DatedSettings(**{"local_tokens": window // 2, **own, **common(window)}))

    return make


class Told(Notes):
    """Notes in a text, asked for in the chat format where there is one: how likely the right answers are."""

    measures = {"likelihood": Locomo.measures["likelihood"]}

    def cases(self, model: Any) -> list[Case]:
        """Return one case with all notes."""
        case = super().cases(model)[0]
        blank = "" if case.axes["asked"] == "chat" else " "
        items = [
            dataclasses.replace(
                item, candidates=[tokenize(model.tokenizer, blank + item.about["answer"], continues=True)]
            )
            for item in case.items
        ]
        return [dataclasses.replace(case, items=items, max_new_tokens=0)]

    def score(self, record: Mapping[str, Any]) -> Mapping[str, float]:
        return {"likelihood": per_token(record)[0]}


def told(data: str, size: int, window: int) -> Task:
    """Return the task of notes in a text of half the size."""
    return Told(NotesSettings(data=data or None, sizes=(size // 2,), index="flat", **common(window)))


def in_context(data: str, size: int, window: int) -> Task:
    """Return the task of labels after demonstrations, of about 25 tokens each."""
    from longmem.evaluation.tasks.labelled import Labelled, LabelledSettings

    shown = {"seeds": (1,), "demonstrations": 4, "memory_demonstrations": max(8, size // 25)}
    return Labelled(LabelledSettings(data=data, sets=("sst-2",), limit=60, **shown, **common(window)))


def choices(documents: Sequence[Document], data: str, window: int, task: type[Quality] = Quality) -> Task:
    """Return a task of multiple choice about documents."""
    return task(QualitySettings(data=data or "none", local_tokens=window // 4, **common(window)), documents)


def quality(data: str, size: int, window: int) -> Task:
    """Return the task of multiple choice on the shortest stories of a file, as many as have at most sixteen times the size."""
    documents = sorted(Quality.read(Path(data)), key=lambda each: sum(map(len, each.passages)))
    sizes = itertools.accumulate(sum(map(len, each.passages)) // 4 for each in documents)
    count = max(1, sum(total <= 16 * size for total in sizes))
    return choices(documents[:count], data, window)


class Answers(Locomo):
    """How likely the right answers to questions about documents are."""

    def __init__(self, settings: LocomoSettings, documents: Sequence[Document] | None = None) -> None:
        super().__init__(settings, documents)
        self.max_new_tokens = 0

    def score(self, record: Mapping[str, Any]) -> Mapping[str, float]:
        return {"likelihood": per_token(record)[0]}


def passages(data: str, size: int, window: int) -> Task:
    """Return questions about the first passages of a file in SQuAD's format, all in one text."""
    texts, asked, room = list[str](), list[Any](), 4 * size
    for own in load_passages(data):
        if (room := room - len(own[0].passage)) < 0:
            break
        texts.append(own[0].passage + "\n\n")
        asked += [Asked(name=each.id, question=each.question, answer=each.answers[0]) for each in spread_over(own, 3)]
    settings = LocomoSettings(data=data, local_tokens=window // 4, **common(window))
    return Answers(settings, [Document("passages", tuple(texts), tuple(asked))])


def babi(data: str, size: int, window: int) -> Task:
    """Return bAbI's questions, those that the whole story answers as well, with stories at the start of a longer text."""
    stories = list(stories_of(Path(data).read_text(encoding="utf-8")))
    options = tuple(sorted({answer for _, asked in stories for _, answer in asked}))
    filler, documents = python_manual(), []
    for number, (lines, asked) in enumerate(spread_over([each for each in stories if len(each[1]) > 1], 8)):
        start = 997 * number % (len(filler) // 2)
        questions = tuple(Asked(name=text, question=text, answer=answer, options=options) for text, answer in asked)
        texts = ("\n".join(lines) + "\n\n", filler[start : start + 2 * size])
        documents.append(Document(str(number), texts, questions))
    return choices(documents, data, window)


def stories_of(text: str) -> Iterator[tuple[list[str], list[tuple[str, str]]]]:
    """Yield the stories of a file of bAbI, with the questions about somebody of whom no later line tells."""
    for story in re.split(r"^(?=1 )", text, flags=re.M)[1:]:
        lines, asked = list[str](), list[tuple[str, str, int]]()
        for line in story.splitlines():
            plain = line.partition(" ")[2]
            if "?" in plain:
                question, answer = (part.strip() for part in plain.replace("\t", "|").split("|")[:2])
                asked.append((question, answer, len(lines)))
            else:
                lines.append(plain)
        left = {}
        for question, answer, place in asked:
            names = set(re.findall(r"\b[A-Z]\w+", question.partition(" ")[2]))
            if not names & set(re.findall(r"\w+", " ".join(lines[place:]))):
                left[question] = answer
        yield lines, list(left.items())


class Lines(Quality):
    """LongEval's records of lines, with its words."""

    def prompt(self, asked: Asked) -> str:
        return asked.question

    def candidates(self, asked: Asked) -> list[str]:
        return list(asked.options)


def longeval(data: str, size: int, window: int) -> Task:
    """Return questions about the first lines of LongEval's first record, of about 22 tokens each; it asks for one line each."""
    record = read_longeval(data, "lines")[0].record
    lines = re.findall(r"line \S+: REGISTER_CONTENT is <\d+>\n", record)[: 2 * size // 22]
    numbers = [line.rpartition("<")[2].strip() for line in lines]
    asked = []
    for number in spread_over(range(len(lines)), 24):
        name = lines[number].split(":")[0].split()[1]
        question = (
            f"Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number.\n"
        )
        question += f"line {name}: REGISTER_CONTENT is <"
        asked.append(Asked(name=name, question=question, answer=numbers[number], options=others(numbers, number)))
    start = record[: record.index(lines[0])]
    return choices([Document("lines", (start + "".join(lines) + "\n",), tuple(asked))], data, window, Lines)


def locomo(data: str, size: int, window: int) -> Task:
    """Return LoCoMo's questions whose evidence is in the first sessions, as many as one and a half times the size hold."""
    rows = []
    for row in json.loads(Path(data).read_text(encoding="utf-8")):
        talk, kept, room = row["conversation"], {}, 6 * size
        for number in range(1, 100):
            session = talk.get(f"session_{number}")
            if session is None or (room := room - sum(len(turn["text"]) + 40 for turn in session)) < 0:
                break
            kept |= {name: talk[name] for name in (f"session_{number}", f"session_{number}_date_time")}
        seen = {turn["dia_id"] for name, session in kept.items() if isinstance(session, list) for turn in session}
        asked = [each for each in row["qa"] if each["category"] in (1, 2, 4) and each["evidence"]]
        asked = [each for each in asked if set(each["evidence"]) <= seen]
        if asked:
            rows.append({"sample_id": row["sample_id"], "conversation": kept, "qa": asked})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "locomo.json")
        path.write_text(json.dumps(rows), encoding="utf-8")
        return Answers(LocomoSettings(data=str(path), local_tokens=window // 4, **common(window)))


NATS = "nats per token"
_RECALL = "needles and key-value lines in Python's manual, wrong values those of the other facts"
WORK = {
    "recall": Work("recall, 4k", recall(4), "accuracy", f"{_RECALL}; four times the size"),
    "recall-16k": Work("recall, 16k", recall(16), "accuracy", f"{_RECALL}; 16 times the size"),
    "recall-65k": Work("recall, 65k", recall(64), "accuracy", f"{_RECALL}; 64 times the size"),
    "told": Work(
        "notes in a chat",
        told,
        "likelihood",
        "answers about notes in Python's manual, asked for in the chat format",
        unit=NATS,
        chance=None,
    ),
    "changes": Work(
        "changes and versions",
        dated(Dated, "version", "latest"),
        "accuracy",
        "which version brought a change, which is the latest after an older list was replaced; four lists of changes",
    ),
    "passages": Work(
        "questions on passages (XQuAD)",
        passages,
        "likelihood",
        "right answers, passages one after the other",
        "a file as SQuAD's",
        NATS,
        None,
    ),
    "in-context": Work(
        "many-shot labels (SST-2)",
        in_context,
        "calibrated",
        "4 demonstrations before the question, one for each 25 tokens of the size before them",
        "LongMem's files of classification sets",
        chance=50,
        items_of_case=20,
    ),
    "books": Work(
        "books of a test split",
        dated(Unseen, "continuation"),
        "likelihood",
        "64 tokens after the beginning of a text, which is longer than the window",
        "folder of books",
        NATS,
        None,
    ),
    "technical": Work(
        "technical text",
        dated(Dated, "continuation"),
        "likelihood",
        "64 tokens after the beginning of a text, which is longer than the window",
        None,
        NATS,
        None,
    ),
    "babi": Work(
        "bAbI, stories in long text",
        babi,
        "per token",
        "what the whole story answers as well, half the size of other text behind it",
        "a file of bAbI",
        chance=100 / 6,
        items_of_case=3,
    ),
    "longeval": Work("LongEval, lines", longeval, "per token", "lines of one record", "folder of LongEval"),
    "locomo": Work(
        "LoCoMo, first sessions", locomo, "likelihood", "of right answers", "locomo10.json", NATS, None, items_of_case=6
    ),
    "quality": Work(
        "QuALITY", quality, "per token", "the shortest stories", "quality.jsonl", chance=25, items_of_case=6
    ),
}
