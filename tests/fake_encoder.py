"""An encoder without a network: contextual numbers that follow from its name and from the tokens of a segment."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import torch
from named_encoder import NamedEncoder
from torch import Tensor

from longmem.memory import MemoryBank

LAYERS, CHUNK = (1, 4), 4
HEADS, DIM = 2, 6


@functools.cache
def numbers_of_token(name: str, seen: tuple[int, ...]) -> Tensor:
    """Return what encoder `name` makes of the last of some tokens."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((name, seen)).encode()))
    return torch.randn(len(LAYERS), 2, HEADS, DIM, generator=generator)


def numbers(name: str, ids: tuple[int, ...]) -> Tensor:
    """Return (layers, 2 for keys and values, heads, tokens, dim) that encoder `name` makes of a segment: causal, contextual."""
    return torch.stack([numbers_of_token(name, ids[: place + 1]) for place in range(len(ids))], dim=3)


class FakeModel(NamedEncoder):
    """Encodes, and counts the tokens that it has encoded; `broken` segments come out as NaN."""

    def __init__(self, name: str = "a") -> None:
        super().__init__(name)
        self.num_encoded = 0
        self.broken: set[tuple[int, ...]] = set()

    def encode(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        segment = tuple(ids[0].tolist())
        self.num_encoded += len(segment)
        made = self.numbers(segment)
        if segment in self.broken:
            made = torch.full_like(made, torch.nan)
        return [layer[0][None] for layer in made], [layer[1][None] for layer in made]

    def numbers(self, ids: tuple[int, ...]) -> Tensor:
        return numbers(self.fingerprint, ids)


class TurnedModel(FakeModel):
    """Encodes as encoder "a" does, turned by a linear map and with some noise."""

    def __init__(self, name: str, noise: float = 0.0) -> None:
        super().__init__(name)
        self.noise = noise
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))[0] * 1.5

    def numbers(self, ids: tuple[int, ...]) -> Tensor:
        return numbers("a", ids) @ self.turn + self.noise * numbers(self.fingerprint, ids)


def make_bank(model: Any, **options: Any) -> MemoryBank:
    """Return an empty bank of this encoder, which keeps numbers as they are."""
    settings = {"memory_layers": LAYERS, "chunk_size": CHUNK, "index": "exact", "storage_dtype": "float32"}
    return MemoryBank(**{**settings, "fingerprint": model.encoder_stamp(), **options})


def write(bank: MemoryBank, model: Any, name: str, ids: list[int], segment: str | None = "new") -> None:
    """Add or append one segment, as `memorize` does."""
    keys, values = model.encode(torch.tensor(ids)[None])
    put = bank.append if name in bank else bank.add
    put(name, [key[0] for key in keys], [value[0] for value in values], ids, segment=segment)  # type: ignore[arg-type]


def stored(bank: MemoryBank, name: str) -> Tensor:
    """Return (layers, 2, heads, tokens, dim): the numbers of a document's resident tokens, as they are read."""
    rows = bank._table.ledger.documents[name].rows.values
    layers = [
        torch.stack(bank.gather(layer, rows.expand(HEADS, -1), bank.generation)).flatten(2, 3) for layer in LAYERS
    ]
    return torch.stack(layers).float()[:, :, :, : bank.info(name).num_resident_tokens]


def read_all(bank: MemoryBank, layer: int = LAYERS[0]) -> list[Any]:
    """Return the places of all chunks that a search finds."""
    if not bank.num_chunks:
        return []
    rows = bank.search(layer, torch.ones(HEADS, 1, DIM), bank.num_chunks).rows
    return [place for place in bank.locate(rows[0, 0]) if place is not None]
