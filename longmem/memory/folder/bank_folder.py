"""A bank in a folder: opening it, committing what changed, checking it, giving back the space of what was deleted.

catalogue.sqlite    what counts (`catalogue.py`)
segments/           keys, values and search keys; files that never change (`disk_storage.py`)
indexes/            FAISS indexes, derived from the search keys; rebuilt where they are missing or do not fit
lock                held by the one process that may write (`place.py`)

A file is removed only if writers of this very directory made it, and the catalogue on the disk, read under the lock, does not
name it. A failure leaves the last commit and an object that is of it; where that is not certain, one that refuses everything.
"""

import contextlib
import functools
import json
import os
import secrets
import sqlite3
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from longmem.memory.folder import records
from longmem.memory.folder.catalogue import BUSY_SECONDS, CATALOGUE, INDEXES, SEGMENTS, SOURCES, TABLES, Catalogue
from longmem.memory.folder.disk_storage import DiskStorage, Segment, rewrite, segments_to_merge
from longmem.memory.folder.foreign import damaged, denied, not_read, said_by
from longmem.memory.folder.place import INDEX_FOLDER, SEGMENT_FOLDER, WORD, Place, refuse_moved
from longmem.memory.folder.saved_indexes import SavedIndexes, tokens_of_a_row
from longmem.memory.folder.tensor_file import TensorFile, not_written
from longmem.memory.rows.documents import Source
from longmem.memory.rows.table import Table, tables

ATTEMPTS_TO_READ = 10


