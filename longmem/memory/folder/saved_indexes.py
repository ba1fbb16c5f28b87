"""Saved FAISS indexes of a bank on disk: derived data, kept as arrays so that opening a bank need not build them.

An index numbers its vectors by labels; the file says which slot each label stands for (of an index over tokens, which token
of which slot), and reopening turns slots into rows. What does not fit, or is damaged, is built anew; chunks written since are
added at the next search.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longmem.memory.folder.disk_storage import DiskStorage
from longmem.memory.folder.foreign import UNFIT, fits, parse_json
from longmem.memory.folder.place import INDEX_FOLDER, Place
from longmem.memory.folder.tensor_file import TensorFile, write_tensors
from longmem.memory.index import SavedIndex, arrays_of, index_of
from longmem.memory.rows.table import Table

# An index that covers less than this share of the chunks is saved again when the bank is closed.
COVERED_SHARE = 0.9
MAX_HEADS = 4_096  # more than any model has
DESCRIBED = {"layout": str, "trained_rows": int, "num_labels": int, "rows_of_slot": int}
ENDS = (".safetensors", ".faiss")  # the second of earlier versions, whose files are not read any more


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

    def read(self, storage: DiskStorage, tokens: int, position: int) -> SavedIndex | None:
        """Return the saved index of one layer, with the rows of today; None if there is none that can be used."""
        row = self._listed.get(position)
        if row is None or (described := _described(row)) is None:
            return None
        if described["rows_of_slot"] != tokens:
            return None
        path = self.folder / f"{row[1]}.safetensors"
        try:
            file = TensorFile(path, row[2], parse_json(row[3]))
            arrays = {each: file.tensor(each, check=True).numpy() for each in file.shapes}
            slots, centres = torch.from_numpy(arrays.pop("slots")), arrays.pop("centres").copy()
            if slots.dtype != torch.int64 or slots.ndim != 1 or centres.ndim != 2 or len(centres) > MAX_HEADS:
                return None
            heads: list[dict[str, np.ndarray]] = [{} for _ in centres]
            for each, array in arrays.items():
                heads[int(each.partition(".")[0])][each.partition(".")[2]] = array
            files = [index_of(described["layout"], centres.shape[1], head) for head in heads]
            rows = storage.rows_of(slots.div(tokens, rounding_mode="floor"))
        except (OSError, RuntimeError, *UNFIT):  # FAISS's errors are RuntimeErrors
            return None
        labels = torch.where(rows < 0, -1, rows * tokens + slots % tokens).numpy()
        return SavedIndex(files, labels, described["trained_rows"], described["layout"], centres)

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
                rows.append(self._write(position, saved, contents))
        return [row for row in rows if row is not None]

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
        row = self._listed.get(position)
        if row is None or (described := _described(row)) is None:
            return False
        same = described["layout"] == saved.layout and described["trained_rows"] == saved.trained_rows
        return same and described["num_labels"] >= COVERED_SHARE * len(saved.rows)

    def _write(self, position: int, saved: SavedIndex, contents: Table) -> tuple[Any, ...] | None:
        """Write an index; return its row of the catalogue, None for one whose layout is none that can be kept."""
        heads = [arrays_of(file, saved.layout) for file in saved.files]
        if None in heads:
            return None
        assert self._place is not None
        size = tokens_of_a_row(contents)
        rows = torch.from_numpy(saved.rows)
        places = contents.storage.slots_of(rows.clamp(min=0).div(size, rounding_mode="floor"))  # type: ignore[attr-defined]
        slots = torch.where(rows < 0, -1, places * size + rows.clamp(min=0) % size)
        tensors = {"slots": slots, "centres": torch.from_numpy(saved.centres)}
        for head, arrays in enumerate(heads):
            tensors |= {f"{head}.{each}": torch.from_numpy(array) for each, array in (arrays or {}).items()}
        name = self._place.new_name(f"layer{position}", "")
        with self._place.new_file(INDEX_FOLDER, f"{name}.safetensors") as file:
            digests = write_tensors(file, tensors)
            num_bytes = file.tell()
        self._place.sync(INDEX_FOLDER)
        described = {
            "layout": saved.layout,
            "trained_rows": saved.trained_rows,
            "num_labels": len(saved.rows),
            "rows_of_slot": size,
        }
        return position, name, num_bytes, json.dumps(digests), json.dumps(described)


def tokens_of_a_row(contents: Table) -> int:
    """Return how many vectors of an index are of one row: where keys of tokens are searched, those of a chunk."""
    return contents.chunk_size if contents.by_token else 1


def _described(row: tuple[Any, ...]) -> dict[str, Any] | None:
    """Return what a row of the catalogue says of an index; None where that is not what is written here now."""
    try:
        described = parse_json(row[4])
    except ValueError:
        return None
    return described if fits(described, DESCRIBED) else None
