"""Banks as a stranger could make them: everything is changed that can be, and every checksum is right again afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folder_banks import CHUNK_SIZE, SETTINGS, SIZES, write
from safetensors.numpy import load_file, save_file

from longmem.memory import MemoryBank
from longmem.memory.folder.catalogue import CATALOGUE, INDEXES, SEGMENTS, TABLES, _checksum, row_checksum
from longmem.memory.folder.foreign import JOURNAL_MAGIC
from longmem.memory.folder.tensor_file import digest

JOURNAL = f"{CATALOGUE}-journal"
NESTED = json.loads("[" * 900 + "]" * 900)
# What no size, name or number of a bank is.
HOSTILE: list[Any] = [
    -1,
    0,
    1,
    2**31,
    10**12,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    10**30,
    1.5,
    -0.5,
    float("nan"),
    float("inf"),
]
HOSTILE += [None, True, "", "x", "\0", "..", "../../x", "/etc/passwd", "\ud800", [], [[]], [-1], {}, {"x": 1}, NESTED]

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.mkdir",
    "os.chmod",
    "shutil.rmtree",
}
CODE = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "pickle.find_class",
    "sqlite3.load_extension",
    "marshal.loads",
}


class Watch:
    """What the process does outside of a folder, by Python's audit events; a hook stays for ever, so there is one."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.found: list[tuple[str, Any]] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in CODE:
            self.found.append((event, arguments))
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if (is_write or event in CHANGES) and not isinstance(arguments[0], int):
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                place = os.fsdecode(path)
                if (
                    event != "open" and isinstance(arguments[-1], int) and arguments[-1] >= 0
                ):  # a name in an open folder
                    place = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), place)
                # Of a file that is opened so nobody is told the folder; it is none behind a link, and `over` looks here. Python
                # tells of it once more, by a mode, before it asks the opener.
                is_name = event == "open" and os.path.basename(place) == place
                is_name = is_name and bool(arguments[1] is not None or arguments[2] & os.O_NOFOLLOW)
                if not is_name and not os.path.abspath(place).startswith(self.folder):
                    self.found.append((event, path))

    @contextlib.contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        self.folder, self.found = str(folder), []
        here = set(os.listdir())
        try:
            yield
        finally:
            self.folder = None
        assert set(os.listdir()) == here


WATCH: list[Watch] = []


@contextlib.contextmanager
def watched(folder: Path, outside: Path, seconds: int = 60) -> Iterator[None]:
    """Fail unless what runs inside ends in time, runs no code, and leaves alone what is outside of `folder`."""
    if not WATCH:
        WATCH.append(Watch())

    def late(*_: Any) -> None:
        raise AssertionError("it goes on without end")

    before, handler = state_of(outside), signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        with WATCH[0].over(folder):
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert not WATCH[0].found
    assert state_of(outside) == before


def state_of(folder: Path) -> dict[str, Any]:
    """Return what is in a folder: names, contents, times."""
    paths = sorted(folder.rglob("*"))
    return {
        str(each): (each.read_bytes() if each.is_file() else b"", each.lstat().st_mtime_ns, each.lstat().st_mode)
        for each in paths
    }


def make_bank(folder: Path, index: str = "exact") -> None:
    """Write a bank with all that a bank can have: segments, short chunks, texts, tags, dates, evicted chunks, an index."""
    with MemoryBank.create(folder, **SETTINGS | {"index": index}, capacity_tokens=116) as bank:
        for position, name in enumerate("abc"):
            write(bank, name, range(100 * position, 100 * position + 23), tags=[f"tag {name}", "all"], segment="new")
        write(bank, "b", range(123, 170))
        write(bank, "without text", range(1000, 1009), with_text=False, dated=5.0, valid_until=1e10)
        bank.supersede("a", by="b")
        bank.search(1, torch.ones(2, 1, 64), 3)


def use(bank: MemoryBank) -> None:
    """Do with a bank all that reads it."""
    assert len(bank.documents()) == len({info.document_id for info in bank.documents()})
    for info in bank.documents():
        bank.text(info.document_id)
        bank.token_ids(info.document_id)
        bank.segments(info.document_id)
    bank.select(tags=["all"]).search(1, torch.ones(2, 1, 64), 3)
    for layer, (heads, dim, _) in SIZES.items():
        rows, *_ = bank.search(layer, torch.ones(heads, 2, dim), 5)
        bank.gather(layer, rows.flatten(1), bank.generation)
        bank.locate(rows)
    assert bank.nbytes >= 0
    bank.folder.verify()


