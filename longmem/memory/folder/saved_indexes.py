"""Saved FAISS indexes of a bank on disk: derived data, kept so that opening a bank need not build them.

An index numbers its vectors by labels; the file says which slot each label stands for, and reopening turns slots into
rows. What does not fit, or is damaged, is built anew; chunks written since are added at the next search.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import faiss
import torch

from longmem.memory.folder.disk_storage import DiskStorage
from longmem.memory.folder.place import INDEX_FOLDER, Place
from longmem.memory.folder.tensor_file import TensorFile, write_tensors
from longmem.memory.index import SavedIndex, read_index, write_index
from longmem.memory.rows.table import Table

# An index that covers less than this share of the chunks is saved again when the bank is closed.
COVERED_SHARE = 0.9
ENDS = (".faiss", ".safetensors")


class SavedIndexes:
    """The saved indexes in a folder, of the layers (counted by position) that the catalogue lists.

    `place`: to write them; None: they are read only.
    """

    def __init__(self, folder: Path, place: Place | None) -> None:
        self.folder, self._place = folder, place
        self._listed: dict[int, tuple[Any, ...]] = {}

    def restore(self, rows: list[tuple[Any, ...]]) -> None:
        """Take over what the catalogue lists."""
        self._listed = {row[0]: row for row in rows}

    def read(self, storage: DiskStorage, position: int) -> SavedIndex | None:
        """Return the saved index of one layer, with the rows of today; None if there is none that can be used."""
        if position not in self._listed:
            return None
        _, name, num_bytes, digests, content = self._listed[position]
        described = json.loads(content)
        try:
            if digest_of(self.folder / f"{name}.faiss") != described["digest"]:
                return None
            file = TensorFile(self.folder / f"{name}.safetensors", num_bytes, json.loads(digests))
            slots, centres = (file.tensor(each, check=True) for each in ("slots", "centres"))
            files: list[faiss.Index] = read_index(self.folder / f"{name}.faiss")
        except (OSError, ValueError):
            return None
        rows = storage.rows_of(slots).numpy()
        return SavedIndex(files, rows, described["trained_rows"], described["layout"], centres.numpy().copy())

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
                rows.append(self._write(position, saved, contents.storage))
        return rows

    def keep(self, rows: list[tuple[Any, ...]]) -> None:
        """Note, once rows of `write` are in the catalogue, that these count from now on, and remove those they replace."""
        gone = [self._listed[row[0]] for row in rows if row[0] in self._listed]
        self._listed |= {row[0]: row for row in rows}
        self._remove(gone)

    def clear(self) -> None:
        """Note, after the transaction, that none counts any longer."""
        gone, self._listed = list(self._listed.values()), {}
        self._remove(gone)

    def sweep(self) -> None:
        """Remove what writers of this folder have left and does not count."""
        assert self._place is not None
        self._place.sweep(INDEX_FOLDER, {f"{row[1]}{end}" for row in self._listed.values() for end in ENDS})

    def _remove(self, rows: list[tuple[Any, ...]]) -> None:
        assert self._place is not None
        for row in rows:
            for end in ENDS:
                self._place.remove(INDEX_FOLDER, f"{row[1]}{end}")

    def _is_covered(self, position: int, saved: SavedIndex) -> bool:
        """Return whether the saved index of this layout has most of the rows that this one has."""
        if position not in self._listed:
            return False
        described = json.loads(self._listed[position][4])
        same = described["layout"] == saved.layout and described["trained_rows"] == saved.trained_rows
        return same and described["num_labels"] >= COVERED_SHARE * len(saved.rows)

    def _write(self, position: int, saved: SavedIndex, storage: Any) -> tuple[Any, ...]:
        assert self._place is not None
        name = self._place.new_name(f"layer{position}", "")
        rows = torch.from_numpy(saved.rows)
        slots = torch.where(rows < 0, -1, storage.slots_of(rows.clamp(min=0)))
        with self._place.new_file(INDEX_FOLDER, f"{name}.faiss") as file:
            try:
                write_index(file.fileno(), saved.files)
            except RuntimeError as error:  # of FAISS, where the disk is full
                raise OSError(str(error)) from error
        with self._place.new_file(INDEX_FOLDER, f"{name}.safetensors") as file:
            digests = write_tensors(file, {"slots": slots, "centres": torch.from_numpy(saved.centres)})
            num_bytes = file.tell()
        self._place.sync(INDEX_FOLDER)
        described = {
            "layout": saved.layout,
            "trained_rows": saved.trained_rows,
            "num_labels": len(saved.rows),
            "digest": digest_of(self.folder / f"{name}.faiss"),
        }
        return position, name, num_bytes, json.dumps(digests), json.dumps(described)


def digest_of(path: Path) -> str:
    """Return 16 bytes of BLAKE2b over a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
