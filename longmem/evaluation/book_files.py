"""The folder of an evaluation on books: one file for each finished book, so that a stopped run can go on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from longmem.evaluation.book_plan import Book, BookPlan
from longmem.evaluation.perplexity import WindowScores
from longmem.evaluation.runs.folder import describe_model
from longmem.model.modeling import LongMemForCausalLM


@dataclasses.dataclass(frozen=True)
class BookScores:
    """Scores of a book, by cut (written as window/stride) and system, and the seconds that a memorized token took."""

    cuts: dict[str, dict[str, WindowScores]]
    encoding_seconds: float


def save_book(path: Path, book: BookScores) -> None:
    """Write a finished book as one safetensors file; another process sees the whole file or none.

    Losses are `CUT/SYSTEM/losses` (windows, scored tokens), with `seconds` and, where memory was read, `memory_share`
    beside them.
    """
    tensors = {"encoding_seconds": torch.tensor(book.encoding_seconds, dtype=torch.float64)}
    for cut, group in book.cuts.items():
        for system, scores in group.items():
            tensors[f"{cut}/{system}/losses"] = scores.losses.contiguous()
            tensors[f"{cut}/{system}/seconds"] = torch.tensor(scores.seconds, dtype=torch.float64)
            if scores.memory_share is not None:
                tensors[f"{cut}/{system}/memory_share"] = scores.memory_share.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial)
    os.replace(partial, path)


def load_book(path: Path, plan: BookPlan) -> BookScores:
    """Return what `save_book` wrote, cuts and systems in the order of the plan."""
    tensors = load_file(path)
    cuts: dict[str, dict[str, WindowScores]] = {}
    for cut in map(str, plan.cuts):
        cuts[cut] = {}
        for system in plan.systems:
            losses = tensors[f"{cut}/{system}/losses"]
            seconds, share = tensors[f"{cut}/{system}/seconds"].item(), tensors.get(f"{cut}/{system}/memory_share")
            cuts[cut][system] = WindowScores(losses, seconds, losses.numel(), share)
    return BookScores(cuts, tensors["encoding_seconds"].item())


def describe_run(
    model: LongMemForCausalLM, books: Sequence[Book], wrong: Sequence[Book], plan: BookPlan
) -> dict[str, Any]:
    """Return all that the losses of a run depend on, but for versions and hardware: plan, model, weights, texts."""
    return {
        "plan": {**dataclasses.asdict(plan), "cuts": [str(cut) for cut in plan.cuts]},
        "books": {
            book.name: {"tokens": book.digest, "wrong": other.name} for book, other in zip(books, wrong, strict=True)
        },
        "wrong_tokens": {book.name: book.digest for book in wrong},
        **describe_model(model),
    }
