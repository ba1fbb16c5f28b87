"""Saved FAISS indexes of a bank on disk: derived data, kept so that opening a bank need not build them.

An index numbers its vectors by labels; the file says which slot each label stands for (of an index over tokens, which token
of which slot), and reopening turns slots into rows. What does not fit, or is damaged, is built anew; chunks written since are
added at the next search.
"""

import hashlib
import json
import secrets
from pathlib import Path
from typing import Any

import faiss
import torch

from longmem.memory.folder.disk_storage import DiskStorage
from longmem.memory.folder.tensor_file import TensorFile, remove, sync, write_tensor_file
from longmem.memory.index import SavedIndex, read_index, write_index
from longmem.memory.rows.table import Table

# An index that covers less than this share of the chunks is saved again when the bank is closed.
COVERED_SHARE = 0.9


class SavedIndexes:
    """The saved indexes in a folder, of the layers (counted by position) that the catalogue lists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listed: dict[int, tuple[Any, ...]] = {}

    def restore(self, rows: list[tuple[Any, ...]]) -> None:
        """Take over what the catalogue lists."""
        self._listed = {row[0]: row for row in rows}

    def read(self, storage: DiskStorage, tokens: int, position: int) -> SavedIndex | None:
        """Return the saved index of one layer, with the rows of today; None if there is none that can be used."""
        if position not in self._listed:
            return None
        _, name, num_bytes, digests, content = self._listed[position]
        described = json.loads(content)
        if described.get("tokens", 1) != tokens:
            return None
        try:
            if digest_of(self.folder / f"{name}.faiss") != described["digest"]:
                return None
            file = TensorFile(self.folder / f"{name}.safetensors", num_bytes, json.loads(digests))
            slots, centres = (file.tensor(each, check=True) for each in ("slots", "centres"))
            files: list[faiss.Index] = read_index(self.folder / f"{name}.faiss")
        except (OSError, ValueError):
            return None
        rows = storage.rows_of(slots.div(tokens, rounding_mode="floor"))
        rows = torch.where(rows < 0, -1, rows * tokens + slots % tokens)
        return SavedIndex(files, rows.numpy(), described["trained_rows"], described["layout"], centres.numpy().copy())

    def write(self, contents: Table, *, again: bool = False) -> list[tuple[Any, ...]]:
        """Write the indexes that cover much more than what is saved; return their rows of the catalogue.

        `again`: write all that hold nothing but live chunks, whatever is saved, and let go of the others.
        """
        rows = []
        for position, index in list(contents.indexes.items()):
            saved = index.export()
            if saved is None:
                continue
            is_clean = bool((saved.rows >= 0).all())
            if again and not is_clean:
                del contents.indexes[position]
            if is_clean if again else not self._is_covered(position, saved):
                rows.append(self._write(position, saved, contents.storage, tokens_of_a_row(contents)))
        return rows

    def keep(self, rows: list[tuple[Any, ...]]) -> None:
        """Note, once rows of `write` are in the catalogue, that these count from now on."""
        self._listed |= {row[0]: row for row in rows}
        self.remove_strangers()

    def clear(self) -> None:
        """Note, after the transaction, that none counts any longer."""
        self._listed = {}
        self.remove_strangers()

    def remove_strangers(self) -> None:
        """Remove files that do not count."""
        known = {row[1] for row in self._listed.values()}
        for path in self.folder.glob("layer*-*.*"):
            if path.stem not in known:
                remove(path)

    def _is_covered(self, position: int, saved: SavedIndex) -> bool:
        """Return whether the saved index of this layout has most of the rows that this one has."""
        if position not in self._listed:
            return False
        described = json.loads(self._listed[position][4])
        same = described["layout"] == saved.layout and described["trained_rows"] == saved.trained_rows
        return same and described["num_labels"] >= COVERED_SHARE * len(saved.rows)

    def _write(self, position: int, saved: SavedIndex, storage: Any, tokens: int) -> tuple[Any, ...]:
        self.folder.mkdir(exist_ok=True)
        name = f"layer{position}-{secrets.token_hex(8)}"
        path = self.folder / f"{name}.faiss"
        try:
            write_index(path, saved.files)
        except RuntimeError as error:  # of FAISS, where the disk is full
            remove(path)
            raise OSError(str(error)) from error
        sync(path)
        rows = torch.from_numpy(saved.rows)
        slots = storage.slots_of(rows.clamp(min=0).div(tokens, rounding_mode="floor")) * tokens + rows % tokens
        slots = torch.where(rows < 0, -1, slots)
        tensors = self.folder / f"{name}.safetensors"
        digests = write_tensor_file(tensors, {"slots": slots, "centres": torch.from_numpy(saved.centres)})
        sync(self.folder)
        described = {
            "layout": saved.layout,
            "trained_rows": saved.trained_rows,
            "num_labels": len(saved.rows),
            "digest": digest_of(path),
            "tokens": tokens,
        }
        return position, name, tensors.stat().st_size, json.dumps(digests), json.dumps(described)


def tokens_of_a_row(contents: Table) -> int:
    """Return how many vectors of an index are of one row."""
    return contents.chunk_size if contents.by_token else 1


def digest_of(path: Path) -> str:
    """Return 16 bytes of BLAKE2b over a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
