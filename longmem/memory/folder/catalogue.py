"""The catalogue of a bank on disk: one SQLite file that says which documents and which files count.

A commit is one SQLite transaction, synced to the disk. Every row carries a checksum of its columns, and one row the number of
rows and the sum of checksums of every table: a changed, lost or added row is noticed when the bank is opened, whatever SQLite
makes of the file. Large texts are checked when they are read, and by `verify`. No index could disagree with the rows.
"""

import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longmem.memory.folder.tensor_file import damaged, not_written

CATALOGUE = "catalogue.sqlite"
APPLICATION_ID = 0x4C4D4231  # "LMB1": says to other programs what this file is
# 1 was a folder with a manifest.json; 2 knew no segments; in 3, which is read, a last, shorter chunk stood in `waiting`.
SCHEMA_VERSION, READABLE_VERSIONS = 4, (3, 4)
MODULUS = 2**63
# The second where SQLite quotes, in its message, a damaged name.
UNREADABLE = (sqlite3.DatabaseError, UnicodeDecodeError)
BUSY_SECONDS = 60  # how long to wait for another process's commit


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


class Catalogue:
    """The open catalogue in `folder`.

    `write`: changes are meant. `create`: description of a new bank, to be made where there is none; `with_first_commit`: only
    then, so that what is cut short before leaves no bank. Raises ValueError if there is none, or it is damaged.
    """

    def __init__(
        self, folder: Path, write: bool, create: dict[str, Any] | None = None, *, with_first_commit: bool = False
    ) -> None:
        self.path = folder / CATALOGUE
        if create is None and not (self.path.is_file() and self.path.stat().st_size):
            old = " (a manifest.json is: it was written by an earlier version of longmem; memorize its documents again)"
            raise ValueError(
                f"`folder` must be a saved memory bank, got {str(folder)!r}, where no {CATALOGUE} is"
                f"{old if (folder / 'manifest.json').is_file() else ''}; `bank.save` or `MemoryBank.create` writes one."
            )
        self.content: dict[str, Any] = {}
        self.is_closed = self.is_new = False
        self._version = SCHEMA_VERSION  # of the file, as it was read
        # Threads of one process share the connection, which can be in one transaction at a time.
        self._turn = threading.RLock()
        self._totals = {table.name: [0, 0] for table in TABLES}
        try:
            self._connection = self._connect(["rwc"] if create is not None else ["rw"] if write else ["rw", "ro"])
            try:
                self.is_new = create is not None and self._is_blank()
                if create is None or not self.is_new:
                    self._check_kind()
                elif not with_first_commit:
                    with self.transaction():
                        self.describe(create)
            except BaseException:
                self._connection.close()  # it may have made files of its own
                raise
        except sqlite3.OperationalError as error:
            if create is None:
                raise damaged(self.path, f"cannot be read ({error})") from error
            raise not_written(folder, error) from error
        except UNREADABLE as error:
            raise damaged(self.path, f"cannot be read ({error})") from error

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Return whether there is a catalogue, whole or damaged; an empty one of a process killed on the way is none."""
        catalogue = cls.__new__(cls)
        catalogue.path = folder / CATALOGUE
        if not catalogue.path.is_file():
            return False
        try:
            catalogue._connection = catalogue._connect(["rw", "ro"])
            with contextlib.closing(catalogue._connection):
                return not catalogue._is_blank()
        except UNREADABLE:
            return True

    def _is_blank(self) -> bool:
        return not self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]

    def _connect(self, modes: Sequence[str]) -> sqlite3.Connection:
        # A reader, too, opens for writing where it may: a commit that was cut short is undone by whoever comes next.
        address = self.path.resolve().as_uri()
        for mode in modes:
            try:
                options: dict[str, Any] = {"timeout": BUSY_SECONDS, "isolation_level": None, "check_same_thread": False}
                connection = sqlite3.connect(f"{address}?mode={mode}", uri=True, **options)
                connection.execute("PRAGMA schema_version")
                break
            except sqlite3.OperationalError:
                if mode == modes[-1]:
                    raise
        connection.execute("PRAGMA synchronous = EXTRA")
        connection.execute("PRAGMA secure_delete = ON")
        connection.text_factory = str
        return connection

    def _make_tables(self) -> None:
        self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._connection.execute("CREATE TABLE bank (id INTEGER PRIMARY KEY, content TEXT, checksum INTEGER)")
        for table in TABLES:
            keys = ", ".join(table.names[: table.num_keys])
            # The checksum stands before the large columns: reading it does not read them.
            small = table.num_small
            columns = ", ".join((*table.columns[:small], "checksum INTEGER", *table.columns[small:]))
            self._connection.execute(f"CREATE TABLE {table.name} ({columns}, PRIMARY KEY ({keys})) WITHOUT ROWID")

    def _check_kind(self) -> None:
        kind = self._connection.execute("PRAGMA application_id").fetchone()[0]
        if kind != APPLICATION_ID:
            raise damaged(self.path, "is not the catalogue of a memory bank")
        # With another journal, commits would be in files beside this one, which nobody here knows of.
        if self._connection.execute("PRAGMA journal_mode").fetchone()[0] != "delete":
            raise damaged(self.path, "was changed after it was written (the kind of its journal)")
        version = self._version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in READABLE_VERSIONS:
            raise ValueError(
                f"`folder` must hold a bank of schema version {SCHEMA_VERSION}, got version {version} in "
                f"{str(self.path)!r}; use the version of longmem that wrote it, or a newer one."
            )

    # Changing.

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the changes inside the block together, or none of them, for good."""
        with self._turn:
            totals = {name: list(total) for name, total in self._totals.items()}
            self._connection.execute("BEGIN IMMEDIATE")
            try:
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
        self._connection.execute("INSERT OR REPLACE INTO bank VALUES (1, ?, ?)", (text, _checksum([text.encode()])))

    def _count(self, table: Table, rows: int, checksum: int) -> None:
        total = self._totals[table.name]
        total[0] += rows
        total[1] = (total[1] + checksum) % MODULUS

    # Reading.

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read inside the block from one commit, whatever others commit meanwhile."""
        with self._turn:
            self.refuse_closed()
            self._connection.execute("BEGIN")
            try:
                yield
            except UNREADABLE as error:
                raise damaged(self.path, f"cannot be read ({error})") from error
            finally:
                if self._connection.in_transaction:  # SQLite ends it itself when a read fails
                    self._connection.execute("ROLLBACK")

    def read_content(self) -> dict[str, Any]:
        """Return what is said about the bank as a whole."""
        rows = self._connection.execute("SELECT content, checksum FROM bank").fetchall()
        if len(rows) != 1 or not isinstance(rows[0][0], str) or _checksum([rows[0][0].encode()]) != rows[0][1]:
            raise damaged(self.path, "was changed after it was written (checksum of the bank's description)")
        read = json.loads(rows[0][0])
        self.content, self._totals = read["content"], read["totals"]
        return self.content

    def read_table(self, table: Table) -> list[tuple[Any, ...]]:
        """Return all rows, without their large columns, in the order of their keys, after a check of all checksums."""
        names = ", ".join(table.names[: table.num_small])
        rows = self._connection.execute(f"SELECT {names}, checksum FROM {table.name}").fetchall()
        if not table.num_large:
            for row in rows:
                self._check_row(table, row[:-1], row[-1])
        total = [len(rows), sum(row[-1] for row in rows if isinstance(row[-1], int)) % MODULUS]
        if total != self._totals[table.name]:
            raise damaged(self.path, f"was changed after it was written (rows of {table.name})")
        return sorted(row[:-1] for row in rows)

    def read_large(self, table: Table, *keys: int) -> list[tuple[Any, ...]]:
        """Return the rows that start with these keys, with their large columns, in the order of their keys."""
        small = table.num_small
        condition = " AND ".join(f"{name} = ?" for name in table.names[: len(keys)]) or "1"
        rows = self._connection.execute(f"SELECT * FROM {table.name} WHERE {condition}", keys).fetchall()
        for row in rows:
            self._check_row(table, (*row[:small], *row[small + 1 :]), row[small])
        return sorted((*row[:small], *row[small + 1 :]) for row in rows)

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

    def close(self) -> None:
        self.is_closed = True
        self._connection.close()

    def refuse_closed(self) -> None:
        """Raise ValueError if the bank was closed."""
        if self.is_closed:
            raise ValueError(f"the bank in {str(self.path.parent)!r} was closed; open it again with `MemoryBank.open`.")

    def _check_row(self, table: Table, row: Sequence[Any], checksum: object) -> None:
        if row_checksum(table, row) != checksum:
            raise damaged(self.path, f"was changed after it was written (a row of {table.name})")


def row_checksum(table: Table, row: Sequence[Any]) -> int:
    """Return a number below 2^63 that depends on every column."""
    parts = [table.name.encode()]
    for value in row:
        # Text and blobs as they are, behind their type and length; numbers as Python writes them.
        text = value if isinstance(value, str) else repr(value) if not isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else text.encode("utf-8", "surrogatepass")
        parts += [f"{type(value).__name__} {len(data)} ".encode(), data]
    return _checksum(parts)


def _checksum(parts: Sequence[bytes]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") % MODULUS
