"""The scores of one text, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from longmem.evaluation.perplexity.scoring import WindowScores
from longmem.evaluation.perplexity.texts import Text
from longmem.evaluation.perplexity.windows import Cut, Window


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Losses on windows of a text by system, and what the scored tokens are; longer contexts may have the first windows only.

    `distances` of the scored tokens of each window are those of `last_distances`; `num_bytes` are of their text.
    """

    name: str
    num_tokens: int
    windows: tuple[Window, ...]
    distances: tuple[Int[Tensor, " _scored"], ...]
    num_bytes: Int[Tensor, " windows"]
    systems: dict[str, WindowScores]

    @property
    def places(self) -> tuple[Int[Tensor, " scored"], Int[Tensor, " scored"]]:
        """Return where the scored tokens stand in the text, and where their windows begin."""
        positions = [torch.arange(window.first_scored, window.end) for window in self.windows]
        starts = [torch.full((window.num_scored,), window.start) for window in self.windows]
        return torch.cat(positions), torch.cat(starts)

    def part(self, windows: slice) -> TextScores:
        """Return the scores of some windows."""
        own = {name: getattr(self, name)[windows] for name in ("windows", "distances", "num_bytes")}
        systems = {name: each.part(windows) for name, each in self.systems.items()}
        return dataclasses.replace(self, **own, systems=systems)

    def by_window(self) -> list[TextScores]:
        """Return the scores of each window."""
        return [self.part(slice(number, number + 1)) for number in range(len(self.windows))]


def file_of(folder: Path, number: int, name: str) -> Path:
    """Return the file of a text: its number, since names may be long or differ in signs that no file name has."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:60].strip(".-")
    return folder / "documents" / f"{number:05d}-{readable or 'document'}.safetensors"


def save_scores(path: Path, text: Text, scores: Mapping[Cut, TextScores]) -> None:
    """Write a finished text; another process sees the whole file or none.

    For each cut, written as window/stride: `CUT/positions`, `token_ids`, `distances` and `starts` (of the window) of each
    scored token, `CUT/num_bytes` of each window, and for each system `CUT/SYSTEM/losses`, `seconds`, `preparing_seconds` and,
    where it was asked for, `memory_share`.
    """
    tensors: dict[str, Tensor] = {}
    for cut, own in scores.items():
        positions, starts = own.places
        found = {"positions": positions, "starts": starts, "token_ids": text.token_ids[positions]}
        found |= {"distances": torch.cat(own.distances), "num_bytes": own.num_bytes}
        for system, each in own.systems.items():
            found[f"{system}/losses"] = torch.cat(each.losses)
            for name in ("seconds", "preparing_seconds"):
                found[f"{system}/{name}"] = torch.tensor(getattr(each, name), dtype=torch.float64)
            if each.memory_share is not None:
                found[f"{system}/memory_share"] = each.memory_share
        tensors |= {f"{cut}/{name}": tensor.contiguous() for name, tensor in found.items()}
    systems = list(next(iter(scores.values())).systems)
    about = {"name": text.name, "num_tokens": len(text.token_ids), "cuts": [*map(str, scores)], "systems": systems}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, {"text": json.dumps(about)})
    os.replace(partial, path)


def load_scores(path: Path) -> dict[Cut, TextScores]:
    """Return what `save_scores` wrote."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["text"])
    tensors, found = load_file(path), {}
    for cut in about["cuts"]:
        own = {name.removeprefix(f"{cut}/"): each for name, each in tensors.items() if name.startswith(f"{cut}/")}
        starts, sizes = own["starts"].unique_consecutive(return_counts=True)
        parts = zip(starts.tolist(), own["positions"].split(sizes.tolist()), strict=True)
        windows = tuple(Window(start, int(part[0]), int(part[-1]) + 1) for start, part in parts)
        systems = {}
        for name in about["systems"]:
            count = int((sizes.cumsum(0) <= len(own[f"{name}/losses"])).sum())  # all windows, or the first ones
            losses, share = own[f"{name}/losses"].split(sizes[:count].tolist()), own.get(f"{name}/memory_share")
            seconds, preparing = (own[f"{name}/{each}"].item() for each in ("seconds", "preparing_seconds"))
            systems[name] = WindowScores(losses, seconds, preparing, share)
        distances, num_bytes = own["distances"].split(sizes.tolist()), own["num_bytes"]
        found[Cut.parse(cut)] = TextScores(about["name"], about["num_tokens"], windows, distances, num_bytes, systems)
    return found
