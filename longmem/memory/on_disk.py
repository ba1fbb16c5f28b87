"""A bank's place on disk: its changes are committed there, and can be read again, checked and compacted."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from longmem.memory.folder.bank_folder import BankFolder
from longmem.memory.folder.disk_storage import DiskStorage
from longmem.memory.rows.table import Table


class OnDisk:
    """The part of a bank that is in a folder.

    Args:
        folder: opened.
        table: of the bank; filled with what the folder holds.
        settings: method that returns the arguments of the bank, as the folder keeps them.
        take_settings: method that makes the bank follow those settings of the folder that can change.
    """

    def __init__(
        self,
        folder: BankFolder,
        table: Table,
        settings: Callable[[], dict[str, Any]],
        take_settings: Callable[[dict[str, Any]], None],
    ) -> None:
        self._folder = folder
        # Weak references: a bank that nobody holds any longer lets go of its files at once, not at the next collection.
        self._table_or_none = weakref.ref(table)
        self._settings_or_none, self._take_or_none = weakref.WeakMethod(settings), weakref.WeakMethod(take_settings)
        self._in_transaction = False
        self._read()

    @property
    def _table(self) -> Table:
        table = self._table_or_none()
        if table is None:
            raise ReferenceError("the bank of this folder is gone; hold the bank as long as you use its `folder`.")
        return table

    def _settings(self) -> dict[str, Any]:
        settings = self._settings_or_none()
        assert settings is not None  # it lives as long as the table
        return settings()

    def _take_settings(self, settings: dict[str, Any]) -> None:
        take = self._take_or_none()
        assert take is not None
        take(settings)

    @property
    def path(self) -> Path:
        return self._folder.path

    @property
    def is_writable(self) -> bool:
        return self._folder.is_writable

    @property
    def num_dead_bytes(self) -> int:
        """Return the bytes of deleted and evicted chunks in the folder, which `compact` gives back."""
        storage = self._table.storage
        assert isinstance(storage, DiskStorage)
        return storage.num_dead_bytes

    def refuse_reader(self) -> None:
        self._folder.refuse_reader()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        if self._in_transaction:
            yield
            return
        self.refuse_reader()
        before = self._table.ledger.version
        self._in_transaction = True
        try:
            yield
            if self._table.ledger.version != before or self._table.ledger.read:
                before = -1  # a commit that fails leaves its traces in what is in memory
                with self._table.lock:  # files are merged and let go, so no other thread may be reading them
                    self._folder.commit(self._table, self._settings())
        except BaseException:
            if self._table.ledger.version != before:
                self._read()
            raise
        finally:
            self._in_transaction = False

    def reload(self) -> bool:
        """Read the last commit of the folder again; return whether there was a newer one."""
        if self._folder.is_current():
            return False
        self._read()
        return True

    def verify(self) -> list[Path]:
        """Return the files of the folder that count, after a check that every byte of them is as it was written.

        Raises ValueError, which names the file, where one is not.
        """
        return self._folder.verify(self._table)

    def compact(self) -> None:
        """Give back the space of what was deleted or evicted: afterwards no byte of it is in the folder.

        Files that hold some of it are written anew, one after the other: there must be room for one more.
        """
        self.refuse_reader()
        if self._in_transaction:
            raise ValueError(
                "`compact` must not be called inside a transaction, which it would end; call it afterwards."
            )
        try:
            with self._table.lock:
                self._table.drop_expired()
                self._folder.compact(self._table, self._settings())
        except BaseException:
            self._read()
            raise

    def close(self) -> None:
        if self._folder.is_closed:
            return
        try:
            if self.is_writable:
                with self.transaction():
                    pass
                self._folder.save_indexes(self._table)
        finally:
            self._folder.close()

    @torch.inference_mode(False)
    def _read(self) -> None:
        """Make the table that of the last commit."""
        before = self._settings()
        self._take_settings(self._folder.newest_content()["settings"])
        try:
            table = self._table.empty(self._folder.new_storage(self._table.storage_dtype))
            self._folder.fill(table, self._settings())
        except BaseException:
            self._take_settings(before)
            raise
        with self._table.lock:
            self._table.become(table)
