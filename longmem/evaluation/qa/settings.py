"""Settings of question answering, and the documents that they name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from longmem.evaluation.qa.documents import Document
from longmem.evaluation.qa.locomo import read_locomo
from longmem.evaluation.qa.quality import Style, read_quality
from longmem.evaluation.runs import EvaluationSettings
from longmem.evaluation.runs.settings import Count, Number

READERS = {"quality": read_quality, "locomo": read_locomo}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QASettings(EvaluationSettings):
    """Questions about long documents: multiple choice (quality) or written answers (locomo). `limit` counts questions."""

    task: Literal["quality", "locomo"]
    """quality: QuALITY's own files or L-Eval's quality.jsonl. locomo: locomo10.json."""

    data: str
    """File of the benchmark."""

    style: Style = "text"
    """Of multiple choice. text: the options are compared as continuations. letter: they stand in the question, and their
    letters are compared."""

    instruction: str | None = None
    """Stands between document and question, as a line of its own; None: nothing does."""

    local_tokens: Number = 512
    """Tokens of the end of a document that stay in the window of every system but context-N; fewer for documents whose
    longest question leaves less room."""

    max_new_tokens: Count = 32
    """Of a written answer, which ends with the line."""

    def __post_init__(self) -> None:
        """Check what is beyond types and ranges."""
        super().__post_init__()
        if self.local_tokens >= self.window:
            raise ValueError(
                f"`local_tokens` must be below `window`, got {self.local_tokens} and {self.window}: the question needs room."
            )
        if self.style == "letter" and self.task != "quality":
            raise ValueError(
                f"`style` must be text where there are no options, got {self.style!r} for task {self.task!r}; leave it out."
            )

    @property
    def prefix(self) -> str:
        """Return what stands between document and question."""
        return "" if self.instruction is None else f"\n{self.instruction}"


def read_documents(settings: QASettings) -> list[Document]:
    """Return the documents of the file that the settings name.

    Raises:
        ValueError: the file is missing or of another kind.
    """
    return READERS[settings.task](Path(settings.data).expanduser())
