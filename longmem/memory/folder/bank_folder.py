"""A bank in a folder: opening it, committing what changed, checking it, giving back the space of what was deleted.

catalogue.sqlite    what counts (`catalogue.py`)
segments/           keys, values and search keys; files that never change (`disk_storage.py`)
indexes/            FAISS indexes, derived from the search keys; rebuilt where they are missing or do not fit
lock                held by the one process that may write
"""

import contextlib
import functools
import json
import sqlite3
import warnings
import weakref
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from longmem.memory.folder import records
from longmem.memory.folder.catalogue import INDEXES, SEGMENTS, SOURCES, TABLES, Catalogue
from longmem.memory.folder.disk_storage import DiskStorage, Segment, rewrite, segments_to_merge
from longmem.memory.folder.saved_indexes import SavedIndexes, tokens_of_a_row
from longmem.memory.folder.tensor_file import TensorFile, damaged, not_written, remove
from longmem.memory.rows.documents import Source
from longmem.memory.rows.table import Table

LOCK = "lock"
SEGMENT_FOLDER, INDEX_FOLDER = "segments", "indexes"
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
        path: Path,
        *,
        write: bool,
        create: dict[str, Any] | None = None,
        with_first_commit: bool = False,
        device: torch.device | None = None,
        mapped: bool = True,
    ) -> None:
        # Where it is now: the process may go to another folder, and a link may come to lead elsewhere.
        self.path = path.resolve()
        self.is_writable = write
        self.device = torch.device("cpu") if device is None else device
        self.mapped = mapped
        self._lock = FileLock(self.path / LOCK, thread_local=False)
        # What the catalogue holds: names of segments by first slot, tokens of each document whose source is there.
        self._segments: dict[int, str] = {}
        self._source_tokens: dict[int, int] = {}
        if write and (create is not None or has_bank(self.path)):
            self._acquire_lock()
        try:
            start = {"commit": 0, "next_serial": 0, "next_order": 0, "next_slot": 0, "shapes": []}
            content = None if create is None else start | create
            self.catalogue = Catalogue(self.path, write, content, with_first_commit=with_first_commit)
            if self.catalogue.is_new and content is not None:
                self.catalogue.content = content
        except BaseException:
            self._lock.release()
            raise
        self.indexes = SavedIndexes(self.path / INDEX_FOLDER)

    @property
    def content(self) -> dict[str, Any]:
        """Return what the last commit that was read or written says about the bank as a whole; empty for a new one."""
        return self.catalogue.content

    def close(self) -> None:
        self.catalogue.close()
        self._lock.release()

    # Reading.

    def read_content(self) -> dict[str, Any]:
        with self.catalogue.snapshot():
            return self.catalogue.read_content()

    def newest_content(self) -> dict[str, Any]:
        """Return what the last commit says about the bank, and stay with the commit that was read before."""
        before = self.content
        try:
            return self.read_content()
        finally:
            self.catalogue.content = before

    def is_current(self) -> bool:
        """Return whether the commit that was read is still the last one."""
        return self.newest_content()["commit"] == self.content["commit"]

    def new_storage(self, storage_dtype: torch.dtype) -> DiskStorage:
        """Return an empty storage in this folder."""
        place = self.path / SEGMENT_FOLDER
        return DiskStorage(place, storage_dtype, self.device, self.mapped, self.refuse_reader)

    def fill(self, contents: Table, settings: dict[str, Any]) -> None:
        """Read the last commit into empty contents over a `new_storage`.

        Raises ValueError if the folder is damaged, or the bank there no longer has these settings.
        """
        before = self.content
        try:
            self._fill(contents, settings)
        except BaseException:
            self.catalogue.content = before  # what the caller goes on with is not of another commit
            raise

    def _fill(self, contents: Table, settings: dict[str, Any]) -> None:
        place = self.path / SEGMENT_FOLDER
        for attempt in range(ATTEMPTS_TO_READ):
            with self.catalogue.snapshot():
                content = self.catalogue.read_content()
                rows = {table.name: self.catalogue.read_table(table) for table in TABLES}
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
        records.restore(contents, content, segments, rows, self._read_source)
        self._source_tokens = {document.serial: document.num_tokens for document in contents.ledger.documents.values()}
        self.indexes.restore(rows["indexes"])
        contents.find_saved = functools.partial(self.indexes.read, storage_of(contents), tokens_of_a_row(contents))
        if self.is_writable:
            self._remove_strangers()
            self.indexes.remove_strangers()

    @torch.inference_mode(False)  # it may be read while the model runs, and written to later
    def _read_source(self, serial: int, start: int, stop: int) -> Source | None:
        with self.catalogue.snapshot():
            return records.read_source(self.catalogue.read_large(SOURCES, serial), start, stop)

    # Writing.

    def replace(self, source: Table, contents: Table, settings: dict[str, Any]) -> None:
        """Make a copy of `source` the bank, instead of what was there; `contents` are empty, over a `new_storage`."""
        if not self.catalogue.is_new:
            with self.catalogue.snapshot():
                self.catalogue.read_content()
                self._segments = {row[0]: row[2] for row in self.catalogue.read_table(SEGMENTS)}
        contents.ledger.next_serial = self.content["next_serial"]
        storage_of(contents).next_slot = self.content["next_slot"]
        try:
            source.copy_to(contents)
        except OSError as error:
            self._remove_strangers()
            raise not_written(self.path, error) from error
        self.commit(contents, settings, replace=True)

    def commit(self, contents: Table, settings: dict[str, Any], *, replace: bool = False) -> None:
        """Make what `contents` holds the bank, for good; a process killed meanwhile leaves the last commit, or this one.

        `replace`: instead of all that was there. Raises ValueError, and leaves the last commit, if the disk is full or
        the folder cannot be written. The caller then has to fill its contents anew.
        """
        self.refuse_reader()
        try:
            self._commit(contents, settings, replace)
            while victims := segments_to_merge(storage_of(contents)):
                rewrite(contents, storage_of(contents), victims)
                self._commit(contents, settings, False)
        except (OSError, sqlite3.OperationalError) as error:
            self._remove_strangers()
            raise not_written(self.path, error) from error
        except sqlite3.DatabaseError as error:
            raise damaged(self.catalogue.path, f"cannot be written ({error})") from error

    def _commit(self, contents: Table, settings: dict[str, Any], replace: bool) -> None:
        storage, ledger = storage_of(contents), contents.ledger
        storage.flush()
        storage.segments = [segment for segment in storage.segments if segment.num_live]
        stored = {segment.first_slot: segment.file for segment in storage.segments if segment.file is not None}
        with self.catalogue.transaction():
            for table in TABLES if replace else ():
                self.catalogue.remove(table, ())
            source_tokens = {} if replace else self._source_tokens
            for serial in sorted(ledger.changed):
                if (document := ledger.by_serial.get(serial)) is None:
                    records.remove_document(self.catalogue, serial)
                else:
                    written = source_tokens.get(serial, 0)
                    records.put_document(self.catalogue, document, contents.chunk_size, written)
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
            self.catalogue.describe(
                {
                    "settings": settings,
                    "encoders": contents.encoders.to_json(),
                    "shapes": [list(shape) for shape in storage.shapes],
                    "commit": self.content.get("commit", 0) + 1,
                    "next_serial": ledger.next_serial,
                    "next_order": ledger.next_order,
                    "next_slot": storage.next_slot,
                }
            )
        # From here on the commit counts, and nothing below may undo it.
        if replace:
            self._source_tokens.clear()
            self.indexes.clear()
        for serial in ledger.changed:
            if serial in ledger.by_serial:
                self._source_tokens[serial] = ledger.by_serial[serial].num_tokens
            else:
                self._source_tokens.pop(serial, None)
        ledger.changed.clear()
        ledger.read.clear()
        gone = set(self._segments.values()) - {file.path.name for file in stored.values()}
        self._segments = {first_slot: file.path.name for first_slot, file in stored.items()}
        for name in gone:
            remove(self.path / SEGMENT_FOLDER / name)

    def compact(self, contents: Table, settings: dict[str, Any]) -> None:
        """Write segments with deleted or evicted chunks anew, one by one, and the catalogue without its free pages."""
        storage = storage_of(contents)
        self.commit(contents, settings)
        for segment in [segment for segment in storage.segments if segment.num_live < segment.num_slots]:
            rewrite(contents, storage, [segment])
            self.commit(contents, settings)
        # Asked for their source before the transaction: it may have to be read, in a transaction of its own.
        evicted = [each for each in contents.ledger.documents.values() if each.first_chunk(contents.chunk_size)]
        trimmed = [document for document in evicted if document.source is not None]
        try:
            with self.catalogue.transaction():
                for document in trimmed:
                    records.trim_source(self.catalogue, document, contents.chunk_size)
                self.catalogue.remove(INDEXES, ())
                self.catalogue.describe(self.content | {"commit": self.content["commit"] + 1})
            self.indexes.clear()
            self._save_indexes(contents, again=True)
            self.catalogue.vacuum()
        except (OSError, sqlite3.OperationalError) as error:
            raise not_written(self.path, error) from error

    def save_indexes(self, contents: Table) -> None:
        """Save the indexes that were built since, so that the next who opens the bank need not build them."""
        try:
            self._save_indexes(contents)
        except (OSError, sqlite3.OperationalError) as error:  # nothing is lost that counts
            self.indexes.remove_strangers()
            warnings.warn(f"the index of the bank in {str(self.path)!r} was not saved: {error}", stacklevel=4)

    def _save_indexes(self, contents: Table, *, again: bool = False) -> None:
        if rows := self.indexes.write(contents, again=again):
            with self.catalogue.transaction():
                for row in rows:
                    self.catalogue.put(INDEXES, row)
                self.catalogue.describe(self.content | {"commit": self.content["commit"] + 1})
            self.indexes.keep(rows)

    def verify(self, contents: Table) -> list[Path]:
        """Return the files that count; raise ValueError, which names the file, unless every byte is as it was written."""
        self.catalogue.verify()
        return [self.catalogue.path, *storage_of(contents).verify()]

    def _remove_strangers(self) -> None:
        """Remove what a process that was killed before its commit has left."""
        known = set(self._segments.values())
        for pattern in ("segment-*.safetensors", ".tmp*"):  # safetensors gives a file its name when it is whole
            for path in (self.path / SEGMENT_FOLDER).glob(pattern):
                if path.name not in known:
                    remove(path)

    def refuse_reader(self) -> None:
        """Raise ValueError if the bank was opened to be read, or is closed."""
        self.catalogue.refuse_closed()
        if not self.is_writable:
            raise ValueError(f"the bank in {str(self.path)!r} was opened with `read_only=True`; open it without.")

    def _acquire_lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"`folder` must not be written by two at once, but somebody is writing the bank in {str(self.path)!r}; wait "
                "for them to close it, or open it with `read_only=True`."
            ) from error
        except OSError as error:
            raise not_written(self.path, error) from error


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
        self.path, self.is_writable = folder.path, folder.is_writable
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
            if self._table.ledger.version != before or self._table.ledger.read or self._table.ledger.changed:
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
        if self._folder.catalogue.is_closed:
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


def storage_of(contents: Table) -> DiskStorage:
    assert isinstance(contents.storage, DiskStorage)
    return contents.storage


def has_bank(path: str | PathLike[str]) -> bool:
    return Catalogue.is_in(Path(path))
