"""A bank from somebody else is data: it is read or refused, and nothing that it says is run, followed or believed."""

import os
import random
import shutil
import socket
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from folder_banks import SETTINGS, write
from forging import (
    JOURNAL,
    NESTED,
    description,
    forge_document,
    forge_sql,
    forge_tensors,
    journal,
    make_bank,
    open_raw,
    outcome,
    random_forgery,
    seal,
    use,
    watched,
)

from longmem.cli.common import model_of_bank
from longmem.memory import MemoryBank, has_bank
from longmem.memory.folder.catalogue import CATALOGUE, INDEXES
from longmem.memory.folder.foreign import fits, parse_json
from longmem.memory.index import approximate, arrays_of, index_of


@pytest.fixture(autouse=True)
def small_indexes(monkeypatch):
    monkeypatch.setattr(approximate, "EXACT_BELOW", 5)
    monkeypatch.setattr(approximate, "POINTS_PER_CENTROID", 1)


@pytest.fixture(scope="module")
def banks(tmp_path_factory) -> dict[str, Path]:
    """Return a bank of each of some kinds of index."""
    place = tmp_path_factory.mktemp("banks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(approximate, "EXACT_BELOW", 5)
        patch.setattr(approximate, "POINTS_PER_CENTROID", 1)
        for index in ("exact", "hnsw:neighbors=4", "ivf", "pq:bits=4"):
            make_bank(place / index.split(":")[0], index)
    return {path.name: path for path in place.iterdir()}


@pytest.fixture
def outside(tmp_path) -> Path:
    """Return a folder that no bank may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    (folder / "segments").mkdir()
    return folder


@pytest.fixture
def folder(banks, outside, tmp_path) -> Path:
    return Path(shutil.copytree(banks["exact"], tmp_path / "bank"))


def say(**said: object) -> Callable[[Path, Path], None]:
    """Return a forgery of what the bank is described by."""

    def forge(folder: Path, outside: Path) -> None:
        content = description(folder)
        for name, value in said.items():
            if name in content["settings"]:
                content["settings"][name] = value
            else:
                content[name] = value
        seal(folder, content)

    return forge


def sql(*statements: str) -> Callable[[Path, Path], None]:
    return lambda folder, outside: forge_sql(folder, *(each.format(outside=outside) for each in statements))


def schema(*statements: str) -> Callable[[Path, Path], None]:
    return lambda folder, outside: forge_sql(folder, *statements, sealed=False)


def document(**said: object) -> Callable[[Path, Path], None]:
    return lambda folder, outside: forge_document(folder, lambda fields: fields.update(said))


def header(length: int | None = None, **tensor: object) -> Callable[[Path, Path], None]:
    """Return a forgery of what a file of tensors says of itself."""

    def alter(tensors: dict[str, np.ndarray]) -> bytes:
        place = {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]} | tensor
        text = str({"0.keys": place}).replace("'", '"').encode()
        return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(64)

    return lambda folder, outside: forge_tensors(folder, alter)


def put(name: str, make: Callable[[Path, Path], object], pattern: bool = False) -> Callable[[Path, Path], None]:
    """Return a forgery that puts something else in the place of a file or a folder."""

    def forge(folder: Path, outside: Path) -> None:
        path = next(folder.glob(name)) if "*" in name else folder / name
        if path.is_dir():
            shutil.copytree(path, outside / path.name, dirs_exist_ok=True)
            shutil.rmtree(path)
        elif path.exists():
            shutil.copyfile(path, outside / "copy")
            path.unlink()
        else:
            shutil.copyfile(outside / "precious", outside / "copy")
        make(path, outside)

    return forge


def to_copy(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "copy")


def to_folder(path: Path, outside: Path) -> None:
    path.symlink_to(outside / path.name)


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def plug(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # a path of a socket has 107 bytes at most
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def make_directory(path: Path, outside: Path) -> None:
    path.mkdir()


def device(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


def journal_of(*, where: str = JOURNAL, **said: object) -> Callable[[Path, Path], None]:
    def forge(folder: Path, outside: Path) -> None:
        named = {"named": str(outside / "precious")} if said.get("named") else {}
        (folder / where).write_bytes(journal(**said | named))

    return forge


ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x, x, x FROM n"
DROP = "DELETE FROM sqlite_master WHERE name = 'usage'"
NEW = "INSERT INTO sqlite_master VALUES ('{}', '{}', '{}', 0, '{}')"
BIG = 10**12

FORGERIES: dict[str, Callable[[Path, Path], None]] = {
    # What SQLite would do by itself.
    "a journal that names a file": journal_of(named=True),
    "a journal that names a file and undoes nothing": journal_of(named=True, magic=bytes(8)),
    "a journal that names a file, of another kind": journal_of(named=True, magic=b"12345678"),
    "a journal that asks for 16 TB": journal_of(num_pages=2**32 - 1),
    "a journal behind a link": put(JOURNAL, to_copy),
    "a journal that is a pipe": put(JOURNAL, pipe),
    "a journal that is a folder": put(JOURNAL, make_directory),
    "a log beside it": put(f"{CATALOGUE}-wal", lambda path, outside: path.write_bytes(bytes(4096))),
    "a log behind a link": put(f"{CATALOGUE}-wal", to_copy),
    "the memory of a log": put(f"{CATALOGUE}-shm", lambda path, outside: path.write_bytes(bytes(32_768))),
    "a trigger": schema(
        NEW.format("trigger", "t", "usage", "CREATE TRIGGER t AFTER DELETE ON usage BEGIN DELETE FROM bank; END")
    ),
    "a view": schema(NEW.format("view", "v", "v", f"CREATE VIEW v AS {ENDLESS}")),
    "a view in place of a table": schema(DROP, NEW.format("view", "usage", "usage", f"CREATE VIEW usage AS {ENDLESS}")),
    "a virtual table": schema(NEW.format("table", "f", "f", "CREATE VIRTUAL TABLE f USING fts5(x)")),
    "a virtual table of a file": schema(
        NEW.format("table", "f", "f", "CREATE VIRTUAL TABLE f USING csv(filename=/etc/passwd)")
    ),
    "an index": schema("CREATE INDEX i ON usage (last_read)"),
    "a table more": schema("CREATE TABLE more (x)"),
    "a generated column": schema("ALTER TABLE usage ADD COLUMN made AS (abs(-9223372036854775808))"),
    "a default": schema("ALTER TABLE usage ADD COLUMN made DEFAULT 1"),
    "statistics": schema("ANALYZE"),
    "a schema that is none": schema("UPDATE sqlite_master SET sql = 'CREATE nonsense' WHERE name = 'usage'"),
    "a schema without end": schema(
        "UPDATE sqlite_master SET sql = sql || ' -- ' || hex(zeroblob(1000000)) WHERE name = 'usage'"
    ),
    # What is no plain file.
    "a catalogue behind a link": put(CATALOGUE, to_copy),
    "a catalogue that is a pipe": put(CATALOGUE, pipe),
    "a catalogue that is a socket": put(CATALOGUE, plug),
    "a catalogue that is a device": put(CATALOGUE, device),
    "a segment behind a link": put("segments/*", to_copy),
    "a segment that is a pipe": put("segments/*", pipe),
    "a segment that is a socket": put("segments/*", plug),
    "a segment that is a folder": put("segments/*", make_directory),
    "a segment that is a device": put("segments/*", device),
    "segments behind a link": put("segments", to_folder),
    # Names.
    "a segment elsewhere": sql("UPDATE segments SET name = '{outside}/precious'"),
    "a segment above": sql("UPDATE segments SET name = '../outside/precious'"),
    "a segment of no name": sql("UPDATE segments SET name = ''"),
    "a segment that is the catalogue": sql(f"UPDATE segments SET name = '../{CATALOGUE}'"),
    "a segment with a zero in its name": sql("UPDATE segments SET name = name || char(0) || 'x'"),
    # Sizes.
    "10^12 slots": sql(f"UPDATE segments SET num_slots = {BIG}"),
    "no slots": sql("UPDATE segments SET num_slots = 0"),
    "10^12 bytes": sql(f"UPDATE segments SET num_bytes = {BIG}"),
    "a slot in two files": sql("UPDATE segments SET first_slot = first_slot / 2"),
    "10^12 chunks": sql(f"UPDATE spans SET num_chunks = {BIG}"),
    "no chunks": sql("UPDATE spans SET num_chunks = 0"),
    "negative chunks": sql("UPDATE spans SET num_chunks = -1"),
    "half a chunk": sql("UPDATE spans SET num_chunks = 1.5"),
    "chunks by words": sql("UPDATE spans SET num_chunks = 'many'"),
    "slots beyond all": sql(f"UPDATE spans SET slot = {2**63 - 1}"),
    "slots in one place": sql("UPDATE spans SET slot = 0"),
    "one moment for all": sql("UPDATE spans SET write_order = 3"),
    "written at infinity": sql("UPDATE spans SET written_at = 9e999"),
    "an owner that is not there": sql("UPDATE spans SET serial = 77 WHERE serial = 1"),
    "a first chunk far off": sql(f"UPDATE spans SET first_chunk = first_chunk + {BIG}"),
    "use without a document": sql("INSERT INTO usage VALUES (77, 1, 1.5, 0)"),
    "half a use": sql("INSERT OR REPLACE INTO usage VALUES (1, 0.5, 1.5, 0)"),
    "a tail that is none": sql("UPDATE documents SET waiting = X'0001'"),
    "a tail of 10^12 bytes": sql("UPDATE documents SET waiting = X'00e40b54020000007b7d'"),
    "a document twice": document(document_id="c"),
    "10^12 tokens": document(num_tokens=BIG),
    "too few tokens": document(num_tokens=1),
    "10^12 segments": document(segments=[[0, 1, BIG, 0, 1, -1]]),
    "10^12 segments of nothing": document(segments=[[0, 0, BIG, 0, 1, -1]]),
    "segments of an encoder to come": document(segments=[[0, 4, 1, 77, 1, -1]]),
    "a name that is none": document(document_id=7),
    "a name of nothing": document(document_id=""),
    "half of a character as a name": document(document_id="a\ud800"),
    "a tag of nothing": document(tags=["all", ""]),
    "tags by the letter": document(tags="all"),
    "an unknown field": document(__class__="x"),
    "nested without end": lambda folder, outside: seal(folder, text="[" * 100_000),
    "a description of nothing": lambda folder, outside: seal(folder, text="null"),
    "not a number": say(commit=float("nan")),
    "a negative number": say(next_slot=-5),
    "10^12 heads": say(shapes=[[BIG, 64, 5, 0], [1, 96, 7, 0]]),
    "10^12 dimensions": say(shapes=[[2, BIG, 5, 0], [1, 96, 7, 0]]),
    "no shapes": say(shapes=[]),
    "10^12 tokens in a chunk": say(chunk_size=BIG, capacity_tokens=BIG),
    "an unknown setting": say(settings={"chunk_size": 4, "__class__": "x"}),
    "10^12 rows": lambda folder, outside: seal(folder, totals={"documents": [BIG, 0]}),
    "encoders of nothing": say(encoders=[{"weights": "x"}]),
    # Files of tensors.
    "a header of 10^18 bytes": header(length=10**18),
    "a header that is none": header(length=3),
    "a tensor of 10^12 numbers": header(shape=[BIG]),
    "a tensor beyond its file": header(shape=[BIG], data_offsets=[0, 2 * BIG]),
    "a tensor before its file": header(data_offsets=[-8, -6]),
    "a tensor between two numbers": header(data_offsets=[1, 3]),
    "a tensor of things": header(dtype="OBJECT"),
    "a tensor without a shape": header(shape="x"),
    "other tensors": lambda folder, outside: forge_tensors(folder, lambda tensors: tensors.popitem() and None),
}
# What may be refused or read: nothing follows from it.
HARMLESS = ("a first chunk far off", "an unknown field")


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_bank_is_refused_and_nothing_else_happens(name, folder, outside):
    FORGERIES[name](folder, outside)
    with watched(folder, outside):
        has_bank(folder)
    for read_only in (True, False):
        assert outcome(folder, outside, read_only=read_only) == "refused"


def test_a_bank_that_nobody_forged_is_used(folder, outside):
    seal(folder)
    assert outcome(folder, outside, read_only=True) == "used"
    assert outcome(folder, outside, read_only=False) == "used"


@pytest.mark.parametrize("make", [to_copy, pipe, plug, make_directory, device])
def test_a_lock_is_a_plain_file(make, folder, outside):
    put("lock", make)(folder, outside)
    assert outcome(folder, outside, read_only=True) == "used"
    assert outcome(folder, outside, read_only=False) == "refused"


@pytest.mark.parametrize(
    "make", [pipe, device, make_directory, to_copy, lambda path, _: path.write_text('{"model": 7}')]
)
def test_the_name_of_a_model_is_read_from_a_plain_file(make, folder, outside):
    (folder / "model.json").write_text('{"model": "tiny"}')
    assert model_of_bank(folder) == "tiny"
    put("model.json", make)(folder, outside)
    with watched(folder, outside, seconds=5):
        assert model_of_bank(folder) is None


def test_text_that_does_not_fit_its_tokens_is_refused_when_it_is_read(folder, outside):
    for column, value in (("token_ids", "X'01'"), ("char_ends", "X'ffffffff'"), ("text", "X'ff'"), ("text", "X''")):
        forge_sql(folder, f"UPDATE sources SET {column} = {value} WHERE length(char_ends) > 4")
        assert outcome(folder, outside, read_only=True) == "refused"


@pytest.mark.parametrize("table", ["sources", "spans", "usage"])
def test_a_tree_without_end_ends(table, folder, outside):
    """Six levels of pages, each of which is 150 times the child of the one above, have 10^13 rows to read."""
    with open_raw(folder) as connection:
        root = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()[0]
        num_columns = len(connection.execute(f"PRAGMA table_info({table})").fetchall())
        size, count = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count"))

    def page(child: int, num_cells: int) -> bytes:
        """Return a page of rows of ones, each behind the same child; a page of the lowest level, where there is none."""
        cell = (child.to_bytes(4) if child else b"") + bytes([num_columns + 1, num_columns + 1, *[9] * num_columns])
        starts = [size - len(cell) * (number + 1) for number in range(num_cells)]
        head = bytes([2 if child else 10, 0, 0]) + num_cells.to_bytes(2) + starts[-1].to_bytes(2) + b"\0"
        head += (child.to_bytes(4) if child else b"") + b"".join(start.to_bytes(2) for start in starts)
        return head.ljust(starts[-1], b"\0") + cell * num_cells

    with (folder / CATALOGUE).open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(page(count + 1, 150))
        file.seek(count * size)
        for level in range(1, 6):
            file.write(page(count + level + 1, 150))
        file.write(page(0, 1))
        file.seek(28)
        file.write((count + 6).to_bytes(4))
    for read_only in (True, False):
        assert outcome(folder, outside, read_only=read_only) == "refused"


@pytest.mark.parametrize("index", ["hnsw", "ivf", "pq"])
def test_a_saved_index_is_used_and_a_forged_one_is_built_anew(index, banks, outside, tmp_path):
    folder = Path(shutil.copytree(banks[index], tmp_path / "bank"))
    names = {path.name for path in (folder / "indexes").iterdir()}
    assert names
    with MemoryBank.open(folder, read_only=True) as bank:
        assert bank._table.index_of(0).export() is not None, "it was adopted"
        expected = bank.search(1, torch.ones(2, 3, 64), 4)

    def answers() -> None:
        with watched(folder, outside), MemoryBank.open(folder, read_only=True) as bank:
            found = bank.search(1, torch.ones(2, 3, 64), 4)
            use(bank)
        torch.testing.assert_close(found.scores, expected.scores)

    arrays: dict[str, np.ndarray] = {}
    forge_tensors(folder, lambda tensors: arrays.update(tensors), INDEXES)
    for name, array in arrays.items():
        for value in (-(2**31), len(array)):
            changed = array.copy()
            changed.reshape(-1)[-1] = value if changed.dtype.kind in "if" else 7

            def alter(tensors: dict[str, np.ndarray], name: str = name, changed: np.ndarray = changed) -> None:
                tensors.update(arrays)
                tensors[name] = changed

            if name.endswith(("slots", "0.ids", "0.levels", "0.links", "0.entry", "0.sizes")):
                forge_tensors(folder, alter, INDEXES)
                answers()
    for statement in ("layer = 99", "content = '{}'", "content = '['", "digests = '[]'"):
        forge_sql(folder, f"UPDATE indexes SET {statement} WHERE layer = 0")
        answers()
    forge_sql(folder, "UPDATE indexes SET name = '../outside/precious'")  # a name is the catalogue's, which is refused
    assert outcome(folder, outside, read_only=True) == "refused"


LAYOUTS = ["IVF4,Flat", "IVF4,SQfp16", "HNSW4,Flat", "HNSW8,SQfp16", "IVF4,PQ4x4"]


def made(layout: str) -> faiss.Index:
    index = faiss.index_factory(8, layout, faiss.METRIC_INNER_PRODUCT)
    vectors = np.random.default_rng(0).standard_normal((700, 8)).astype(np.float32)
    index.train(vectors)
    index.add(vectors)
    return index


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_index_of_its_arrays_answers_the_same(layout):
    index = made(layout)
    twin = index_of(layout, 8, arrays_of(index, layout))
    queries = np.random.default_rng(1).standard_normal((50, 8)).astype(np.float32)
    for one, other in zip(index.search(queries, 9), twin.search(queries, 9), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_that_no_index_had_are_refused(layout):
    arrays = arrays_of(made(layout), layout)
    for name in arrays:
        for cut in (arrays[name][:-1], np.concatenate([arrays[name]] * 2), arrays[name][None]):
            with pytest.raises((ValueError, IndexError)):
                index_of(layout, 8, arrays | {name: cut})
    for other in (
        "IVF99999999,Flat",
        "HNSW999,Flat",
        "IVF4,PQ3x4",
        "IVF4,PQ4x8",
        "Flat",
        "IVF4_HNSW32,Flat",
        "OIVF4,Flat",
        "LSH",
    ):
        with pytest.raises((ValueError, KeyError)):
            index_of(other, 8, arrays)
    with pytest.raises(ValueError, match=r"codes|centres"):
        index_of(layout, 10**12, arrays)
    assert arrays_of(made(layout), "IVF4,RFlat") is None


def test_a_bank_of_tokens_keeps_its_index(tmp_path):
    settings = SETTINGS | {"search": "token", "index": "ivf"}
    with MemoryBank.create(tmp_path, **settings) as bank:
        for start in range(0, 800, 80):
            write(bank, f"{start}", range(start, start + 80))
        expected = bank.search(1, torch.ones(2, 3, 64), 4)
    with MemoryBank.open(tmp_path) as bank:
        index = bank._table.index_of(0)
        assert index.export() is not None
        torch.testing.assert_close(bank.search(1, torch.ones(2, 3, 64), 4)[:2], expected[:2])


def test_json_is_read_within_bounds():
    for text in ("[" * 100_000, "NaN", "[Infinity]", '{"a": -Infinity}', "{", "1" * 5000):
        with pytest.raises(ValueError, match="."):
            parse_json(text)
    assert parse_json('{"a": [1, null]}') == {"a": [1, None]}
    assert not fits(1e999, float)
    assert not fits(2**62, int)
    assert not fits(True, int)
    assert not fits(NESTED, [[int]])


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_commit_that_was_cut_short_is_undone_or_says_how(is_writable, folder, monkeypatch):
    """On read-only media nothing is damaged: the journal cannot be played there, and that is what is said."""
    with open_raw(folder) as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        page = (folder / CATALOGUE).read_bytes()[:4096]
    # The journal holds the first page as it was; in the file it is half written.
    checksum = (7 + sum(page[place] for place in range(4096 - 200, 0, -200))) & 0xFFFFFFFF
    record = (1).to_bytes(4) + page + checksum.to_bytes(4)
    (folder / JOURNAL).write_bytes(journal(num_pages=pages, records=1) + record)
    with (folder / CATALOGUE).open("r+b") as file:
        file.seek(40)
        file.write(bytes(3000))
    if is_writable:
        with MemoryBank.open(folder, read_only=True) as bank:
            use(bank)
        assert not (folder / JOURNAL).exists()
        return
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda address, **options: connect(address.replace("=rw", "=ro"), **options)
    )
    before = (folder / JOURNAL).read_bytes()
    with pytest.raises(ValueError, match=r"middle of a commit.*nothing is lost.*copy the whole folder"):
        MemoryBank.open(folder, read_only=True)
    assert (folder / JOURNAL).read_bytes() == before
    assert has_bank(folder)


@pytest.mark.skipif(not hasattr(os, "fork") or os.getuid() != 0, reason="needs a user who may not read")
@pytest.mark.parametrize("name", [CATALOGUE, "segments/*", "segments"])
def test_what_may_not_be_read_is_not_called_damaged(name, folder):
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for parent in folder.parents[:-2]:
        parent.chmod(0o755)
    next(folder.glob(name)).chmod(0)
    readable, writable = os.pipe()
    if not (child := os.fork()):
        try:
            os.setuid(65_534)
            MemoryBank.open(folder, read_only=True)
            os.write(writable, b"opened")
        except BaseException as error:
            os.write(writable, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writable)
    os.waitpid(child, 0)
    with open(readable) as file:
        said = file.read()
    assert said.startswith("ValueError: this user may not read"), said
    assert str(folder) in said
    assert "nothing is damaged" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(12, "Cannot allocate memory"), "needs more memory"),
        (RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"), "needs more memory"),
        (OSError(13, "Permission denied"), "this user may not read .* nothing is damaged"),
        (OSError(5, "Input/output error"), "says nothing about damage"),
        (OSError(24, "Too many open files"), "more files than this process may open"),
    ],
)
def test_a_cause_of_the_system_is_told(error, said, folder, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch.UntypedStorage, "from_file", fail)
    with pytest.raises(ValueError, match=said) as caught:
        MemoryBank.open(folder, read_only=True)
    assert str(folder) in str(caught.value)
    assert "as it was written" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_many_forgeries_are_read_or_refused(seed, banks, outside, tmp_path):
    """200 each: whatever is changed, the bank is read or refused by one sentence, in time, and nothing outside is touched."""
    chosen, outcomes = random.Random(seed), Counter()
    for number in range(200):
        folder = Path(shutil.copytree(chosen.choice(list(banks.values())), tmp_path / f"{number}"))
        what = random_forgery(folder, chosen)
        try:
            outcomes[what.split()[0], outcome(folder, outside, read_only=number % 2 == 0)] += 1
        except BaseException as error:
            error.add_note(f"forgery {number} of seed {seed}: {what}")
            raise
        shutil.rmtree(folder)
    print(outcomes)
    assert sum(count for (_, how), count in outcomes.items() if how == "refused") > 60