def change(bank: MemoryBank) -> None:
    """Do with a bank some of what changes it."""
    write(bank, "new", range(5000, 5030))
    for info in bank.documents():
        bank.delete(info.document_id)
    bank.folder.compact()


def outcome(folder: Path, outside: Path, *, read_only: bool) -> str:
    """Return "refused", by one sentence that names a file of the bank, or "used"."""
    with watched(folder, outside):
        try:
            with MemoryBank.open(folder, read_only=read_only) as bank:
                use(bank)
                if not read_only:
                    change(bank)
            return "used"
        except ValueError as error:
            refusal = error
    assert type(refusal) is ValueError, repr(refusal)
    assert str(folder) in str(refusal), str(refusal)
    assert "\n" not in str(refusal), str(refusal)
    return "refused"


# Forging.


def forge_sql(folder: Path, *statements: str | tuple[str, tuple[Any, ...]], sealed: bool = True) -> None:
    """Change the catalogue by SQL, as it stands, and make all checksums right, where they can be."""
    with open_raw(folder) as connection:
        for statement in statements:
            connection.execute(*((statement,) if isinstance(statement, str) else statement))
    if sealed:
        seal(folder)


@contextlib.contextmanager
def open_raw(folder: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(folder / CATALOGUE)) as connection, connection:
        connection.execute("PRAGMA writable_schema = ON")
        yield connection


def seal(folder: Path, content: Any = None, totals: Any = None, text: str | None = None) -> None:
    """Make the checksums of all rows right; `content`, `totals`, `text`: what the bank is described by then."""
    with open_raw(folder) as connection:
        sums = {}
        for table in TABLES:
            sums[table.name] = [0, 0]
            keys = " AND ".join(f"{name} IS ?" for name in table.names[: table.num_keys])
            for row in connection.execute(f"SELECT {', '.join(table.names)} FROM {table.name}").fetchall():
                checksum = row_checksum(table, row)
                statement = f"UPDATE {table.name} SET checksum = ? WHERE {keys}"
                connection.execute(statement, (checksum, *row[: table.num_keys]))
                sums[table.name][0] += 1
                sums[table.name][1] = (sums[table.name][1] + checksum) % 2**63
        if content is None:
            content = json.loads(connection.execute("SELECT content FROM bank").fetchone()[0])["content"]
        text = json.dumps({"content": content, "totals": sums | (totals or {})}) if text is None else text
        connection.execute("UPDATE bank SET content = ?, checksum = ?", (text, _checksum(text.encode())))


def description(folder: Path) -> dict[str, Any]:
    with open_raw(folder) as connection:
        return json.loads(connection.execute("SELECT content FROM bank").fetchone()[0])["content"]


def forge_document(folder: Path, alter: Callable[[dict[str, Any]], Any], name: str = "b") -> None:
    """Change what the catalogue says of one document."""
    with open_raw(folder) as connection:
        for serial, text in connection.execute("SELECT serial, content FROM documents").fetchall():
            fields = json.loads(text[text.index("{") :])
            if fields["document_id"] == name:
                result = alter(fields)
                connection.execute(
                    "UPDATE documents SET content = ? WHERE serial = ?", (json.dumps(result or fields), serial)
                )
    seal(folder)


def forge_tensors(folder: Path, alter: Callable[[dict[str, np.ndarray]], Any], table: Any = SEGMENTS) -> None:
    """Change the tensors of the first file that the table lists, or their file as it is, with the right digests."""
    with open_raw(folder) as connection:
        name = connection.execute(f"SELECT name FROM {table.name}").fetchone()[0]
        path = next(folder.glob(f"*/{name}*"))
        tensors = load_file(path)
        if (data := alter(tensors)) is None:
            save_file(tensors, path)
            data = path.read_bytes()
        path.write_bytes(data)
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        digests = {each: digest(array.tobytes()) for each, array in tensors.items()} | {"": digest(header)}
        connection.execute(
            f"UPDATE {table.name} SET digests = ?, num_bytes = ? WHERE name = ?", (json.dumps(digests), len(data), name)
        )
    seal(folder)


