"""An evaluation on books: backbone, memory off, on and wrong, and the backbone with longer windows, on the same tokens."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from longmem.console import token_progress
from longmem.evaluation.book_files import BookScores, describe_run, load_book, save_book
from longmem.evaluation.book_plan import Book, BookPlan, Cut
from longmem.evaluation.contexts import score_contexts
from longmem.evaluation.perplexity import SYSTEMS, WindowScores, compare_systems
from longmem.evaluation.runs.folder import claim_folder
from longmem.memory import MemoryBank
from longmem.model.modeling import LongMemForCausalLM

Report = Callable[[int, int], None]


class MemorizedBooks:
    """Banks of the starts of books. A book is encoded once; what is handed out is a copy, which may grow.

    The last two books are kept: the wrong memory of one is the right memory of the next.
    """

    def __init__(self, model: LongMemForCausalLM, plan: BookPlan) -> None:
        self.model = model
        self.plan = plan
        self._encoded: dict[str, tuple[MemoryBank, float]] = {}

    def bank(self, book: Book, cut: Cut) -> MemoryBank:
        """Return a bank of the tokens of a book before the first window of a cut, with room for its windows."""
        original, _ = self._encode(book)
        bank = self._empty(self.plan.stop(cut))
        ids = book.token_ids[: self.plan.memorized(cut)]
        self.model.memorize(bank, ids, book.name, reuse=(original, book.name))
        return bank

    def seconds(self, book: Book) -> float:
        """Return how long it took to encode and write a token of a book."""
        return self._encode(book)[1]

    def _encode(self, book: Book) -> tuple[MemoryBank, float]:
        if book.name not in self._encoded:
            ids = book.token_ids[: max(self.plan.memorized(cut) for cut in self.plan.cuts)]
            bank = self._empty(len(ids))
            start = time.perf_counter()
            self.model.memorize(bank, ids, book.name)
            self._encoded[book.name] = (bank, (time.perf_counter() - start) / len(ids))
            for name in list(self._encoded)[:-2]:
                del self._encoded[name]
        return self._encoded[book.name]

    def _empty(self, num_tokens: int) -> MemoryBank:
        chunk = self.model.config.chunk_size
        return MemoryBank.for_model(self.model, capacity_tokens=-(-num_tokens // chunk) * chunk)


def score_book(
    model: LongMemForCausalLM,
    book: Book,
    wrong: Book,
    plan: BookPlan,
    memories: MemorizedBooks | None = None,
    progress: Report | None = None,
) -> BookScores:
    """Return the scores of all systems on a book, for every cut; longer contexts are the systems `context-N`.

    The windows of cuts with the same stride end at the same tokens, so that a longer context is the same for both and
    is run once.

    Args:
        model: read from.
        book: scored; its start is the right memory.
        wrong: its start is the wrong memory, as many tokens of it.
        plan: which tokens.
        memories: banks to share among books; default: encode both.
        progress: called with (tokens scored, tokens in all) after every window.
    """
    memories = memories or MemorizedBooks(model, plan)
    seconds = memories.seconds(book)
    strides = {cut.stride: max(other.scored for other in plan.cuts if other.stride == cut.stride) for cut in plan.cuts}
    total = sum(len(SYSTEMS) * plan.windows * cut.scored for cut in plan.cuts)
    total += sum(len(plan.contexts) * plan.long_windows * scored for scored in strides.values())
    finished: dict[tuple[str, str], int] = {}

    def counter(part: str) -> Callable[[str, int, int], None]:
        def count(system: str, done: int, _: int) -> None:
            finished[part, system] = done
            if progress is not None:
                progress(sum(finished.values()), total)

        return count

    scores: dict[str, dict[str, WindowScores]] = {}
    for cut in plan.cuts:
        scores[str(cut)] = compare_systems(
            model,
            book.token_ids[plan.memorized(cut) : plan.stop(cut)],
            memory=memories.bank(book, cut),
            wrong_memory=memories.bank(wrong, cut),
            window=cut.window,
            stride=cut.stride,
            grow=book.name if plan.grow else None,
            progress=counter(str(cut)),
        )
    for context in plan.contexts:
        for stride, scored in strides.items():
            found = score_contexts(
                model,
                book.token_ids,
                ends=plan.ends(stride),
                context=context,
                scored=scored,
                progress=functools.partial(counter(f"stride {stride}"), f"context-{context}"),
            )
            for cut in plan.cuts:
                if cut.stride == stride:
                    scores[str(cut)][f"context-{context}"] = found.last(cut.scored)
    return BookScores(scores, seconds)


def evaluate_books(
    model: LongMemForCausalLM,
    books: Sequence[Book],
    wrong: Sequence[Book],
    plan: BookPlan,
    folder: Path,
    console: Console,
) -> Iterator[tuple[str, BookScores]]:
    """Yield the name and scores of each book, in order; what `folder` has from an earlier start is read and not run.

    `folder/config.json` says what is run, `folder/books/NAME.safetensors` are the finished books.

    Args:
        model: read from.
        books: to score.
        wrong: of each book, the one in its wrong memory.
        plan: which tokens.
        folder: made if missing.
        console: gets an estimate of the time, and a progress bar for each book.

    Raises:
        ValueError: the plan does not fit the model, or the folder holds a run with other settings; before any work.
    """
    plan.validate_for(model)
    claim_folder(folder, describe_run(model, books, wrong, plan))
    memories = MemorizedBooks(model, plan)
    files = {book.name: folder / "books" / f"{book.name}.safetensors" for book in books}
    left = sum(not file.exists() for file in files.values())
    for book, other in zip(books, wrong, strict=True):
        if files[book.name].exists():
            yield book.name, load_book(files[book.name], plan)
            continue
        if left:
            minutes = left * estimate_seconds(model, book, other, plan, memories) / 60
            console.print(f"{left} of {len(books)} books to score: about {minutes:,.1f} minutes")
            left = 0  # said once
        with token_progress(book.name, console) as report:
            found = score_book(model, book, other, plan, memories, report)
        save_book(files[book.name], found)
        yield book.name, found


def estimate_seconds(
    model: LongMemForCausalLM, book: Book, wrong: Book, plan: BookPlan, memories: MemorizedBooks
) -> float:
    """Return the seconds that a book will take, from one window of everything; this warms the machine up as well."""
    found = score_book(model, book, wrong, dataclasses.replace(plan, windows=1, context_windows=1), memories)
    seconds = {}  # longer contexts are run once for all cuts of a stride
    for cut in plan.cuts:
        for system, scores in found.cuts[str(cut)].items():
            is_own = system in SYSTEMS
            key = (system, str(cut) if is_own else str(cut.stride))
            seconds[key] = scores.seconds * (plan.windows if is_own else plan.long_windows)
    return sum(seconds.values()) + found.encoding_seconds * len(book.token_ids)
