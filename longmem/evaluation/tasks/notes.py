"""Notes told to memory, and questions about them in the chat format of an instruction-tuned model."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from longmem.evaluation.settings import Count
from longmem.evaluation.systems import tokenize
from longmem.evaluation.task import Axis, Case, Item, Measure, Record
from longmem.evaluation.tasks.facts import BankTask, WrittenSettings
from longmem.evaluation.tasks.haystack import read_haystack
from longmem.model.modeling import LongMemForCausalLM

NOTES = Path(__file__).with_name("notes.yaml")
ASKED = ("chat", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotesSettings(WrittenSettings):
    """Which notes, and the text around them. `limit` is of notes."""

    data: str | None = None
    """YAML file with a list of [note, question, answer]; None: twenty notes that come with the package."""

    haystack: str = "python-manual"
    """Text that the notes are spread over, as that of recall: a file, a folder, "python-manual" or "filler"."""

    sizes: tuple[Count, ...] = (1024, 4096)
    """Tokens of that text in memory."""


class Notes(BankTask):
    """All notes stand in one memory, and each is asked for; the wrong memory is the text without them."""

    name, title, kind = "notes", "questions about notes", NotesSettings
    measures = {"answered": Measure("answered")}
    text: Sequence[int] = ()  # what notes stand in, from `cases` on
    axes = (Axis("asked", "panel", values=ASKED), Axis("size", title="tokens in memory"))

    def cases(self, model: LongMemForCausalLM) -> list[Case]:
        """Return a case for each size and way of asking."""
        settings, tokenizer = self.settings, model.tokenizer
        notes = read_notes(settings.data or NOTES)[: settings.limit]
        if min(settings.sizes) < len(notes):
            raise ValueError(f"`sizes` must have a token for each of {len(notes)} notes, got {min(settings.sizes)}.")
        self.text = read_haystack(tokenizer, settings.haystack, max(settings.sizes))
        asked = ASKED if tokenizer.chat_template else ASKED[1:]
        return [self._case(tokenizer, notes, size, way) for size in settings.sizes for way in asked]

    def _case(self, tokenizer: PreTrainedTokenizerBase, notes: Sequence[Sequence[str]], size: int, way: str) -> Case:
        step, memory, items = size // len(notes), list[Sequence[int]](), []
        for number, (note, question, answer) in enumerate(notes):
            memory.append(self.text[number * step : (number + 1) * step])
            memory.append(tokenize(tokenizer, f"\n\n{note}\n\n", continues=True))
            if way == "chat":
                turns = [{"role": "user", "content": question}]
                ids = list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
            else:
                ids = tokenize(tokenizer, f"\n\nQuestion: {question}\nAnswer:", continues=True)
            about = {"question": question, "answer": answer, "group": note}
            items.append(Item(name=str(number), token_ids=ids, about=about))
        name, written = f"{way}/{size}", self.settings.max_new_tokens
        axes = {"asked": way, "size": size}
        return Case(name=name, group=name, items=items, memory=memory, axes=axes, max_new_tokens=written)

    def wrong(self, case: Case, cases: Sequence[Case]) -> Case:
        """Return the text alone."""
        return Case(name="text", group="text", items=(), memory=[self.text[: case.axes["size"]]])

    def score(self, record: Record) -> Mapping[str, float]:
        """Count an answer that has the value anywhere."""
        return {"answered": float(has_value(record["prediction"], record["answer"]))}


def has_value(text: str, value: str) -> bool:
    """Return whether a value is among the words of a text.

    >>> has_value("It is under the Blue  Flowerpot.", "blue flowerpot"), has_value("in 44170", "4417")
    (True, False)
    """
    said, wanted = (" ".join(["", *re.findall(r"\w+", each.lower()), ""]) for each in (text, value))
    return wanted in said


def read_notes(path: str | Path) -> list[list[str]]:
    """Return notes with question and answer. Raises ValueError if a file holds anything else."""
    try:
        rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`data` must be a YAML file, got {str(path)!r}, which can't be read: {error}.") from error
    is_list = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 3 for row in rows)
    if not is_list or len(rows) < 2 or not all(isinstance(part, str) and part.strip() for row in rows for part in row):
        raise ValueError(
            f"`data` must be a list of at least two [note, question, answer], each a text, got another in {str(path)!r}; "
            'write numbers in quotes, such as "4417".'
        )
    return rows
