"""The catalogue of a bank on disk: one SQLite file that says which documents and which files count.

A commit is one SQLite transaction, synced to the disk. Every row carries a checksum of its columns, and one row the number of
rows and the sum of checksums of every table: a changed, lost or added row is noticed when the bank is opened, whatever SQLite
makes of the file. Large texts are checked when they are read, and by `verify`. No index could disagree with the rows.

The file may be somebody else's. SQLite is let at it when what lies beside it can do no harm, and is asked for nothing before
its schema is the one written here, to the letter: no trigger, view or virtual table is ever run. A statement has a budget of
steps that follows from the length of the file, so none runs without end.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt64

from longmem.memory.folder.foreign import damaged, fits, not_read, parse_json, read_journal, validate_plain
from longmem.memory.folder.tensor_file import not_written

CATALOGUE = "catalogue.sqlite"
APPLICATION_ID = 0x4C4D4231  # "LMB1": says to other programs what this file is
# 1 was a folder with a manifest.json; 2 knew no segments; in 3, which is read, a last, shorter chunk stood in `waiting`; in 4,
# too, documents that were never read have a row in `usage`.
SCHEMA_VERSION, READABLE_VERSIONS = 5, (3, 4, 5)
MODULUS = 2**63
HALF = 2**32 - 1
LARGEST = 2**62  # of a number, so that sums of two are numbers, too
# The second where SQLite quotes, in its message, a damaged name.
UNREADABLE = (sqlite3.DatabaseError, UnicodeDecodeError)
BUSY_SECONDS = 60  # how long to wait for another process's commit
# What SQLite says of the system, of other processes and of itself, not of the file.
OF_THE_SYSTEM = ("READONLY", "CANTOPEN", "PERM", "AUTH", "IOERR", "FULL", "BUSY", "LOCKED", "PROTOCOL", "NOLFS")
LEAST_ROW = 8  # bytes of a row in the file, at least: so many rows it has at most
# SQLite asks after so many of its steps whether to go on; reading a row takes some ten, and a row has more bytes than that.
STEPS_BETWEEN, LEAST_STEPS, STEPS_PER_BYTE = 100_000, 10_000_000, 20
LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 32,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 32,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 2,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 8,
    sqlite3.SQLITE_LIMIT_ATTACHED: 1,  # which VACUUM needs
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
SEGMENT_FOLDER, INDEX_FOLDER = "segments", "indexes"
# What a bank calls its files: kind, place or layer, then the word of the folder and a random one, eight letters each. So a
# name is none of another folder, and none of what is there for something else.
NAMES = {
    SEGMENT_FOLDER: re.compile(r"segment-[0-9]{12,19}-([0-9a-f]{8})?[0-9a-f]{8}\.safetensors"),
    INDEX_FOLDER: re.compile(r"layer[0-9]{1,9}-([0-9a-f]{8})[0-9a-f]{8}\.(faiss|safetensors)"),
}
CHECKSUM = "checksum INTEGER"
KINDS = {"INTEGER": int, "REAL": float, "TEXT": str, "BLOB": bytes}
ENCODER = {"weights": str, "recipe": dict, "sketch": (None, {"norm": float, "sums": str})}
SETTINGS = {
    "memory_layers": [int],
    "chunk_size": int,
    "capacity_tokens": (int, None),
    "capacity_bytes": (int, None),
    "storage_dtype": str,
    "index": str,
    "eviction": str,
    "refresh": (str, dict),
    "fingerprint": (str, None),
    "search?": str,
    "age_prior?": str,
}
DESCRIPTION: dict[str, Any] = {
    "settings": SETTINGS,
    "encoders": [ENCODER],
    "shapes": [[(int, bool)]],
    "word?": (str, None),
    "state?": str,  # another one for every commit
}
DESCRIPTION |= dict.fromkeys(("commit", "next_serial", "next_order", "next_slot"), int)


class Table(NamedTuple):
    """What the code knows of a table: its columns, the first `num_keys` of them its primary key."""

    name: str
    columns: tuple[str, ...]
    num_keys: int
    num_large: int = 0  # columns that are only read when they are needed; they come last

    @property
    def names(self) -> list[str]:
        return [column.split()[0] for column in self.columns]

    @property
    def num_small(self) -> int:
        """Return the number of columns that are always read."""
        return len(self.columns) - self.num_large

    @property
    def statement(self) -> str:
        """Return the SQL that makes it. The checksum stands before the large columns: reading it does not read them."""
        keys = ", ".join(self.names[: self.num_keys])
        columns = ", ".join((*self.columns[: self.num_small], CHECKSUM, *self.columns[self.num_small :]))
        return f"CREATE TABLE {self.name} ({columns}, PRIMARY KEY ({keys})) WITHOUT ROWID"


DOCUMENTS = Table("documents", ("serial INTEGER", "content TEXT", "waiting BLOB"), 1)
USAGE = Table("usage", ("serial INTEGER", "num_reads INTEGER", "last_read REAL"), 1)
PLACES = ("serial INTEGER", "first_chunk INTEGER", "num_chunks INTEGER", "slot INTEGER", "write_order INTEGER")
SPANS = Table("spans", (*PLACES, "written_at REAL"), 2)
TOKENS = ("serial INTEGER", "first_token INTEGER", "num_tokens INTEGER", "first_char INTEGER")
SOURCES = Table("sources", (*TOKENS, "token_ids BLOB", "char_ends BLOB", "text BLOB"), 2, num_large=3)
FILES = ("name TEXT", "num_bytes INTEGER", "digests TEXT")
SEGMENTS = Table("segments", ("first_slot INTEGER", "num_slots INTEGER", *FILES), 1)
INDEXES = Table("indexes", ("layer INTEGER", *FILES, "content TEXT"), 1)
TABLES = (DOCUMENTS, USAGE, SPANS, SOURCES, SEGMENTS, INDEXES)
SCHEMA = {
    "bank": "CREATE TABLE bank (id INTEGER PRIMARY KEY, content TEXT, checksum INTEGER)",
    **{table.name: table.statement for table in TABLES},
}


class Catalogue:
    """The open catalogue in `folder`.

    `write`: changes are meant. `create`: description of a new bank, to be made where there is none; `with_first_commit`: only
    then, so that what is cut short before leaves no bank. Raises ValueError if there is none, or it is damaged.
    """

    def __init__(
        self, folder: Path, write: bool, create: dict[str, Any] | None = None, *, with_first_commit: bool = False
    ) -> None:
        self.path = folder.resolve() / CATALOGUE
        if create is None and not self.is_in(folder):
            old = " (a manifest.json is: it was written by an earlier version of longmem; memorize its documents again)"
            raise ValueError(
                f"`folder` must be a saved memory bank, got {str(folder)!r}, where no {CATALOGUE} is"
                f"{old if (folder / 'manifest.json').is_file() else ''}; `bank.save` or `MemoryBank.create` writes one."
            )
        self.content: dict[str, Any] = {}
        self.is_closed = self.is_new = False
        self._version = SCHEMA_VERSION  # of the file, as it was read
        # Threads of one process share the connection, which can be in one transaction at a time.
        self.turn = threading.RLock()
        self._totals = {table.name: [0, 0] for table in TABLES}
        self._write = write
        self._seen: tuple[int, int] | None = None  # `_look` when the file was last written to, or opened, here
        try:
            self._connection = self._connect(["rwc"] if create is not None else ["rw"] if write else ["rw", "ro"])
            try:
                self._protect()
                self.is_new = create is not None and self.is_blank()
                if create is None or not self.is_new:
                    self._check_kind()
                elif not with_first_commit:
                    with self.transaction():
                        self.describe(create)
            except BaseException:
                self._connection.close()  # it may have made files of its own
                raise
        except UNREADABLE as error:
            is_of_folder = create is not None and isinstance(error, sqlite3.OperationalError)
            raise (not_written(folder, error) if is_of_folder else self._not_read(error)) from error
        self._seen = self._look()

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Return whether there is a catalogue, whole or damaged; an empty one of a process killed on the way is none.

        SQLite is not asked: it would delete, or write, what a journal beside the file says.
        """
        path = folder.resolve() / CATALOGUE
        try:
            size = validate_plain(path)
            return size > 0 and read_journal(path.with_name(f"{CATALOGUE}-journal"), size) != 0
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise not_read(path, error) from error
        except ValueError:
            return True

    def is_blank(self) -> bool:
        """Return whether no commit has been made yet."""
        return not self._connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()

    def _connect(self, modes: Sequence[str]) -> sqlite3.Connection:
        # A reader, too, opens for writing where it may: a commit that was cut short is undone by whoever comes next.
        self._size = self._check_files()
        for mode in modes:
            try:
                options: dict[str, Any] = {"timeout": BUSY_SECONDS, "isolation_level": None, "check_same_thread": False}
                connection = sqlite3.connect(f"{self.path.as_uri()}?mode={mode}", uri=True, **options)
                for limit, value in LIMITS.items():
                    connection.setlimit(limit, value)
                connection.execute("PRAGMA trusted_schema = OFF")
                connection.execute("PRAGMA schema_version")
                break
            except sqlite3.OperationalError:
                if mode == modes[-1]:
                    raise
        connection.text_factory = str
        return connection

    def _check_files(self) -> int:
        """Return the length of the file, 0 if there is none, after a check of what SQLite would open with it."""
        size = 0
        try:
            with contextlib.suppress(FileNotFoundError):
                size = validate_plain(self.path)
            read_journal(self.path.with_name(f"{CATALOGUE}-journal"), size)
        except OSError as error:
            raise not_read(self.path, error) from error
        for ending in ("-wal", "-shm"):
            if os.path.lexists(log := self.path.with_name(CATALOGUE + ending)):
                raise damaged(
                    self.path, f"was changed after it was written (the kind of its journal: there is {log.name})"
                )
        return size

    def _measure(self) -> None:
        """Take over the length of the file, which others may have changed; moved away, it is as it was."""
        try:
            self._size = self.path.stat().st_size
        except FileNotFoundError:
            pass
        except OSError as error:
            raise not_read(self.path, error) from error

    def _look(self) -> tuple[int, int] | None:
        """Return when somebody last wrote to the file, and its length."""
        with contextlib.suppress(OSError):
            found = os.stat(self.path)
            return found.st_mtime_ns, found.st_size
        return None

    def _renew(self) -> None:
        """Open the file anew if somebody else has written to it. Raises ValueError if it is another bank's.

        SQLite goes on with what it remembers while some numbers in the file are the same, as those of another bank may be
        whose files were copied over these.
        """
        if self.is_new or self._look() in (None, self._seen):
            return
        with contextlib.closing(Catalogue(self.path.parent, self._write)) as fresh:
            with fresh.snapshot():
                words = {self.content.get("word"), fresh.read_content().get("word")}
            if len(words - {None}) > 1:
                raise ValueError(
                    f"the bank in {str(self.path.parent)!r} is another one than was opened, its files were moved or replaced; "
                    "nothing was changed, open the bank again."
                )
            self._connection, fresh._connection = fresh._connection, self._connection
            self._seen = fresh._seen

    def _protect(self) -> None:
        """Bound what a statement may do."""
        self._connection.execute("PRAGMA synchronous = EXTRA")
        self._connection.execute("PRAGMA secure_delete = ON")
        if not self._write:
            self._connection.execute("PRAGMA query_only = ON")

    def _not_read(self, error: Exception) -> ValueError:
        """Return the error for a file that SQLite does not read, with its cause: the system, somebody else, or the file."""
        name = getattr(error, "sqlite_errorname", "").removeprefix("SQLITE_")
        if name == "INTERRUPT":
            return damaged(self.path, "has more rows than its length allows")
        if not name.startswith(OF_THE_SYSTEM):
            return damaged(self.path, f"cannot be read ({error})")
        if name.startswith(("BUSY", "LOCKED", "PROTOCOL")):
            return ValueError(
                f"the bank in {str(self.path.parent)!r} was being changed by another process for {BUSY_SECONDS} seconds "
                f"({error}); nothing is damaged: try again when that commit is done."
            )
        if os.path.lexists(self.path.with_name(f"{CATALOGUE}-journal")):
            return ValueError(
                f"the bank in {str(self.path.parent)!r} was left in the middle of a commit, which has to be undone before it "
                f"is read, and its folder cannot be written ({error}); nothing is lost: open the bank once where it can be "
                "written, or copy the whole folder to such a place and open the copy."
            )
        return not_read(self.path, error)

    def _make_tables(self) -> None:
        self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        for statement in SCHEMA.values():
            self._connection.execute(statement)

    def _check_kind(self) -> None:
        kind = self._connection.execute("PRAGMA application_id").fetchone()[0]
        if kind != APPLICATION_ID:
            raise damaged(self.path, "is not the catalogue of a memory bank")
        version = self._version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in READABLE_VERSIONS:
            raise ValueError(
                f"`folder` must hold a bank of schema version {SCHEMA_VERSION}, got version {version} in "
                f"{str(self.path)!r}; use the version of longmem that wrote it, or a newer one."
            )
        query = f"SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT {len(SCHEMA) + 1}"
        found = self._connection.execute(query).fetchall()
        if sorted(map(repr, found)) != sorted(repr(("table", name, name, sql)) for name, sql in SCHEMA.items()):
            raise damaged(self.path, "was changed after it was written (its tables are not those of a bank)")
        # With another journal, commits would be in files beside this one, which nobody here knows of.
        if self._connection.execute("PRAGMA journal_mode").fetchone()[0] != "delete":
            raise damaged(self.path, "was changed after it was written (the kind of its journal)")

    # Changing.

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the changes inside the block together, or none of them, for good."""
        with self.turn:
            self._renew()
            totals = {name: list(total) for name, total in self._totals.items()}
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._measure()
                if self.is_new:
                    self._make_tables()
                elif self._version != SCHEMA_VERSION:
                    self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                yield
                self._connection.execute("COMMIT")
                self.is_new, self._version = False, SCHEMA_VERSION
            except BaseException:
                self._totals = totals
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._seen = self._look()

    def put(self, table: Table, row: Sequence[Any]) -> None:
        """Write a row, in place of the one with its keys."""
        self.remove(table, row[: table.num_keys])
        checksum = row_checksum(table, row)
        small, marks = table.num_small, ", ".join("?" * (len(row) + 1))
        self._connection.execute(f"INSERT INTO {table.name} VALUES ({marks})", (*row[:small], checksum, *row[small:]))
        self._count(table, 1, checksum)

    def remove(self, table: Table, keys: Sequence[int], *, below: int | None = None) -> None:
        """Remove the rows that start with these keys; `below`: those whose next key is less than that."""
        condition = " AND ".join(f"{name} = ?" for name in table.names[: len(keys)]) or "1"
        values = list(keys)
        if below is not None:
            condition += f" AND {table.names[len(keys)]} < ?"
            values.append(below)
        for (checksum,) in self._connection.execute(f"SELECT checksum FROM {table.name} WHERE {condition}", values):
            self._count(table, -1, -checksum)
        self._connection.execute(f"DELETE FROM {table.name} WHERE {condition}", values)

    def describe(self, content: dict[str, Any]) -> None:
        """Write what is said about the bank as a whole; the last step of every transaction."""
        self.content = content
        text = json.dumps({"content": content, "totals": self._totals}, sort_keys=True)
        self._connection.execute("INSERT OR REPLACE INTO bank VALUES (1, ?, ?)", (text, _checksum(text.encode())))

    def _count(self, table: Table, rows: int, checksum: int) -> None:
        total = self._totals[table.name]
        total[0] += rows
        total[1] = (total[1] + checksum) % MODULUS

    # Reading.

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read inside the block from one commit, whatever others commit meanwhile."""
        with self.turn:
            self.refuse_closed()
            self._renew()
            try:
                self._connection.execute("BEGIN")
                self._measure()
                # An iterator, not a function: there the error of a signal, as of Ctrl-C, would be raised, and taken for a no.
                count = (LEAST_STEPS + STEPS_PER_BYTE * self._size) // STEPS_BETWEEN
                has_run_too_long = itertools.chain(itertools.repeat(False, count), itertools.repeat(True)).__next__
                self._connection.set_progress_handler(has_run_too_long, STEPS_BETWEEN)
                yield
            except UNREADABLE as error:
                raise self._not_read(error) from error
            finally:
                self._connection.set_progress_handler(None, 0)
                if self._connection.in_transaction:  # SQLite ends it itself when a read fails
                    self._connection.execute("ROLLBACK")

    def read_content(self) -> dict[str, Any]:
        """Return what is said about the bank as a whole."""
        rows = self._connection.execute("SELECT content, checksum FROM bank").fetchall()
        if len(rows) != 1 or not isinstance(rows[0][0], str) or _checksum(rows[0][0].encode()) != rows[0][1]:
            raise damaged(self.path, "was changed after it was written (checksum of the bank's description)")
        try:
            read = parse_json(rows[0][0])
        except ValueError as error:
            raise damaged(self.path, f"does not describe a bank ({error})") from error
        if not fits(read, {"content": DESCRIPTION, "totals": {table.name: list for table in TABLES}}):
            raise damaged(self.path, "does not describe a bank")
        for total in read["totals"].values():
            if list(map(type, total)) != [int, int] or not 0 <= total[0] * LEAST_ROW <= self._size:
                raise damaged(self.path, f"cannot have the rows that it counts, {total}, in {self._size} bytes")
        self.content, self._totals = read["content"], read["totals"]
        return self.content

    def read_table(self, table: Table) -> list[tuple[Any, ...]]:
        """Return all rows, without their large columns, in the order of their keys, after a check of all checksums."""
        names = ", ".join(table.names[: table.num_small])
        query = f"SELECT {names}, checksum FROM {table.name} LIMIT {self._totals[table.name][0] + 1}"
        rows = self._connection.execute(query).fetchall()
        *columns, known = self._columns(table, (*table.columns[: table.num_small], CHECKSUM), rows)
        if not table.num_large:
            self._check_rows(table, columns, known)
        if table is SEGMENTS or table is INDEXES:
            self._check_files_named(table, rows)
        if [len(rows), sum(known) % MODULUS] != self._totals[table.name]:
            raise damaged(self.path, f"was changed after it was written (rows of {table.name})")
        return sorted(zip(*columns, strict=True))

    def check_total(self, table: Table) -> None:
        """Raise ValueError unless a table has the rows that were written, by their checksums alone, which nobody sees."""
        query = f"SELECT count(*), sum(checksum & {HALF}), sum(checksum >> 32) FROM {table.name}"
        count, low, high = self._connection.execute(query).fetchone()
        if [count, ((low or 0) + ((high or 0) << 32)) % MODULUS] != self._totals[table.name]:
            raise damaged(self.path, f"was changed after it was written (rows of {table.name})")

    def read_large(self, table: Table, *keys: int, between: tuple[int, int] = (0, LARGEST)) -> list[tuple[Any, ...]]:
        """Return the rows that start with these keys, the next `between` two, with large columns, in the order of keys."""
        small, start = table.num_small, table.names[: len(keys) + 1]
        condition = " AND ".join([*(f"{name} = ?" for name in start[:-1]), f"{start[-1]} BETWEEN ? AND ?"])
        rows = self._connection.execute(f"SELECT * FROM {table.name} WHERE {condition}", (*keys, *between)).fetchall()
        declared = (*table.columns[:small], CHECKSUM, *table.columns[small:])
        columns = self._columns(table, declared, rows)
        known = columns.pop(small)
        self._check_rows(table, columns, known)
        return sorted(zip(*columns, strict=True))

    def floor(self, table: Table, key: int, at_most: int) -> int:
        """Return the largest second key, at most `at_most`, of the rows with this first key; 0 if there is none."""
        first, second = table.names[:2]
        query = f"SELECT max({second}) FROM {table.name} WHERE {first} = ? AND {second} <= ?"
        return self._connection.execute(query, (key, at_most)).fetchone()[0] or 0

    def verify(self) -> None:
        """Raise ValueError unless SQLite finds its file in order, and every row is as it was written."""
        with self.snapshot():
            found = self._connection.execute("PRAGMA integrity_check").fetchone()[0]
            if found != "ok":
                raise damaged(self.path, f"is not in order ({found})")
            self.read_content()
            for table in TABLES:
                self.read_table(table)
                if table.num_large:
                    self.read_large(table)

    def vacuum(self) -> None:
        """Rewrite the file without what was deleted."""
        self._connection.execute("VACUUM")
        self._seen = self._look()

    def close(self) -> None:
        """Let go of the file, when other threads have read what they are reading."""
        with self.turn:
            self.is_closed = True
            self._connection.close()

    def refuse_closed(self) -> None:
        """Raise ValueError if the bank was closed."""
        if self.is_closed:
            raise ValueError(f"the bank in {str(self.path.parent)!r} was closed; open it again with `MemoryBank.open`.")

    def _check_files_named(self, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
        place, end = table.names.index("name"), ".safetensors" if table is INDEXES else ""
        for name, num_bytes, digests in (row[place : place + 3] for row in rows):
            with contextlib.suppress(ValueError):
                known = (
                    parse_json(digests) if table is SEGMENTS else {}
                )  # an index that is not as written is built anew
                if (
                    NAMES[table.name].fullmatch(name + end)
                    and type(known) is dict
                    and fits(list(known.values()), [str])
                ):
                    continue
            raise damaged(self.path, f"names {name!r} for a file of {num_bytes} bytes, as no bank does")

    def _columns(self, table: Table, declared: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> list[Sequence[Any]]:
        """Return the columns of rows; raise ValueError unless each holds what is declared, which SQLite does not see to."""
        columns: list[Sequence[Any]] = list(zip(*rows, strict=True)) if rows else [()] * len(declared)
        for column, values in zip(declared, columns, strict=True):
            name, kind = column.split()
            is_right = set(map(type, values)) <= {KINDS[kind]}
            if is_right and values and kind == "INTEGER":
                is_right = min(values) >= 0 and max(values) < (MODULUS if column == CHECKSUM else LARGEST)
            elif is_right and kind == "REAL":
                is_right = all(map(math.isfinite, values))
            if not is_right:
                raise damaged(self.path, f"was changed after it was written ({name} of {table.name})")
        return columns

    def _check_rows(self, table: Table, columns: Sequence[Sequence[Any]], known: Sequence[int]) -> None:
        if not np.array_equal(checksums(table, columns), np.array(known, dtype=np.uint64)):
            raise damaged(self.path, f"was changed after it was written (a row of {table.name})")


def row_checksum(table: Table, row: Sequence[Any]) -> int:
    """Return a number below 2^63 that depends on every column."""
    return int(checksums(table, [[value] for value in row])[0])


def checksums(table: Table, columns: Sequence[Sequence[Any]]) -> UInt64[np.ndarray, " rows"]:
    """Return the `row_checksum` of each row; each column has values of one type."""
    cells = zip([table.name.encode()] * len(columns[0]), *map(_cells, columns))  # noqa: B905  some have no end
    digests = [hashlib.blake2b(b"".join(row), digest_size=8).digest() for row in cells]
    return np.frombuffer(b"".join(digests), dtype="<u8") & np.uint64(MODULUS - 1)


def _cells(values: Sequence[Any]) -> Iterable[bytes]:
    """Yield text and blobs as they are, behind their type and length, and numbers likewise, as Python writes them."""
    kind = type(values[0]).__name__ if values else ""
    # Not numbers but what is written of them: zeros of two signs are equal.
    written = values if kind in ("bytes", "str") else list(map(repr, values))
    if len(values) > 1 and written.count(written[0]) == len(values):  # as in most columns of most banks
        return itertools.repeat(*_cells(values[:1]))
    if kind == "bytes":
        return [b"bytes %d %b" % (len(each), each) for each in values]
    if kind == "str":
        return [
            b"str %d %b" % (len(each), each) for each in (value.encode("utf-8", "surrogatepass") for value in values)
        ]
    return [f"{kind} {len(number)} {number}".encode() for number in written]


def _checksum(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") % MODULUS