class BankFolder:
    """The folder of a bank, open until `close`; a reader sees the commit that was the last when it opened the bank.

    Args:
        path: of the folder.
        write: to change it, as the only process.
        create: description of a new bank, its settings and its encoders, to be made if none is there.
        with_first_commit: make it then, not now.
        device: where search keys are, and gathered chunks go.
        mapped: whether chunks are read by mapping files (`TensorFile`).

    Raises ValueError if there is no bank, or it is damaged, of another version, or written by another process.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        write: bool,
        create: dict[str, Any] | None = None,
        with_first_commit: bool = False,
        device: torch.device | None = None,
        mapped: bool = True,
    ) -> None:
        # Where it is now: the process may go to another folder, and a link may come to lead elsewhere.
        self.path = folder_path(path).resolve()
        self.is_writable = write
        self.device = torch.device("cpu") if device is None else device
        self.mapped = mapped
        self._place: Place | None = None
        self._broken: str | None = None  # why this object refuses everything
        self._segments: dict[int, str] = {}  # names that the catalogue holds, by first slot
        try:
            is_there = has_bank(self.path)
            if write and (create is not None or is_there):
                self._place = self._open_place()
                if not is_there:
                    self._place.make_catalogue()
            start: dict[str, Any] = {"commit": 0, "next_serial": 0, "next_order": 0, "next_slot": 0, "shapes": []}
            start["word"] = None if self._place is None else self._place.word
            content = None if create is None else start | create
            self.catalogue = Catalogue(self.path, write, content, with_first_commit=with_first_commit)
            self._opened = os.stat(self.catalogue.path)
            if self.catalogue.is_new and content is not None:
                self.catalogue.content = content
        except OSError as error:
            self._release()
            raise (not_written if write else not_read)(self.path, error) from error
        except BaseException:
            self._release()
            raise
        self.indexes = SavedIndexes(self.path / INDEX_FOLDER, self._place)
        _open_folders.add(self)

    @property
    def content(self) -> dict[str, Any]:
        """Return what the last commit that was read or written says about the bank as a whole; empty for a new one."""
        return self.catalogue.content

    def close(self) -> None:
        self.catalogue.close()
        self._release()

    @property
    def is_here(self) -> bool:
        """Return whether this process, and not one that it was forked from, may write."""
        return self._place is not None and self._place.is_here

    @property
    def is_broken(self) -> bool:
        """Return whether a failure made this object refuse everything."""
        return self._broken is not None

    def break_off(self, error: BaseException) -> ValueError:
        """Return the error of an object that from now on refuses everything, and lets others write."""
        self._broken = (
            f"the bank in {str(self.path)!r} failed midway ({str(error) or type(error).__name__}), and what was opened can no "
            "longer be trusted; nothing was removed, open the bank again: it holds its last commit."
        )
        with contextlib.suppress(sqlite3.Error):
            self.catalogue.close()
        self._release()
        return ValueError(self._broken)

    def refuse_closed(self) -> None:
        """Raise ValueError if the bank was closed, or failed midway."""
        if self._broken is not None:
            raise ValueError(self._broken)
        self.catalogue.refuse_closed()

    def _release(self) -> None:
        if self._place is not None:
            self._place.close()

    # Reading.

    def read_content(self) -> dict[str, Any]:
        with self._snapshot():
            return self.catalogue.read_content()

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Read inside the block from one commit of the very catalogue that was opened.

        If another one has its name, SQLite would take that one's journal for its own, and undo it here.
        """
        self.refuse_closed()
        try:
            refuse_moved(self.catalogue.path, self._opened, may_be_gone=True)
        except OSError as error:
            raise not_read(self.catalogue.path, error) from error
        with self.catalogue.snapshot():
            yield

    def newest_content(self) -> dict[str, Any]:
        """Return what the last commit says about the bank, and stay with the commit that was read before."""
        before = self.content
        try:
            return self.read_content()
        finally:
            self.catalogue.content = before

    def is_current(self) -> bool:
        """Return whether the commit that was read is still the last one."""
        return is_same(self.newest_content(), self.content)

    def new_storage(self, storage_dtype: torch.dtype) -> DiskStorage:
        """Return an empty storage in this folder."""
        place = self.path / SEGMENT_FOLDER
        return DiskStorage(place, self._place, storage_dtype, self.device, self.mapped, self.refuse_reader)

    def fill(self, contents: Table, settings: dict[str, Any]) -> None:
        """Read the last commit into empty contents over a `new_storage`.

        Raises ValueError if the folder is damaged, or the bank there no longer has these settings.
        """
        before = self.content
        try:
            with records.without_collections():
                self._fill(contents, settings)
        except BaseException:
            self.catalogue.content = before  # what the caller goes on with is not of another commit
            raise

    def _fill(self, contents: Table, settings: dict[str, Any]) -> None:
        place = self.path / SEGMENT_FOLDER
        for attempt in range(ATTEMPTS_TO_READ):
            with self._snapshot():
                content = self.catalogue.read_content()
                rows = {table.name: self.catalogue.read_table(table) for table in TABLES if not table.num_large}
                self.catalogue.check_total(SOURCES)
            self._take_word(content)
            if records.fixed(content["settings"]) != records.fixed(settings):
                raise ValueError(
                    f"the bank in {str(self.path)!r} was replaced by one with other settings, {content['settings']}, not "
                    f"{settings}; open it again."
                )
            try:
                segments = [
                    Segment(first, count, 0, TensorFile(place / name, num_bytes, json.loads(digests), self.mapped))
                    for first, count, name, num_bytes, digests in rows["segments"]
                ]
                break
            except ValueError:
                # A writer may have merged or removed segments since the catalogue was read.
                if attempt == ATTEMPTS_TO_READ - 1 or self.is_current():
                    raise
        self._segments = {row[0]: row[2] for row in rows["segments"]}
        with said_by(self.catalogue.path):
            records.restore(contents, content, segments, rows, self._read_source)
        self.indexes.restore(rows["indexes"])
        contents.find_saved = functools.partial(self.indexes.read, storage_of(contents), tokens_of_a_row(contents))
        if self.is_here:
            self._sweep()

    @torch.inference_mode(False)  # it may be read while the model runs, and written to later
    def _read_source(self, serial: int, start: int, stop: int) -> Source | None:
        with said_by(self.catalogue.path), self._snapshot():
            known = self.catalogue.floor(SOURCES, serial, start), stop - 1
            return records.read_source(self.catalogue.read_large(SOURCES, serial, between=known), start, stop)

    # Writing.

    def replace(self, source: Table, contents: Table, settings: dict[str, Any]) -> None:
        """Make a copy of `source` the bank, instead of what was there; `contents` are empty, over a `new_storage`."""
        if not self.catalogue.is_new:
            with self._snapshot():
                content = self.catalogue.read_content()
                rows, indexes = self.catalogue.read_table(SEGMENTS), self.catalogue.read_table(INDEXES)
            self._take_word(content)
            self._segments = {row[0]: row[2] for row in rows}
            self.indexes.restore(indexes)
        contents.ledger.next_serial = self.content["next_serial"]
        storage_of(contents).next_slot = self.content["next_slot"]
        try:
            with self._explained():
                source.copy_to(contents)
                self._commit(contents, settings, replace=True)
        except BaseException:
            if not self.is_broken:
                self._sweep()
            raise

    def commit(self, contents: Table, settings: dict[str, Any]) -> None:
        """Make what `contents` holds the bank, for good; a process killed meanwhile leaves the last commit, or this one.

        Raises ValueError, and leaves the last commit, if the disk is full or the folder cannot be written. The caller then
        has to fill its contents anew, unless the object `is_broken`: nobody knows then which of the two it is.
        """
        self.refuse_reader()
        if storage_of(contents).is_torn:
            raise ValueError(
                f"this transaction of the bank in {str(self.path)!r} must not be committed, because a change inside it failed "
                "midway; nothing of it was kept, do it again."
            )
        with self._explained():
            self._commit(contents, settings)

    def merge(self, contents: Table, settings: dict[str, Any]) -> None:
        """Write segments anew, in commits of their own, where there are many small ones; errors as for `commit`.

        Raises ValueError, which names the file, also where a segment is damaged.
        """
        with self._explained():
            while victims := segments_to_merge(storage_of(contents)):
                rewrite(contents, storage_of(contents), victims)
                self._commit(contents, settings)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise errors of the system and of SQLite as a ValueError that says what to do."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            raise not_written(self.path, error) from error
        except sqlite3.DatabaseError as error:
            raise damaged(self.catalogue.path, f"cannot be written ({error})") from error

    @contextlib.contextmanager
    def _next_commit(self) -> Iterator[None]:
        """Make the changes of the catalogue inside the block the next commit, or none of them.

        Raises ValueError if the last commit on the disk is not the one that was read, and where it is not known afterwards
        which one is the last; then the object is broken off.
        """
        self.refuse_reader()
        before = self.content
        try:
            with self.catalogue.transaction():
                if not (self.catalogue.is_new or is_same(self.catalogue.read_content(), before)):
                    raise ValueError("somebody else has changed it")
                yield
                self.catalogue.describe(self.content | {"commit": before["commit"] + 1, "state": secrets.token_hex(4)})
        except BaseException as error:
            try:
                is_new = self.catalogue.is_new
                is_undone = self.catalogue.is_blank() if is_new else is_same(self.read_content(), before)
            except Exception:
                is_undone = False
            self.catalogue.content = before
            if is_undone:
                raise
            broken = self.break_off(error)
            raise (broken if isinstance(error, Exception) else error) from error

    def _commit(self, contents: Table, settings: dict[str, Any], *, replace: bool = False) -> None:
        storage, ledger = storage_of(contents), contents.ledger
        storage.flush()
        storage.segments = [segment for segment in storage.segments if segment.num_live]
        stored = {segment.first_slot: segment.file for segment in storage.segments if segment.file is not None}
        with self._next_commit():
            for table in TABLES if replace else ():
                self.catalogue.remove(table, ())
            for serial in sorted(ledger.changed):
                if (document := ledger.by_serial.get(serial)) is None:
                    records.remove_document(self.catalogue, serial)
                else:
                    records.put_document(self.catalogue, document, contents.chunk_size)
            for serial in sorted(ledger.read - ledger.changed):
                if serial in ledger.by_serial:
                    records.put_usage(self.catalogue, ledger.by_serial[serial])
            for first_slot in self._segments.keys() - stored.keys():
                self.catalogue.remove(SEGMENTS, (first_slot,))
            for segment in storage.segments:
                file = segment.file
                if file is not None and (replace or self._segments.get(segment.first_slot) != file.path.name):
                    digests = json.dumps(file.digests, sort_keys=True)
                    row = segment.first_slot, segment.num_slots, file.path.name, file.num_bytes, digests
                    self.catalogue.put(SEGMENTS, row)
            self.catalogue.content = self.content | {
                "settings": settings,
                "encoders": contents.encoders.to_json(),
                "shapes": [list(shape) for shape in storage.shapes],
                "next_serial": ledger.next_serial,
                "next_order": ledger.next_order,
                "next_slot": storage.next_slot,
                "word": self._place_to_write.word,
            }
        # From here on the commit counts, and nothing below may undo it.
        if replace:
            self.indexes.clear()
        for serial in ledger.changed:
            if (document := ledger.by_serial.get(serial)) is not None:
                document.source_is_stored(self._read_source)
        ledger.changed.clear()
        ledger.read.clear()
        gone = set(self._segments.values()) - {file.path.name for file in stored.values()}
        self._segments = {first_slot: file.path.name for first_slot, file in stored.items()}
        for name in gone:
            self._place_to_write.remove(SEGMENT_FOLDER, name)

    def compact(self, contents: Table, settings: dict[str, Any]) -> None:
        """Write segments with deleted or evicted chunks anew, one by one, and the catalogue without its free pages."""
        storage = storage_of(contents)
        self.commit(contents, settings)
        self.merge(contents, settings)
        for segment in [segment for segment in storage.segments if segment.num_live < segment.num_slots]:
            rewrite(contents, storage, [segment])
            self.commit(contents, settings)
        # Asked for their source before the transaction: it may have to be read, in a transaction of its own.
        evicted = [each for each in contents.ledger.documents.values() if each.first_chunk(contents.chunk_size)]
        trimmed = [document for document in evicted if document.source is not None]
        with self._explained():
            with self._next_commit():
                for document in trimmed:
                    records.trim_source(self.catalogue, document, contents.chunk_size)
                self.catalogue.remove(INDEXES, ())
            self.indexes.clear()
            self._save_indexes(contents, again=True)
            self.catalogue.vacuum()

    def save_indexes(self, contents: Table) -> None:
        """Save the indexes that were built since, so that the next who opens the bank need not build them."""
        try:
            with self._explained():
                self._save_indexes(contents)
        except ValueError as error:  # nothing is lost that counts
            if not self.is_broken:
                self.indexes.sweep()
            warnings.warn(f"the index of the bank in {str(self.path)!r} was not saved: {error}", stacklevel=4)

    def _save_indexes(self, contents: Table, *, again: bool = False) -> None:
        self.refuse_reader()
        if rows := self.indexes.write(contents, again=again):
            with self._next_commit():
                for row in rows:
                    self.catalogue.put(INDEXES, row)
            self.indexes.keep(rows)

    def verify(self, contents: Table) -> list[Path]:
        """Return the files that count; raise ValueError, which names the file, unless every byte is as it was written."""
        with self._snapshot():
            pass
        self.catalogue.verify()
        return [self.catalogue.path, *storage_of(contents).verify()]

    def _sweep(self) -> None:
        """Remove what a writer of this folder that failed, or was killed, before its commit has left."""
        self._place_to_write.sweep(SEGMENT_FOLDER, set(self._segments.values()))
        self.indexes.sweep()

    def _take_word(self, content: dict[str, Any]) -> None:
        """Go on with the word by which the writers of this bank know their files."""
        if self._place is not None and WORD.fullmatch(content.get("word") or ""):
            self._place.word = content["word"]

    def refuse_reader(self) -> None:
        """Raise ValueError if the bank was opened to be read, is closed, or is not the one in this folder any longer."""
        self.refuse_closed()
        if not self.is_writable:
            raise ValueError(f"the bank in {str(self.path)!r} was opened with `read_only=True`; open it without.")
        with self._explained():
            self._place_to_write.refuse_changed()
            refuse_moved(self.catalogue.path, self._opened)

    @property
    def _place_to_write(self) -> Place:
        assert self._place is not None
        return self._place

    def _open_place(self) -> Place:
        try:
            return Place(self.path)
        except BlockingIOError as error:
            raise ValueError(
                f"`folder` must not be written by two at once, but somebody is writing the bank in {str(self.path)!r}; wait "
                "for them to close it, or open it with `read_only=True`."
            ) from error


