"""Settings of the evaluation on documents."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from longmem.evaluation.contexts import validate_context
from longmem.evaluation.runs import EvaluationSettings
from longmem.evaluation.runs.settings import Count
from longmem.evaluation.systems.making import context_size
from longmem.memory.index import validate_index
from longmem.model.modeling import LongMemForCausalLM
from longmem.settings import From


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexitySettings(EvaluationSettings):
    """Which documents are read, and which of their windows are scored; `limit` counts documents."""

    data: str
    """File or folder of .txt or .jsonl, saved dataset, or name of a dataset on the Hub (see `load_corpus`); or a JSON list
    of objects with `file`, beside it, and `split`."""

    text_column: str = "text"
    """Column with the text, where there are columns."""

    split: str | None = None
    """Split to read; None: "train" of a dataset, "test" of a JSON list."""

    num_documents: Count | None = None
    """Read so many documents at most, the first ones."""

    max_tokens: Annotated[int, From(2)] | None = None
    """Read so many tokens at most; the last document is cut."""

    stride: Count = 512
    """Tokens from one window to the next; the last so many of a window are scored."""

    windows_per_document: Count | None = 8
    """Score so many windows of a document, spread evenly over it; None: all, which is every token but the first."""

    memory_tokens: Count | None = 65_536
    """Tokens in memory at most, the latest before the window; None: all before it."""

    index: str = "auto"
    """Of the memory: see `MemoryBank`."""

    ngram: Count = 3
    """Where a token was needed before is where it stood after the same `ngram - 1` tokens."""

    def __post_init__(self) -> None:
        """Check that every scored token has one before it in its window."""
        super().__post_init__()
        validate_index(self.index)
        if self.stride >= self.window:
            raise ValueError(
                f"`stride` must be less than the `window` of {self.window} tokens, so that each scored token has some "
                f"before it, got {self.stride}; half of the window is usual."
            )

    @property
    def lead(self) -> int:
        """Return the tokens at the start of a window that are context only."""
        return self.window - self.stride

    def validate_for(self, model: LongMemForCausalLM) -> None:
        """Raise ValueError if a longer window does not fit the backbone, or a token would be in no chunk of the memory."""
        for name in self.systems:
            if name.startswith("context-"):
                validate_context(model, context_size(name), self.window)
        chunk, segment = model.config.chunk_size, model.config.segment_length
        if self.stride % chunk:
            raise ValueError(
                f"`stride` must be a multiple of the model's `chunk_size`, {chunk}, so that all tokens before a window are "
                f"in memory, got {self.stride}; the nearest below is {self.stride - self.stride % chunk}."
            )
        if self.memory_tokens is not None and (self.memory_tokens % chunk or self.memory_tokens < segment):
            raise ValueError(
                f"`memory_tokens` must be a multiple of the model's `chunk_size`, {chunk}, and hold the {segment} tokens "
                f"of one `segment_length`, got {self.memory_tokens}; leave out memory with `systems`."
            )