def journal(
    num_pages: int = 1, page_bytes: int = 4096, named: str = "", records: int = 0, magic: bytes = JOURNAL_MAGIC
) -> bytes:
    """Return a journal of SQLite that undoes to so many pages and, at its end, names another file."""
    head = magic + struct.pack(">IIIII", records, 7, num_pages, 512, page_bytes)
    name = named.encode()
    tail = (
        struct.pack(">I", 262_145) + name + struct.pack(">II", len(name), sum(name)) + JOURNAL_MAGIC if named else b""
    )
    return head.ljust(512, b"\0") + tail


def random_forgery(folder: Path, chosen: random.Random) -> str:
    """Change one thing of a bank at random; return what."""
    kinds = ["description", "document", "cell", "header", "journal", "rows"]
    kind = chosen.choice(kinds + ["index"] * 6 * (folder / "indexes").is_dir())
    value = chosen.choice(HOSTILE)
    if kind == "description":
        content = description(folder)
        where = replace_somewhere(content, value, chosen)
        seal(folder, content)
    elif kind == "document":
        where = ""

        def alter(fields: dict[str, Any]) -> None:
            nonlocal where
            where = replace_somewhere(fields, value, chosen)

        forge_document(folder, alter, chosen.choice(["a", "b", "c", "without text"]))
    elif kind in ("cell", "rows"):
        table = chosen.choice(TABLES)
        column = chosen.choice(table.names)
        value = value if isinstance(value, (str, int, float, type(None))) else json.dumps(value)
        value = chosen.choice([value, chosen.randbytes(8)])
        if (isinstance(value, int) and not -(2**63) <= value < 2**63) or value == "\ud800":
            value = 2**63 - 1
        where = f"{table.name}.{column} {value!r}"
        with contextlib.suppress(sqlite3.IntegrityError):
            which = (
                "" if kind == "rows" and table.names.index(column) >= table.num_keys else " ORDER BY random() LIMIT 1"
            )
            keys = ", ".join(table.names[: table.num_keys])
            query = f"UPDATE {table.name} SET {column} = ? WHERE ({keys}) IN (SELECT {keys} FROM {table.name}{which})"
            forge_sql(folder, (query, (value,)))
    elif kind == "header":

        def header(tensors: dict[str, np.ndarray]) -> bytes:
            nonlocal where
            path = next(folder.glob("segments/*"))
            data = path.read_bytes()
            length = 8 + int.from_bytes(data[:8], "little")
            said = json.loads(data[8:length])
            where = replace_somewhere(said, value, chosen)
            text = json.dumps(said).encode()
            return len(text).to_bytes(8, "little") + text + data[length:]

        where = ""
        forge_tensors(folder, header)
    elif kind == "index":
        where = ""

        def arrays(tensors: dict[str, np.ndarray]) -> None:
            nonlocal where
            where = chosen.choice(sorted(tensors))
            array = tensors[where].copy()
            if array.size and chosen.random() < 0.8:
                bits = array.reshape(-1).view(np.uint8)
                bits[chosen.randrange(len(bits))] = chosen.randrange(256)
            else:
                array = array[: len(array) // 2]
            tensors[where] = array

        forge_tensors(folder, arrays, INDEXES)
    else:
        magic = chosen.choice([JOURNAL_MAGIC, JOURNAL_MAGIC, chosen.randbytes(8)])
        numbers = [chosen.choice([0, 1, 4, 2**20, 2**32 - 1]) for _ in range(2)]
        page = chosen.choice([0, 1, 512, 4096, 65_536, 2**31])
        named = chosen.choice(["", "", str(folder.parent / "outside" / "precious")])
        where = f"{numbers} {page} {named}"
        data = journal(numbers[0], page, named, numbers[1], magic)
        (folder / JOURNAL).write_bytes(data + (chosen.randbytes(chosen.randrange(9000)) if not named else b""))
    return f"{kind} {where} {str(value)[:40]}"


def replace_somewhere(content: Any, value: Any, chosen: random.Random) -> str:
    """Put a value somewhere into what JSON holds; return where."""
    where = ""
    while True:
        key = chosen.choice(list(content) if isinstance(content, dict) else range(len(content)))
        where += f"/{key}"
        inside = content[key]
        if not isinstance(inside, (dict, list)) or not inside or chosen.random() < 0.3:
            content[key] = value
            return where
        content = inside


__all__ = [
    "CHUNK_SIZE",
    "HOSTILE",
    "JOURNAL",
    "forge_document",
    "forge_sql",
    "forge_tensors",
    "journal",
    "make_bank",
    "outcome",
]
