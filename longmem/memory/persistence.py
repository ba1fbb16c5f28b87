"""Banks on disk: made, opened, saved, loaded; changed in transactions, checked, compacted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch

from longmem.memory import checks
from longmem.memory.age_prior import make_age_prior
from longmem.memory.content import ContentClock
from longmem.memory.contents import BankContents
from longmem.memory.folder.bank_folder import BankFolder, has_bank
from longmem.memory.storage import Storage


class PersistentBank:
    """What `MemoryBank` is on disk. A bank is in memory, without a folder, unless `create` or `open` made it."""

    def __init__(self, **settings: Any) -> None:
        raise NotImplementedError

    index: str
    device: torch.device
    storage_dtype: torch.dtype
    _contents: BankContents
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
        bank._folder = BankFolder(Path(folder), write=True, create=bank._settings(), device=bank.device)
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
    ) -> Self:
        """Return the bank in `folder` as it was at the last commit; it stays on disk, and its changes go there.

        Search keys are read into memory layer by layer, when a layer is first searched; keys and values are mapped, and
        read when they are needed. One process may write; any number may read, each the commit that was the last when it
        opened the bank or called `reload`. What is checked: all of the catalogue; the length and the header of every
        file; search keys when they are read; everything by `verify`.

        Args:
            folder: that `create` or `save` wrote.
            model: refuse the bank unless this model's encoder wrote it.
            read_only: change nothing, and keep nobody from changing it.
            device: where search keys are, and what is read goes.
            mmap: False: keys and values are not mapped but asked for, piece by piece, so that of all that was read nothing
                stays in this process; reading takes two to five times as long.

        Raises ValueError if it is missing, damaged, of a newer version or another encoder, or somebody is writing it.
        """
        opened = BankFolder(Path(folder), write=not read_only, device=torch.device(device), mapped=mmap)
        try:
            settings = opened.read_content()["settings"]
            # Of a bank without a fingerprint nobody knows which encoder wrote it.
            checks.validate_encoder(model, settings["fingerprint"] or "None", str(folder))
            bank = cls(**settings, device=device)
            bank._folder = opened
            bank._read_folder()
        except BaseException:
            opened.close()
            raise
        return bank

    @classmethod
    def load(cls, folder: str | PathLike[str], model: Any = None, *, device: torch.device | str = "cpu") -> Self:
        """Return a copy, in memory, of the bank in `folder`: to change it does not change the folder.

        Everything is read and checked. Raises ValueError if it is missing, damaged, of a newer version or, where `model`
        is given, of another encoder.
        """
        with cls.open(folder, model, read_only=True) as saved:
            saved.verify()
            bank = cls(**saved._settings(), device=device)
            with torch.inference_mode(False):
                saved._contents.copy_to(bank._contents)
        return bank

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the bank to `folder`, in place of one that is there; a process killed meanwhile leaves that, or this one.

        For a bank that is in this very folder there is nothing to do. Raises ValueError if the folder cannot be written.
        """
        if self._folder is not None and Path(folder).resolve() == self._folder.path:
            return
        target = BankFolder(Path(folder), write=True, create=self._settings(), with_first_commit=True)
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
        folder, index = self._folder_or_raise(), self.index
        settings = folder.newest_content()["settings"]
        self.index = settings["index"]  # it and the age prior are the settings that can change
        try:
            contents = self._new_contents(folder.new_storage(self.storage_dtype))
            folder.fill(contents, self._settings())
        except BaseException:
            self.index = index
            raise
        self._contents = contents
        self._clock.use(make_age_prior(settings.get("age_prior")))
