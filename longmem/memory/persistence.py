"""Banks on disk: made, opened, saved, loaded; changed in transactions, checked, compacted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch

from longmem.encoder.checks import refuse_unknown_encoder
from longmem.memory.age_prior import make_age_prior
from longmem.memory.folder.bank_folder import BankFolder, has_bank
from longmem.memory.locking import BankLock
from longmem.memory.rows.storage import Storage
from longmem.memory.rows.table import BankContents
from longmem.memory.visibility import ContentClock


class PersistentBank:
    """What `MemoryBank` is on disk. A bank is in memory, without a folder, unless `create` or `open` made it."""

    def __init__(self, **settings: Any) -> None:
        raise NotImplementedError

    index: str
    refresh: str
    device: torch.device
    storage_dtype: torch.dtype
    _contents: BankContents
    _lock: BankLock
    _clock: ContentClock
    _folder: BankFolder | None = None
    _in_transaction = False

    @classmethod
    def create(cls, folder: str | PathLike[str], **settings: Any) -> Self:
        """Return a new, empty bank in `folder`, open for writing; `settings` are the arguments of the class.

        Every change is on the disk when the call returns. The default capacity is without limit. Raises ValueError if a
        bank is there already, or the folder cannot be written.
        """
        if has_bank(folder):
            raise ValueError(f"`folder` must not hold a bank yet, got {str(folder)!r}; open it with `MemoryBank.open`.")
        bank = cls(**{"capacity_tokens": None} | settings)
        bank._folder = BankFolder(Path(folder), write=True, create=bank._description(), device=bank.device)
        try:
            bank._read_folder()
        except BaseException:
            bank._folder.close()
            raise
        return bank

    @classmethod
    def open(
        cls,
        folder: str | PathLike[str],
        model: Any = None,
        *,
        read_only: bool = False,
        device: torch.device | str = "cpu",
        mmap: bool = True,
        refresh: str | Mapping[str, Any] | None = None,
        strict: bool = True,
    ) -> Self:
        """Return the bank in `folder` as it was at the last commit; it stays on disk, and its changes go there.

        Search keys are read into memory layer by layer, when a layer is first searched; keys and values are mapped, and
        read when they are needed. One process may write; any number may read, each the commit that was the last when it
        opened the bank or called `reload`. What is checked: all of the catalogue; the length and the header of every
        file; search keys when they are read; everything by `verify`.

        Args:
            folder: that `create` or `save` wrote.
            model: that will read the bank; if its encoder is not the one that wrote it, the refresh policy acts.
            read_only: change nothing, and keep nobody from changing it.
            device: where search keys are, and what is read goes.
            mmap: False: keys and values are not mapped but asked for, piece by piece, so that of all that was read nothing
                stays in this process; reading takes two to five times as long.
            refresh: policy to follow from now on; None: the bank's own, by default "frozen", which refuses another encoder.
            strict: False: read what another encoder wrote as it is, from now on with every entry's encoder unknown.

        Raises ValueError if it is missing, damaged, of another version, or somebody is writing it; StaleMemoryError, which is
        one, if another encoder wrote it and the policy is "frozen".
        """
        opened = BankFolder(Path(folder), write=not read_only, device=torch.device(device), mapped=mmap)
        try:
            settings = opened.read_content()["settings"]
            bank = cls(**settings, device=device)
            bank._folder = opened
            bank._read_folder()
            bank._open_for(model, refresh, strict)
        except BaseException:
            opened.close()
            raise
        return bank

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        model: Any = None,
        *,
        device: torch.device | str = "cpu",
        refresh: str | Mapping[str, Any] | None = None,
        strict: bool = True,
    ) -> Self:
        """Return a copy, in memory, of the bank in `folder`: to change it does not change the folder.

        Everything is read and checked; arguments and errors are those of `open`.
        """
        with cls.open(folder, read_only=True) as saved:
            saved.verify()
            bank = cls(**saved._settings(), device=device)
            with torch.inference_mode(False):
                saved._contents.copy_to(bank._contents)
        bank._open_for(model, refresh, strict)
        return bank

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the bank to `folder`, in place of one that is there; a process killed meanwhile leaves that, or this one.

        For a bank that is in this very folder there is nothing to do. Raises ValueError if the folder cannot be written.
        """
        if self._folder is not None and Path(folder).resolve() == self._folder.path:
            return
        target = BankFolder(Path(folder), write=True, create=self._description(), with_first_commit=True)
        try:
            target.replace(self._contents, self._new_contents(target.new_storage(self.storage_dtype)), self._settings())
        finally:
            target.close()

    # Changing what is on disk.

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all changes inside the block durable together at its end or, if it raises, none of them.

        Without it, every change is a transaction of its own. A block inside a block is part of it. One thread at a time may
        change a bank. Of a bank in memory nothing is undone.
        """
        if self._folder is None or self._in_transaction:
            yield
            return
        self.refuse_reader()
        before = self._contents.ledger.version
        self._in_transaction = True
        try:
            yield
            if self._contents.ledger.version != before or self._contents.ledger.read:
                before = -1  # a commit that fails leaves its traces in what is in memory
                with self._lock:  # files are merged and let go, so no other thread may be reading them
                    self._folder.commit(self._contents, self._settings())
        except BaseException:
            if self._contents.ledger.version != before:
                self._read_folder()
            raise
        finally:
            self._in_transaction = False

    def refuse_reader(self) -> None:
        """Raise ValueError if the bank was opened to be read, or is closed: what is to be written later need not begin."""
        if self._folder is not None:
            self._folder.refuse_reader()

    def reload(self) -> bool:
        """Read the last commit of the folder again; return whether there was a newer one."""
        folder = self._folder_or_raise()
        if folder.is_current():
            return False
        self._read_folder()
        return True

    def verify(self) -> list[Path]:
        """Return the files of the bank's folder that count, after a check that every byte of them is as it was written.

        Raises ValueError, which names the file, where one is not.
        """
        return self._folder_or_raise().verify(self._contents)

    def compact(self) -> None:
        """Give back the space of what was deleted or evicted: afterwards no byte of it is in the bank's folder.

        Files that hold some of it are written anew, one after the other, so there must be room for one more of them.
        """
        folder = self._folder_or_raise()
        folder.refuse_reader()
        if self._in_transaction:
            raise ValueError(
                "`compact` must not be called inside a transaction, which it would end; call it afterwards."
            )
        try:
            with self._lock:
                self._contents.drop_expired()
                folder.compact(self._contents, self._settings())
        except BaseException:
            self._read_folder()
            raise

    @property
    def num_dead_bytes(self) -> int:
        """Return the bytes of deleted and evicted chunks in the bank's folder, which `compact` gives back."""
        return self._folder_or_raise().num_dead_bytes(self._contents)

    def close(self) -> None:
        """Save indexes and how often documents were read, and let others write; the bank cannot be changed afterwards."""
        if self._folder is None or self._folder.is_closed:
            return
        try:
            if self._folder.is_writable:
                with self.transaction():
                    pass
                self._folder.save_indexes(self._contents)
        finally:
            self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Inside.

    def use_refresh(self, refresh: str | Mapping[str, Any]) -> None:
        raise NotImplementedError

    def read_by(self, model: Any) -> None:
        raise NotImplementedError

    def read_as_is(self, model: Any) -> None:
        raise NotImplementedError

    def _open_for(self, model: Any, refresh: str | Mapping[str, Any] | None, strict: bool) -> None:
        """Follow a policy and, with a model, make ready to be read by it."""
        if refresh is not None:
            self.use_refresh(refresh)
        if model is None:
            return
        refuse_unknown_encoder(self._contents.encoders.stamp)
        if strict:
            self.read_by(model)
        else:
            self.read_as_is(model)

    def _description(self) -> dict[str, Any]:
        """Return what a new folder says of the bank."""
        return {"settings": self._settings(), "encoders": self._contents.encoders.to_json()}

    def _settings(self) -> dict[str, Any]:
        raise NotImplementedError

    def _new_contents(self, storage: Storage | None = None) -> BankContents:
        raise NotImplementedError

    def _folder_or_raise(self) -> BankFolder:
        if self._folder is None:
            raise ValueError("this bank is in memory, without a folder; `save` it and `MemoryBank.open` the folder.")
        return self._folder

    @torch.inference_mode(False)
    def _read_folder(self) -> None:
        """Make the contents those of the last commit."""
        folder, index, refresh = self._folder_or_raise(), self.index, self.refresh
        settings = folder.newest_content()["settings"]
        self.index, self.refresh = settings["index"], settings["refresh"]  # with the age prior, what can change
        try:
            contents = self._new_contents(folder.new_storage(self.storage_dtype))
            folder.fill(contents, self._settings())
        except BaseException:
            self.index, self.refresh = index, refresh
            raise
        with self._lock:
            self._contents = contents
            self._clock.use(make_age_prior(settings.get("age_prior")))
