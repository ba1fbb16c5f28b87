"""What crosses the network: tensors as arrays, errors as words, and how many bytes it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longmem.errors import ChangedMemoryError, StaleMemoryError

ERRORS: dict[str, type[Exception]] = {
    each.__name__: each for each in (ChangedMemoryError, StaleMemoryError, ValueError, RuntimeError, OSError)
}


class Packed(NamedTuple):
    """A tensor on its way: bytes that are sent without a copy, and what NumPy has no name for (bfloat16)."""

    array: np.ndarray
    dtype: str


class Request(NamedTuple):
    """What a reading layer asks of a shard; all requests with one `read` are answered from one state of it.

    `encoder`: the digest of its stamp, None for the current one. `selection`: names and tags, None for all documents. `dtype`:
    in which attention is computed; `wire`: in which its outputs come back. `shared`: as many queries, side by side, choose
    together. `by_distance`: find the nearest keys. The others: as for `MemoryBank.search`.
    """

    read: str
    encoder: str | None
    selection: tuple[Sequence[str], Sequence[str]] | None
    layer: int
    queries: Tensor | None
    num_chunks: int
    scaling: float | None = None
    newest: float | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    wire: torch.dtype = torch.float32
    shared: int = 1
    by_distance: bool = False


class Failure(NamedTuple):
    """An error of a shard, to be raised where it was asked."""

    kind: str
    message: str


@dataclasses.dataclass
class Traffic:
    """Calls to shards, and bytes of the tensors and texts that went there and came back; Ray's own envelope is not counted."""

    calls: int = 0
    sent: int = 0
    received: int = 0


def pack(content: Any) -> Any:
    """Return the same with every tensor packed, inside lists, tuples and dictionaries, too."""
    if isinstance(content, Tensor):
        plain = content.detach().cpu().contiguous()
        name = str(plain.dtype).removeprefix("torch.")
        return Packed((plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy(), name)
    return _inside(content, pack)


def unpack(content: Any) -> Any:
    """Return what `pack` was given."""
    if isinstance(content, Packed):
        # A copy: what the store of a node shares between its processes may not be written to.
        array = content.array if content.array.flags.writeable else content.array.copy()
        return torch.from_numpy(array).view(getattr(torch, content.dtype))
    return _inside(content, unpack)


def num_bytes(content: Any) -> int:
    """Return the bytes of all arrays and texts."""
    if isinstance(content, Packed):
        return content.array.nbytes
    if isinstance(content, str | bytes):
        return len(content)
    if isinstance(content, Mapping):
        return sum(map(num_bytes, content.values()))
    return sum(map(num_bytes, content)) if isinstance(content, list | tuple) else 0


def failure_of(error: Exception) -> Failure:
    """Return an error in words; one of an unknown kind says what it was."""
    kind = next((name for name, each in ERRORS.items() if isinstance(error, each)), "")
    return Failure(kind or "RuntimeError", str(error) if kind else f"{type(error).__name__}: {error}")


def raised(answer: Any) -> Any:
    """Return an answer; raise it if it is an error."""
    if not isinstance(answer, Failure):
        return answer
    kind = ERRORS[answer.kind]
    raise kind() if kind is ChangedMemoryError else kind(answer.message)


def _inside(content: Any, change: Any) -> Any:
    if isinstance(content, dict):
        return {name: change(each) for name, each in content.items()}
    if isinstance(content, Request):
        return content._replace(queries=change(content.queries))
    if type(content) in (list, tuple):
        return type(content)(change(each) for each in content)
    return content
