"""The folder of an evaluation on books: one file for each finished book, so that a stopped run can go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longmem.evaluation.book_plan import Book, BookPlan
from longmem.evaluation.perplexity import WindowScores
from longmem.evaluation.results import as_json
from longmem.modeling import LongMemForCausalLM
from longmem.nested import leaves

CONFIG = "config.json"


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
        "dtype": {"backbone": str(model.backbone.dtype), "side_network": str(model.side_network.dtype)},
        "encoder": model.encoder_fingerprint(),
        "side_network": weights_digest(model.side_network),
        "model": model.config.to_dict(),
    }


def weights_digest(module: nn.Module) -> str:
    """Return a hash of the names, shapes, dtypes and values of a module's parameters."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in module.named_parameters():
        values: Tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def claim_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` to a new folder; a folder that has one goes on only with the same settings.

    Raises:
        ValueError: the folder belongs to a run with other settings, whose results would be mixed with these.
    """
    text = as_json(config)
    path = folder / CONFIG
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    before, now = (dict(leaves(json.loads(part))) for part in (path.read_text(encoding="utf-8"), text))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        raise ValueError(
            f"`output` must be a new folder or that of a run with the same settings, but {folder} has "
            f"{name} = {before.get(name)!r} and not {now.get(name)!r}"
            + (f"; {', '.join(changed[1:6])} differ too" if changed[1:] else "")
            + ". Name another folder, or delete this one."
        )
