"""Settings of the evaluation: which texts are read, and which of their windows are scored."""

import dataclasses
from typing import Annotated, Literal

from longmem.evaluation.perplexity.scoring import Cut, Window
from longmem.evaluation.settings import Count, EvaluationSettings
from longmem.evaluation.systems.making import context_size, validate_context, validate_window
from longmem.evaluation.systems.retrieval import RANKERS
from longmem.memory.index import validate_index
from longmem.model.modeling import LongMemForCausalLM
from longmem.settings import From


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexitySettings(EvaluationSettings):
    """Which texts are read, and which of their windows are scored; `limit` counts texts."""

    data: str
    """File or folder of .txt or .jsonl, JSON list of files, saved dataset, or name of a dataset on the Hub (`load_corpus`)."""

    plan: Literal["documents", "books"] = "documents"
    """documents: windows from all over each text, with the text before a window in memory. books: one stretch of each text,
    cut into windows in one way or several that all score the same tokens, with at least `memory_tokens` before it in memory."""

    text_column: str = "text"
    """Column with the text, where there are columns."""

    split: str | None = None
    """Split to read; None: "train" of a dataset, "test" of a JSON list."""

    num_documents: Count | None = None
    """Read so many texts at most, the first ones."""

    max_tokens: Annotated[int, From(2)] | None = None
    """Read so many tokens at most; the last text is cut."""

    stride: Count = 512
    """Tokens from one window to the next; the last so many of a window are scored."""

    windows_per_document: Count | None = 8
    """Score so many windows of a text: of a document spread evenly over it, None for all, which is every token but the first;
    of a book one after the other."""

    memory_tokens: Count | None = 65_536
    """Tokens in memory: of a document the latest before the window, so many at most, None for all; of a book so many at least
    when the first window is scored."""

    index: str = "auto"
    """Of the memory: see `MemoryBank`."""

    ngram: Count = 3
    """Where a token was needed before is where it stood after the same `ngram - 1` tokens."""

    other_cuts: tuple[str, ...] = ()
    """Books: further ways of cutting beside `window` and `stride`, written as window/stride."""

    context_windows: Count | None = None
    """Books: score context-N on the first so many windows of each cut, since long windows are slow; None: on all."""

    grow: bool = False
    """Books: what leaves the window goes into the right memory."""

    def __post_init__(self) -> None:
        """Check that the plan fits together, and that every scored token has one before it in its window."""
        super().__post_init__()
        validate_index(self.index)
        if len(set(self.cuts)) < len(self.cuts):
            raise ValueError(f"`other_cuts` must be others than {self.cuts[0]}, and none twice, got {self.other_cuts}.")
        if self.plan == "books":
            return self._check_books()
        for field in dataclasses.fields(self):
            if field.name in ("other_cuts", "context_windows", "grow") and getattr(self, field.name) != field.default:
                raise ValueError(f"`{field.name}` is for books, got {getattr(self, field.name)}; add plan=books.")
        if self.stride >= self.window:
            raise ValueError(
                f"`stride` must be less than the `window` of {self.window} tokens, so that each scored token has some "
                f"before it, got {self.stride}; half of the window is usual."
            )

    def _check_books(self) -> None:
        if self.memory_tokens is None or self.windows_per_document is None:
            raise ValueError("`memory_tokens` and `windows_per_document` must be numbers for books, got null.")
        if self.context_windows is not None and (not self.contexts or self.context_windows > self.windows_per_document):
            raise ValueError(
                f"`context_windows` must be at most the {self.windows_per_document} windows of a book, for systems context-N, "
                f"got {self.context_windows} and {list(self.systems)}."
            )
        most = self.first_scored + min(cut.stride for cut in self.cuts)
        if (context := max(self.contexts.values(), default=0)) > most:
            raise ValueError(
                f"`systems` must have windows that fit into the {most} tokens up to the end of a book's first window, got "
                f"context-{context}; memorize {context - most} tokens more (`memory_tokens`) or choose a shorter one."
            )
        if set(self.systems) & set(RANKERS) and not all(cut.lead for cut in self.cuts):
            raise ValueError(
                f"`systems` with passages ({', '.join(RANKERS)}) need a `stride` shorter than the window to put them before "
                f"the scored tokens, got {', '.join(map(str, self.cuts))}; leave them out."
            )

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Return the ways of cutting windows."""
        return Cut(self.window, self.stride), *map(Cut.parse, self.other_cuts)

    @property
    def contexts(self) -> dict[str, int]:
        """Return the systems context-N, and their N."""
        return {name: context_size(name) for name in self.systems if name.startswith("context-")}

    @property
    def baseline(self) -> str:
        """Return the system that others are compared with: the backbone or, where it was left out, the first."""
        return "backbone" if "backbone" in self.systems else self.systems[0]

    @property
    def first_scored(self) -> int:
        """Return the token of a book where the scored stretch begins."""
        return (self.memory_tokens or 0) + max(cut.lead for cut in self.cuts)

    @property
    def needed_tokens(self) -> int:
        """Return the tokens that a book must have; no more are read."""
        return self.first_scored + (self.windows_per_document or 0) * max(cut.stride for cut in self.cuts)

    def memorized(self, cut: Cut) -> int:
        """Return the tokens of a book in memory when the first window of a cut is scored."""
        return self.first_scored - cut.lead

    def windows(self, cut: Cut, num_tokens: int, system: str = "") -> list[Window]:
        """Return the windows of a text that a system is scored on; the same for all but the longer contexts of books."""
        if self.plan == "documents":
            return cut.cover(num_tokens, self.windows_per_document)
        count = self.context_windows if system in self.contexts else None
        return cut.row(self.memorized(cut), count or self.windows_per_document or 0)

    def run_on(self, cut: Cut, system: str) -> Cut:
        """Return the cut on whose windows a system is run for `cut`: a longer context sees the same for all of one stride."""
        alike = [each for each in self.cuts if each.stride == cut.stride]
        return max(alike, key=lambda each: each.scored) if system in self.contexts else cut

    def validate_for(self, model: LongMemForCausalLM) -> None:
        """Raise ValueError if a longer window does not fit the backbone, or a token would be in no chunk of the memory."""
        for cut in self.cuts:
            validate_window(model, cut.window)
        for size in self.contexts.values():
            validate_context(model, size, max(cut.window for cut in self.cuts))
        if self.plan == "books":
            return
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