# A fork waits for what other threads do to banks and read of them: a commit would be cut short in its copy, and undone while
# the process goes on, and a lock that is held would never be opened there.
_open_folders: weakref.WeakSet[BankFolder] = weakref.WeakSet()
_held = threading.local()


def _wait_for_threads() -> None:
    stop, _held.locks = time.monotonic() + BUSY_SECONDS, []
    while True:
        with contextlib.suppress(RuntimeError):  # another thread was making a bank
            locks = [*(table.lock for table in tables), *(folder.catalogue.turn for folder in _open_folders)]
            # Others may take them in another order, so none is held while the fork waits for the next.
            _held.locks += [lock for lock in locks if lock.acquire(blocking=False)]
            if len(_held.locks) == len(locks) or time.monotonic() > stop:
                return
            _go_on()
        time.sleep(0.001)


def _go_on() -> None:
    while _held.locks:
        _held.locks.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_threads, after_in_parent=_go_on, after_in_child=_go_on)


class OnDisk:
    """A bank's place on disk: its changes are committed there, and can be read again, checked and compacted.

    `table`: of the bank; filled with what the opened folder holds. `settings`: method that returns the arguments of the bank,
    as the folder keeps them. `take_settings`: method that makes the bank follow those of them that can change.
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
        self.path, self.is_writable, self.is_mapped = folder.path, folder.is_writable, folder.mapped
        self._read()

    @property
    def _table(self) -> Table:
        if (table := self._table_or_none()) is None:
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
    def num_dead_bytes(self) -> int:
        """Return the bytes of deleted and evicted chunks in the folder, which `compact` gives back."""
        return storage_of(self._table).num_dead_bytes

    def refuse_reader(self) -> None:
        self._folder.refuse_reader()

    def path_of_commit(self) -> Path:
        """Return the folder, if all that the bank holds is there; raise ValueError inside a transaction."""
        self._folder.refuse_closed()
        if self._in_transaction:
            raise ValueError(
                f"the bank in {str(self.path)!r} is copied or pickled by its folder, which must not be inside a transaction, "
                "whose changes are not there yet; do it afterwards."
            )
        return self.path

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        if self._in_transaction:
            yield
            return
        self.refuse_reader()
        before, version = self._state, self._table.ledger.version
        try:
            self._in_transaction = True
            yield
            ledger = self._table.ledger
            if ledger.version != version or ledger.read or ledger.changed:
                before = None  # a commit that fails leaves its traces in what is in memory
                with self._table.lock:  # files are merged and let go, so no other thread may be reading them
                    self._folder.commit(self._table, self._settings())
                    self._merge()
        except BaseException:
            if self._state != before:
                self._restore()
            raise
        finally:
            try:
                self._in_transaction = False
            finally:  # Ctrl-C in the line above would leave a bank that nobody can close
                self._in_transaction = False

    @property
    def _state(self) -> tuple[int, int, bool] | None:
        """Return what changes with every change, also with one that failed before it was noted as a change."""
        storage = storage_of(self._table)
        return self._table.ledger.version, storage.num_changes, storage.is_torn

    def _merge(self) -> None:
        """Merge small segments; a failure changes nothing that can be read, so what was committed before has succeeded."""
        try:
            self._folder.merge(self._table, self._settings())
        except ValueError as error:
            warnings.warn(f"small files of the bank in {str(self.path)!r} were not merged: {error}", stacklevel=5)
            self._restore()

    def undo(self) -> None:
        """Never commit what is in memory: make the table that of the last commit again, in a transaction when it ends."""
        storage_of(self._table).is_torn = True
        if not self._in_transaction:
            self._restore()

    def _restore(self) -> None:
        """Make the table that of the last commit again; where that is not possible, one that refuses everything."""
        try:
            self._folder.refuse_closed()
            self._read()
        except BaseException as error:
            broken = ValueError(str(error)) if self._folder.is_broken else self._folder.break_off(error)
            with self._table.lock:
                self._table.refuse(str(broken))
            if not isinstance(error, Exception):
                raise

    def reload(self) -> bool:
        """Read the last commit of the folder again; return whether there was a newer one."""
        self._folder.refuse_closed()
        if self._folder.is_current():
            return False
        self._read()
        return True

    def verify(self) -> list[Path]:
        """Return the files of the folder that count, after a check that every byte of them is as it was written.

        Raises ValueError, which names the file, where one is not.
        """
        self._folder.refuse_closed()
        return self._folder.verify(self._table)

    def compact(self) -> None:
        """Give back the space of what was deleted or evicted: afterwards no byte of it is in the folder.

        Files that hold some of it are written anew, one after the other: there must be room for one more.
        """
        self.refuse_reader()
        with self._table.taking_turn():
            if self._in_transaction:
                raise ValueError(
                    "`compact` must not be called inside a transaction, which it would end; call it afterwards."
                )
            try:
                with self._table.lock:
                    self._table.drop_expired()
                    self._folder.compact(self._table, self._settings())
            except BaseException:
                self._restore()
                raise

    def close(self) -> None:
        table, folder = self._table_or_none(), self._folder
        if table is None or not folder.is_here or folder.catalogue.is_closed:
            folder.close()
            return
        with table.taking_turn():
            if self._in_transaction:
                raise ValueError(
                    "`close` must not be called inside a transaction, which it would end; call it afterwards."
                )
            try:
                try:
                    self.refuse_reader()
                except ValueError as error:  # nothing is lost but how often documents were read
                    warnings.warn(str(error), stacklevel=3)
                else:
                    with self.transaction():
                        table.drop_expired()
                    folder.save_indexes(table)
            finally:
                folder.close()

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


def storage_of(contents: Table) -> DiskStorage:
    assert isinstance(contents.storage, DiskStorage)
    return contents.storage


def is_same(content: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two descriptions are of the same commit of the same bank; two copies of a bank may count alike."""
    return all(content.get(name) == other.get(name) for name in ("commit", "word", "state"))


def has_bank(path: str | PathLike[str]) -> bool:
    """Return whether there is a bank in a folder. Raises ValueError if this user may not look, or `path` names no folder."""
    folder = folder_path(path)
    is_there = Catalogue.is_in(folder)
    if is_there and not os.access(folder / CATALOGUE, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise denied(folder / CATALOGUE, PermissionError("permission denied"))
    return is_there


def folder_path(path: str | PathLike[str]) -> Path:
    """Return a path; raise ValueError if it is none, or empty, which would be the current folder."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"`folder` must be the path of a folder, got {path!r}; '.' is the current one.")
    return Path(path)
