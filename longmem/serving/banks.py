"""Banks by name, in memory or each in a folder of its own."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from longmem.files import discard, make_folder, remove_drafts
from longmem.memory import MemoryBank, has_bank
from longmem.model.modeling import LongMemForCausalLM

Result = TypeVar("Result")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class UnknownBankError(ValueError):
    """There is no bank of this name."""


class NamedBanks:
    """The banks of a server.

    Args:
        model: writes and reads them.
        folder: holds a folder for each; None: they are in memory, and gone with the server.
        limit: banks at most.
    """

    def __init__(self, model: LongMemForCausalLM, folder: Path | None, limit: int = 1000) -> None:
        self.model, self.folder, self.limit = model, folder, limit
        self._open: dict[str, MemoryBank] = {}
        self._lock = threading.RLock()
        if folder is not None:
            make_folder(folder)
            remove_drafts(folder)

    def names(self) -> list[str]:
        """Return the names of all banks."""
        on_disk = [] if self.folder is None else [each.name for each in self.folder.iterdir() if self._is_bank(each)]
        with self._lock:
            return sorted({*self._open, *on_disk})

    def get(self, name: str, *, make: bool = False) -> MemoryBank:
        """Return a bank; `make`: an empty one, where there is none.

        Raises ValueError for a name that no bank can have, or too many banks; UnknownBankError, which is one.
        """
        if not NAME.fullmatch(name):
            raise ValueError(
                f"`bank` must be 1 to 64 letters, digits, dots, dashes and underscores, and begin with a letter or digit, "
                f"got {name[:80]!r}."
            )
        with self._lock:
            if name not in self._open:
                self._open[name] = self._opened(name, make)
            return self._open[name]

    def write(self, name: str, write: Callable[[MemoryBank], Result], *, make: bool) -> Result:
        """Return what `write` does with a bank; one that was made for it goes again if that fails. Otherwise as `get`."""
        try:
            return write(self.get(name))
        except UnknownBankError:
            bank = self.get(name, make=make)
        try:
            return write(bank)
        except BaseException:
            self.delete(name)
            raise

    def delete(self, name: str) -> None:
        """Forget a bank, with all that is in it."""
        bank = self.get(name)
        with self._lock:
            bank.close()
            del self._open[name]
            if self.folder is not None:
                discard(self.folder / name)

    def close(self) -> None:
        """Close all banks; those in folders are opened again by the next server."""
        for bank in self._open.values():
            bank.close()
        self._open.clear()

    def _opened(self, name: str, make: bool) -> MemoryBank:
        place = None if self.folder is None else self.folder / name
        if place is not None and self._is_bank(place):
            return MemoryBank.open(place, self.model)
        if not make:
            raise UnknownBankError(f"`bank` must be one that is there, got {name!r}; add a document to make it.")
        if len(self.names()) >= self.limit:
            raise ValueError(f"there are {self.limit} banks already, which is the limit; delete one first.")
        options = {} if place is None else {"folder": place}
        return MemoryBank.for_model(self.model, capacity_tokens=None, **options)

    @staticmethod
    def _is_bank(place: Path) -> bool:
        return NAME.fullmatch(place.name) is not None and not place.is_symlink() and has_bank(place)
