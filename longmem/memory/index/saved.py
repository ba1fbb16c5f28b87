"""The data of an approximate index outside of it: what a bank on disk keeps, so that reopening need not build it."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import faiss
import numpy as np
from jaxtyping import Float, Int

MAGIC = b"longmem index 1\n"
MAX_HEADS = 4_096  # more than any model has: a larger number was not written by `write_index`


@dataclass(frozen=True)
class SavedIndex:
    """The state of an index: derived data, that can be built anew from the store at any time."""

    files: list[faiss.Index]  # one for each key-value head
    rows: Int[np.ndarray, " labels"]  # the row of each label, -1 for one that is dead
    trained_rows: int  # live rows when it was trained
    layout: str  # what was built, so that other settings do not adopt it
    centres: Float[np.ndarray, "kv_heads dim"]  # for each head the mean key that was subtracted from all keys


def write_index(path: str | PathLike[str] | int, files: list[faiss.Index]) -> None:
    """Write FAISS indexes to one file, or descriptor, one after the other, in FAISS's own format."""
    with open(path, "wb", closefd=not isinstance(path, int)) as file:
        file.write(MAGIC + len(files).to_bytes(8, "little"))
        for each in files:
            faiss.write_index(each, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]


def read_index(path: str | PathLike[str]) -> list[faiss.Index]:
    """Return the FAISS indexes of a file that `write_index` has written. Raises ValueError for any other.

    FAISS trusts much of what it reads, so the caller compares a checksum first: this finds truncation, not malice.
    """
    with Path(path).open("rb") as file:
        heads = file.read(len(MAGIC) + 8)
        count = int.from_bytes(heads[len(MAGIC) :], "little")
        if len(heads) < len(MAGIC) + 8 or not heads.startswith(MAGIC) or not 1 <= count <= MAX_HEADS:
            raise _damaged(path)
        reader = faiss.PyCallbackIOReader(file.read)  # type: ignore[attr-defined]
        try:
            files = [faiss.read_index(reader) for _ in range(count)]
        except (RuntimeError, MemoryError) as error:
            raise _damaged(path) from error
        if file.read(1):
            raise _damaged(path)
    return files


def _damaged(path: str | PathLike[str]) -> ValueError:
    return ValueError(f"`path` must be a file of `write_index`, got {str(path)!r}, which is damaged; build it anew.")
