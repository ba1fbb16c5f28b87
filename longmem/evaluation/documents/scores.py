"""The scores of one document, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

PER_TOKEN = ("positions", "token_ids", "windows", "starts", "distances")


@dataclasses.dataclass(frozen=True)
class DocumentScores:
    """Losses of the scored tokens of a document, in nats, by system, and what each of these tokens is.

    `positions` are counted from the document's start, `windows` are numbers of windows, `starts` where these begin, and
    `distances` those of `last_distances`. `seconds` are of running the windows, `preparing_seconds` of what went into memory
    or was indexed for them.
    """

    document_id: str
    num_tokens: int
    positions: Int[Tensor, " scored"]
    token_ids: Int[Tensor, " scored"]
    windows: Int[Tensor, " scored"]
    starts: Int[Tensor, " scored"]
    distances: Int[Tensor, " scored"]
    num_bytes: Int[Tensor, " windows"]
    losses: dict[str, Float[Tensor, " scored"]]
    seconds: dict[str, float]
    preparing_seconds: dict[str, float]

    @property
    def num_scored(self) -> int:
        """Return the number of tokens that were scored."""
        return len(self.positions)

    def by_window(self) -> list[DocumentScores]:
        """Return the scores of each window; the seconds stay those of all."""
        return [self._part(number) for number in range(len(self.num_bytes))]

    def _part(self, number: int) -> DocumentScores:
        own = self.windows == number
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[own] for name in PER_TOKEN},
            num_bytes=self.num_bytes[number : number + 1],
            losses={system: losses[own] for system, losses in self.losses.items()},
        )


def file_of(folder: Path, number: int, document_id: str) -> Path:
    """Return the file of a document: its number, since ids may be long or differ in signs that no file name has."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", document_id)[:60].strip(".-")
    return folder / "documents" / f"{number:05d}-{readable or 'document'}.safetensors"


def save_scores(path: Path, scores: DocumentScores) -> None:
    """Write a finished document; another process sees the whole file or none."""
    tensors = {name: getattr(scores, name).contiguous() for name in (*PER_TOKEN, "num_bytes")}
    for system, losses in scores.losses.items():
        tensors[f"{system}/losses"] = losses.contiguous()
        for name in ("seconds", "preparing_seconds"):
            tensors[f"{system}/{name}"] = torch.tensor(getattr(scores, name)[system], dtype=torch.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, {"document_id": scores.document_id})
    os.replace(partial, path)


def load_scores(path: Path, document_id: str, num_tokens: int, systems: tuple[str, ...]) -> DocumentScores:
    """Return what `save_scores` wrote, systems in this order."""
    tensors = load_file(path)
    return DocumentScores(
        document_id,
        num_tokens,
        **{name: tensors[name] for name in (*PER_TOKEN, "num_bytes")},
        losses={system: tensors[f"{system}/losses"] for system in systems},
        seconds={system: tensors[f"{system}/seconds"].item() for system in systems},
        preparing_seconds={system: tensors[f"{system}/preparing_seconds"].item() for system in systems},
    )
