"""What a writer touches: the folder that it opened and the files of that bank, whatever happens around it."""

import contextlib
import copy
import os
import pickle
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from folder_banks import SETTINGS, contents, segment_files, write
from kept_fast import fast

from longmem.cli.main import main
from longmem.memory import BankShards, MemoryBank, has_bank
from longmem.memory.folder import disk_storage
from longmem.memory.folder.catalogue import CATALOGUE, INDEXES, SEGMENTS, Catalogue
from longmem.memory.index import approximate


@pytest.fixture(autouse=True)
def small_indexes(monkeypatch):
    """Let also these small banks have an index that is saved."""
    monkeypatch.setattr(approximate, "EXACT_BELOW", 4)


def make_bank(folder, names="abc", **options) -> MemoryBank:
    bank = MemoryBank.create(folder, **{**SETTINGS, **options})
    for name in names:
        start = 1000 * ord(name)
        write(bank, name, range(start, start + 18))
    return bank


def tree(folder: Path) -> dict[str, tuple[bytes | None, int]]:
    """Return content and permissions of all that is below a folder."""
    found = [path for path in folder.rglob("*") if not path.name.endswith("-journal")]
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else None, path.lstat().st_mode)
        for path in found
    }


# Each goes another way to the disk.
CHANGES = {
    "add": lambda bank: write(bank, "new", range(500, 520)),
    "append": lambda bank: write(bank, "a", range(500, 520)),
    "delete": lambda bank: bank.delete("a"),
    "rename": lambda bank: bank.rename("a", "z"),
    "compact": lambda bank: bank.folder.compact(),
    "transaction": lambda bank: change_in_transaction(bank),
}


def some(values, kept):
    """Return these values as parameters, all but a few of them for the slow tests."""
    return fast(len(kept), sorted(values, key=lambda value: value not in kept))


def change_in_transaction(bank: MemoryBank) -> None:
    with bank.transaction():
        bank.delete("a")
        write(bank, "a", range(500, 520))


def search(bank: MemoryBank) -> None:
    """Read, so that there is something to count when the bank is closed."""
    bank.search(1, torch.ones(2, 1, 64), 3)


# Another bank in the place of the one that was opened.


def swap(folder: Path) -> Path:
    folder.rename(folder.with_name("old"))
    folder.with_name("new").rename(folder)
    return folder.with_name("old")


def swap_catalogues(folder: Path) -> Path:
    (folder / CATALOGUE).rename(folder.with_name("catalogue of old"))
    for name in segment_files(folder.with_name("new")):
        os.link(folder.with_name("new") / "segments" / name, folder / "segments" / name)
    (folder.with_name("new") / CATALOGUE).rename(folder / CATALOGUE)
    return folder


def move(folder: Path) -> Path:
    return folder.rename(folder.with_name("old"))


@pytest.mark.parametrize("change", some([*CHANGES, "close", "read and close"], ["add", "read and close"]))
@pytest.mark.parametrize("replace", [swap, swap_catalogues, move])
def test_a_bank_in_the_place_of_the_opened_one_is_not_touched(tmp_path, replace, change):
    folder = tmp_path / "notes"
    make_bank(folder, index="hnsw").close()
    make_bank(tmp_path / "new", "xyz").close()
    bank = MemoryBank.open(folder)
    found = contents(bank)
    if change == "read and close":
        search(bank)
    where = replace(folder)
    before, old = tree(folder), tree(where)
    if change in CHANGES:
        with pytest.raises(ValueError, match="is no longer there.*moved or replaced.*open the bank again"):
            CHANGES[change](bank)
        assert contents(bank) == found
    if replace is move:
        assert not bank.folder.reload()
    else:  # SQLite would take the journal of the other one for its own
        for read in (bank.folder.reload, bank.folder.verify):
            with pytest.raises(ValueError, match="moved or replaced"):
                read()
    with pytest.warns(UserWarning, match="moved or replaced"):
        bank.close()
    assert tree(folder) == before
    assert tree(where) == old
    if replace is not move:
        with MemoryBank.open(folder) as bank:
            bank.folder.verify()
            assert set("xyz") == set(contents(bank))
    if replace is not swap_catalogues:
        with MemoryBank.open(where) as bank:
            bank.folder.verify()
            assert contents(bank) == found


def test_a_commit_that_another_writer_made_is_noticed(tmp_path):
    bank = make_bank(tmp_path)
    (tmp_path / "lock").unlink()  # which somebody took for a left-over
    with MemoryBank.open(tmp_path) as other:
        write(other, "other", range(9))
        other.delete("b")
        found = contents(other)
        with pytest.raises(ValueError, match="somebody else has changed it.*open the bank again"):
            bank.delete("a")
        for use in (bank.documents, lambda: write(bank, "d", range(9)), lambda: search(bank), bank.folder.compact):
            with pytest.raises(ValueError, match="open the bank again"):
                use()
        bank.close()
        assert contents(other) == found
        other.folder.verify()
    with MemoryBank.open(tmp_path) as other:
        assert contents(other) == found


def other_bank(folder: Path) -> Path:
    make_bank(folder.with_name("other"), "xyz").close()
    return folder.with_name("other")


def twin_that_went_on(folder: Path) -> Path:
    """Return a copy of the bank from before its last change, after another change."""
    shutil.copytree(folder, folder.with_name("other"))
    with MemoryBank.open(folder) as bank:
        bank.delete("b")
    with MemoryBank.open(folder.with_name("other")) as bank:
        bank.rename("c", "z")
    return folder.with_name("other")


@pytest.mark.parametrize("change", some([*CHANGES, "read", "close"], ["delete", "read"]))
@pytest.mark.parametrize("other_of", [other_bank, twin_that_went_on])
def test_files_of_another_bank_of_as_many_commits_are_noticed(tmp_path, other_of, change):
    """They are written over those of the opened bank, which stay the same files."""
    folder = tmp_path / "notes"
    make_bank(folder).close()
    other = other_of(folder)
    bank, kept = MemoryBank.open(folder), MemoryBank.open(folder, read_only=True)
    before = [path for path in folder.rglob("*") if path.is_file()]
    for path in filter(Path.is_file, other.rglob("*")):
        (folder / path.relative_to(other)).write_bytes(path.read_bytes())
    said = "moved or replaced" if other_of is other_bank else "somebody else has changed it"
    if change in CHANGES:
        with pytest.raises(ValueError, match=said):
            CHANGES[change](bank)
    if change == "read" and other_of is other_bank:
        for read in (lambda: bank.text("a"), lambda: kept.text("a"), kept.folder.reload):
            with pytest.raises(ValueError, match=said):
                read()
    elif change == "read":
        assert kept.folder.reload()
        assert "z" in kept
    kept.close()
    bank.close()
    assert all(path.exists() for path in before)
    with MemoryBank.open(folder) as bank, MemoryBank.open(other, read_only=True) as known:
        bank.folder.verify()
        assert contents(bank) == contents(known)


def interrupt(number: int, frame: object) -> None:
    raise TimeoutError


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")
@pytest.mark.parametrize(
    ("handler", "error"), [(signal.default_int_handler, KeyboardInterrupt), (interrupt, TimeoutError)]
)
def test_a_signal_while_sqlite_runs_is_not_called_damage(tmp_path, handler, error):
    with make_bank(tmp_path) as bank:
        catalogue = bank.folder._folder.catalogue
        count = (
            "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 300000) SELECT count(*) FROM n"
        )

        def read():
            with catalogue.snapshot():
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                catalogue._connection.execute(count).fetchall()

        before = signal.signal(signal.SIGALRM, handler)
        try:
            with pytest.raises(error):
                read()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert set(contents(bank)) == set("abc")


# Forks.


def in_child(action) -> str:
    """Return what a forked copy of this process says after it has done something."""
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            said = str(action())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        with contextlib.suppress(BaseException):
            os.write(writable, said.encode())
        os._exit(0)
    os.close(writable)
    with open(readable, "rb") as file:
        said = file.read().decode()
    os.waitpid(pid, 0)
    return said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "change", some([*CHANGES, "close", "read and close", "let go"], ["transaction", "read and close", "let go"])
)
def test_a_forked_copy_changes_nothing(tmp_path, change):
    holder = [make_bank(tmp_path, index="hnsw")]
    found, before = contents(holder[0]), tree(tmp_path)

    def child():
        if change == "let go":
            return holder.clear()
        if change == "read and close":
            search(holder[0])
        return CHANGES.get(change, MemoryBank.close)(holder[0])

    said = in_child(child)
    if change in CHANGES:
        assert "opened to write by process" in said
        assert "open the bank again here" in said
    else:
        assert said == "None"
    assert tree(tmp_path) == before
    with holder[0] as bank:
        with pytest.raises(ValueError, match="somebody is writing"):
            MemoryBank.open(tmp_path)
        write(bank, "d", range(300, 330))
        bank.delete("a")
        said = in_child(lambda: contents(bank).keys() == contents(MemoryBank.open(tmp_path, read_only=True)).keys())
        assert said == "True", "it may read on"
        found = contents(bank)
    with MemoryBank.open(tmp_path) as bank:
        bank.folder.verify()
        assert contents(bank) == found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_copy_that_lives_on_holds_no_lock(tmp_path):
    bank = make_bank(tmp_path)
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(writable)
        os.read(readable, 1)
        os._exit(0)
    os.close(readable)
    try:
        bank.close()
        MemoryBank.open(tmp_path).close()
    finally:
        os.close(writable)
        os.waitpid(pid, 0)


DAEMON = """
import os, sys, time
from longmem.memory import MemoryBank
bank, opened_by = MemoryBank.open(sys.argv[1]), os.getpid()
with bank:
    if os.fork():
        os._exit(0)
    while os.getppid() == opened_by:
        time.sleep(0.01)
    try:
        bank.delete("a")
    except ValueError as error:
        print(error, flush=True)
with MemoryBank.open(sys.argv[1]) as bank:
    bank.delete("b")
print([info.document_id for info in bank.documents()])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_a_daemon_that_was_forked_inside_with(tmp_path):
    make_bank(tmp_path / "bank").close()
    done = subprocess.run([sys.executable, "-c", DAEMON, str(tmp_path / "bank")], capture_output=True, text=True)
    assert "opened to write by process" in done.stdout, done
    assert done.stdout.endswith("['a', 'c']\n"), done
    with MemoryBank.open(tmp_path / "bank") as bank:
        bank.folder.verify()
        assert list(contents(bank)) == ["a", "c"]


# A commit of which nobody knows whether it counts.


class Connection:
    """A connection that fails at chosen statements, before or after they are done."""

    def __init__(self, connection: sqlite3.Connection, fails: dict[str, str]) -> None:
        self._connection, self._fails = connection, fails

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def execute(self, statement, *values):
        when = self._fails.get(statement.split()[0])
        if when != "before":
            result = self._connection.execute(statement, *values)
        if when is not None:
            raise sqlite3.OperationalError("disk I/O error")
        return result


@pytest.mark.parametrize("change", some([*CHANGES, "search and close"], ["transaction", "compact"]))
@pytest.mark.parametrize(
    ("fails", "is_done"),
    [({"COMMIT": "after"}, True), ({"COMMIT": "before", "ROLLBACK": "before"}, False), ({"COMMIT": "before"}, False)],
)
def test_a_commit_whose_fate_is_not_known_removes_nothing_and_ends_the_object(tmp_path, fails, is_done, change):
    bank = make_bank(tmp_path)
    bank.delete("b")
    before, files, fails = contents(bank), segment_files(tmp_path), dict(fails)
    search(bank)
    catalogue = bank.folder._folder.catalogue
    catalogue._connection = Connection(catalogue._connection, fails)
    with pytest.raises(ValueError, match="disk I/O error"):
        CHANGES.get(change, MemoryBank.close)(bank)
    fails.clear()
    if len(segment_files(tmp_path) & files) < len(files):
        raise AssertionError("a segment was removed")
    try:
        found = before if change == "search and close" else contents(bank)
    except ValueError as error:
        assert "open the bank again: it holds its last commit" in str(error)  # noqa: PT017
        for use in (
            lambda: write(bank, "late", range(9)),
            lambda: search(bank),
            lambda: bank.delete("c"),
            lambda: bank.folder.verify(),
            lambda: bank.folder.reload(),
            lambda: bank.copy(),
            lambda: bank.save(tmp_path / "copy"),
            lambda: "a" in bank,
        ):
            with pytest.raises(ValueError, match="open the bank again"):
                use()
    else:
        assert found == before
    with contextlib.suppress(ValueError):
        bank.close()
    with MemoryBank.open(tmp_path) as bank:
        bank.folder.verify()
        assert change == "compact" or (contents(bank) == before) == (not is_done or change == "search and close")
        assert segment_files(tmp_path) == {s.file.path.name for s in bank._table.storage.segments}


def test_a_change_that_failed_midway_inside_a_transaction_is_not_committed_with_the_others(tmp_path, monkeypatch):
    with make_bank(tmp_path) as bank:
        before = contents(bank)
        monkeypatch.setattr(disk_storage, "SEGMENT_BYTES", 1000)

        def do_several():
            with bank.transaction():
                write(bank, "first", range(500, 600))
                with monkeypatch.context() as patch, contextlib.suppress(ValueError):
                    patch.setattr(disk_storage, "write_tensors", no_room)
                    write(bank, "a", range(600, 700))
                write(bank, "second", range(700, 750))

        with pytest.raises(ValueError, match="a change inside it failed midway"):
            do_several()
        assert contents(bank) == before
        write(bank, "a", range(600, 700))
    with MemoryBank.open(tmp_path) as bank:
        assert contents(bank)["a"][0].num_tokens == 118


def no_room(*_args):
    raise OSError(28, "No space left on device")


# Links, and names of the catalogue.


@pytest.mark.parametrize("name", ["segments", "indexes", "lock", CATALOGUE, f"{CATALOGUE}-journal"])
def test_a_link_is_not_followed_to_be_written(tmp_path, name):
    folder, outside = tmp_path / "bank", tmp_path / "outside"
    make_bank(folder, index="hnsw").close()
    outside.mkdir()
    target = outside / name
    if (folder / name).exists():
        (folder / name).rename(target)
    elif "journal" not in name:
        target.mkdir()
    else:
        target.write_bytes(b"somebody's")
    for litter in ("segment-000000000000-0123456789abcdef.safetensors", ".tmp1", "layer0-0123456789abcdef.faiss"):
        if target.is_dir():
            (target / litter).write_bytes(b"somebody's")
    (folder / name).symlink_to(target)
    before = tree(outside)
    for write_to in (MemoryBank.open, lambda folder: MemoryBank(**SETTINGS).save(folder)):
        with pytest.raises(ValueError, match=name):
            write_to(folder).close()
    assert tree(outside) == before


def test_a_catalogue_with_another_name_is_not_written(tmp_path):
    make_bank(tmp_path / "bank").close()
    (tmp_path / "copy").mkdir()
    os.link(tmp_path / "bank" / CATALOGUE, tmp_path / "copy" / CATALOGUE)
    with pytest.raises(ValueError, match="hard link"):
        MemoryBank.open(tmp_path / "bank")
    with MemoryBank.open(tmp_path / "bank", read_only=True) as bank:
        bank.folder.verify()


FORGED = ["/abs/path", "../victim", "../../victim", "x/../../victim", "..", ".", "", "victim\0", CATALOGUE, "lock"]


@pytest.mark.parametrize("name", some(FORGED, ["/abs/path", "..", ""]))
@pytest.mark.parametrize("table", [SEGMENTS, INDEXES])
def test_a_name_that_no_bank_has_written_is_refused(tmp_path, table, name):
    folder = tmp_path / "bank"
    bank = make_bank(folder, index="hnsw")
    search(bank)
    bank.close()
    victims = [tmp_path / "victim", folder / "victim", tmp_path / "victim.safetensors", folder / "victim.faiss"]
    for victim in victims:
        victim.write_bytes(b"somebody's")
    name = str(victims[0]) if name == "/abs/path" else name
    forge(folder, table, name)
    before = tree(tmp_path)
    for use in (
        MemoryBank.open,
        lambda folder: MemoryBank(**SETTINGS).save(folder),
        lambda folder: MemoryBank.open(folder, read_only=True),
    ):
        with pytest.raises(ValueError, match=CATALOGUE):
            use(folder)
    assert tree(tmp_path) == before


def forge(folder: Path, table, name: str) -> None:
    """Let the first row of a table name another file, with checksums that are right."""
    catalogue = Catalogue(folder, True)
    with catalogue.snapshot():
        catalogue.read_content()
        row = catalogue.read_table(table)[0]
    place = table.names.index("name")
    with catalogue.transaction():
        catalogue.put(table, (*row[:place], name, *row[place + 1 :]))
        catalogue.describe(catalogue.content)
    catalogue.close()


STRANGE = [
    "segments/.tmp123",
    "segments/segment-000000000000-deadbeef.safetensors",
    "segments/segment-000000000000-deadbeefdeadbeef.safetensors",
    "segments/notes.txt",
    "indexes/layer0-x.y",
    "indexes/layer1-0123456789abcdef.faiss",
    "indexes/layer1-0123456789abcdef.safetensors",
    "notes.txt",
]


@pytest.mark.parametrize("first", ["create", "save", "open"])
def test_files_of_others_stay(tmp_path, first):
    if first == "open":
        make_bank(tmp_path).close()
    for name in STRANGE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"somebody's")
    if first == "create":
        make_bank(tmp_path, index="hnsw").close()
    elif first == "save":
        with make_bank(tmp_path / "other", index="hnsw") as other:
            other.save(tmp_path)
    with MemoryBank.open(tmp_path) as bank:
        search(bank)
        write(bank, "a", range(500, 520))
        bank.delete("b")
        bank.folder.compact()
        search(bank)
    assert all((tmp_path / name).read_bytes() == b"somebody's" for name in STRANGE)


def test_what_a_writer_left_is_removed_by_the_next(tmp_path):
    make_bank(tmp_path / "bank").close()
    folder = MemoryBank.open(tmp_path / "bank").folder._folder  # and the bank is gone without being closed
    place = folder._place
    with place.new_file("segments", place.new_name("segment-000000000999", ".safetensors")) as file:
        file.write(b"half")
    with place.new_file("indexes", place.new_name("layer0", ".faiss")) as file:
        file.write(b"half")
    known = segment_files(tmp_path / "bank")
    del place
    folder.close()
    with MemoryBank.open(tmp_path / "bank") as bank:
        assert segment_files(tmp_path / "bank") < known
        assert not list((tmp_path / "bank" / "indexes").iterdir())
        bank.folder.verify()


@pytest.mark.parametrize("folder", ["", None, 7])
def test_a_folder_has_a_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bank = MemoryBank(**SETTINGS)
    uses = (
        lambda: MemoryBank.create(folder, **SETTINGS),
        lambda: MemoryBank.open(folder),
        lambda: MemoryBank.load(folder),
        lambda: bank.save(folder),
        lambda: has_bank(folder),
    )
    for use in uses:
        with pytest.raises(ValueError, match="`folder` must be the path of a folder"):
            use()
    assert not list(tmp_path.iterdir())


def test_the_command_line_wants_a_name_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["bank", "list", "--bank", ""])
    assert "argument --bank: it must name a file or a folder; '.' is the current one" in capsys.readouterr().err


# Permissions.


@pytest.mark.parametrize("mask", some([0o022, 0o002, 0o077], [0o022]))
@pytest.mark.parametrize(
    ("access", "file_mode", "folder_mode"), [(None, 0o600, 0o700), ("group", 0o640, 0o750), ("umask", 0o666, 0o777)]
)
def test_all_of_a_bank_gets_one_mode_that_later_writers_keep(
    tmp_path, monkeypatch, access, file_mode, folder_mode, mask
):
    if access == "umask":
        file_mode, folder_mode = file_mode & ~mask, folder_mode & ~mask
    before = os.umask(mask)
    try:
        if access is not None:
            monkeypatch.setenv("LONGMEM_ACCESS", access)
        with make_bank(tmp_path / "above" / "made", index="hnsw") as bank:
            bank.save(tmp_path / "saved")
        monkeypatch.delenv("LONGMEM_ACCESS", raising=False)
        for folder in (tmp_path / "above" / "made", tmp_path / "saved"):
            with MemoryBank.open(folder) as bank:
                write(bank, "later", range(500, 560))
                search(bank)
                bank.delete("a")
                bank.folder.compact()
                search(bank)
            found = {path.relative_to(folder): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
            assert {path.name for path in found} > {CATALOGUE, "lock", "segments", "indexes"}
            assert {
                path: mode
                for path, mode in found.items()
                if mode != (folder_mode, file_mode)[path.suffix != "" or path.name == "lock"]
            } == {}
            assert stat.S_IMODE(folder.stat().st_mode) == folder_mode
    finally:
        os.umask(before)


def test_a_journal_has_the_mode_of_the_catalogue(tmp_path, monkeypatch):
    modes = []
    with make_bank(tmp_path) as bank:
        put = Catalogue.put

        def look(catalogue, *row):
            put(catalogue, *row)
            modes.extend(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*-journal"))

        monkeypatch.setattr(Catalogue, "put", look)
        write(bank, "d", range(9))
    assert set(modes) == {0o600}


def test_the_catalogue_of_an_earlier_version_gets_the_mode_of_its_segments(tmp_path):
    make_bank(tmp_path).close()
    for path in (tmp_path / "segments").iterdir():  # names and permissions as they were
        name = path.name
        os.rename(path, path.with_name(f"{name[:-20]}.safetensors"))
        forge_all(tmp_path, name, f"{name[:-20]}.safetensors")
    (tmp_path / CATALOGUE).chmod(0o644)
    with MemoryBank.open(tmp_path) as bank:
        bank.folder.verify()
    assert stat.S_IMODE((tmp_path / CATALOGUE).stat().st_mode) == 0o600


def forge_all(folder: Path, old: str, new: str) -> None:
    catalogue = Catalogue(folder, True)
    with catalogue.snapshot():
        catalogue.read_content()
        rows = catalogue.read_table(SEGMENTS)
    with catalogue.transaction():
        for row in rows:
            if row[2] == old:
                catalogue.put(SEGMENTS, (*row[:2], new, *row[3:]))
        catalogue.describe(catalogue.content)
    catalogue.close()


@pytest.mark.parametrize("kept", ["folder", "segments", CATALOGUE, "a segment", "nothing"])
def test_another_user_is_told_who_may_read(workers, kept):
    if os.name != "posix" or os.geteuid():
        pytest.skip("only root can become another user")
    above = Path(tempfile.mkdtemp())
    try:
        above.chmod(0o755)
        folder = above / "bank"
        make_bank(folder).close()
        paths = {"folder": folder, "segments": folder / "segments", CATALOGUE: folder / CATALOGUE}
        paths["a segment"] = next((folder / "segments").iterdir())
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
        if kept in paths:
            paths[kept].chmod(0o700)
        (is_there, load, open_to_write, open_to_read), status = workers.run("read_as_nobody", folder=str(folder))
        assert status == 0
        if kept == "nothing":
            assert is_there == "True"
            assert "can be written" in open_to_write
            assert "MemoryBank(3 documents" in open_to_read
            return
        assert ("nothing is damaged" in is_there) == (kept in ("folder", CATALOGUE)), is_there
        for said in (load, open_to_read):
            assert str(paths[kept]) in said
            assert "may not read" in said
            assert "nothing is damaged" in said
    finally:
        shutil.rmtree(above)


# Damage is not copied.


def flip(path: Path) -> None:
    """Change one bit of the last tensor of a file."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


COPIES = {
    "save": lambda bank, folder: bank.save(folder.with_name("copy")),
    "save over": lambda bank, folder: bank.save(folder.with_name("there")),
    "copy": lambda bank, folder: bank.copy(),
    "compact": lambda bank, folder: bank.folder.compact(),
}


@pytest.mark.parametrize(("mmap", "looked"), some([(True, True), (True, False), (False, False)], [(True, True)]))
@pytest.mark.parametrize("change", COPIES)
def test_damage_is_not_copied(tmp_path, change, mmap, looked):
    folder = tmp_path / "bank"
    bank = make_bank(folder)
    with bank.transaction():
        write(bank, "d", range(300, 330))
        write(bank, "e", range(400, 430))
    bank.delete("e")
    bank.close()
    make_bank(tmp_path / "there", "xyz").close()
    bank = MemoryBank.open(folder, mmap=mmap)
    if looked:  # what was in order when it was last read
        bank.copy()
    damaged = next(s.file.path for s in bank._table.storage.segments if s.num_live < s.num_slots)
    flip(damaged)
    with pytest.raises(ValueError, match=damaged.name):
        COPIES[change](bank, folder)
    assert not has_bank(tmp_path / "copy")
    bank.close()
    assert sorted(contents(MemoryBank.load(tmp_path / "there"))) == ["x", "y", "z"]
    with MemoryBank.open(folder) as bank:
        assert [info.document_id for info in bank.documents()] == ["a", "b", "c", "d"]
        with pytest.raises(ValueError, match=damaged.name):
            bank.folder.verify()


def test_a_damaged_segment_is_not_merged_and_what_was_written_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_storage, "SEGMENTS_TO_MERGE", 4)
    with make_bank(tmp_path) as bank:
        damaged = bank._table.storage.segments[0].file.path
        flip(damaged)
        with pytest.warns(UserWarning, match=f"not merged.*{damaged.name}"):
            write(bank, "d", range(300, 318))
        assert "d" in bank
        assert damaged.exists()
        with pytest.raises(ValueError, match=damaged.name):
            bank.folder.verify()
    with MemoryBank.open(tmp_path) as bank:
        assert [info.document_id for info in bank.documents()] == ["a", "b", "c", "d"]


def test_a_failed_merge_leaves_what_was_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_storage, "SEGMENTS_TO_MERGE", 4)
    with make_bank(tmp_path) as bank:
        with monkeypatch.context() as patch:
            patch.setattr("longmem.memory.folder.bank_folder.rewrite", no_room)
            with pytest.warns(UserWarning, match="not merged.*No space left"):
                write(bank, "d", range(300, 318))
        found = contents(bank)
        assert "d" in found
        write(bank, "e", range(400, 418))
        assert len(segment_files(tmp_path)) < 3
        assert contents(bank).items() > found.items()


# Copies of the object.


@pytest.mark.parametrize("twin_of", [copy.copy, copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_a_bank_on_disk_is_copied_as_its_folder_to_be_read(tmp_path, twin_of):
    with make_bank(tmp_path) as bank:
        twin = twin_of(bank)
        assert contents(twin) == contents(bank)
        assert not twin.folder.is_writable
        with pytest.raises(ValueError, match="read_only=True"):
            twin.delete("a")
        write(bank, "d", range(9))
        assert twin.folder.reload()
        view, shards = twin_of(bank.select(["a", "d"])), twin_of(BankShards([bank]))
        assert view.documents() == ["a", "d"]
        assert view.num_chunks == bank.select(["a", "d"]).num_chunks
        assert shards.num_tokens == bank.num_tokens
        with bank.transaction():
            write(bank, "e", range(9))
            with pytest.raises(ValueError, match="must not be inside a transaction"):
                twin_of(bank)
        again = twin_of(twin_of(bank))
        assert contents(again) == contents(bank)
        for each in (twin, again):
            each.close()
    with pytest.raises(ValueError, match="closed"):
        twin_of(bank)


WORKER = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
from longmem.memory import MemoryBank

class Lengths(Dataset):
    def __init__(self, bank): self.bank = bank
    def __len__(self): return 3
    def __getitem__(self, place): return self.bank.documents()[place].num_tokens

if __name__ == "__main__":
    with MemoryBank.open(sys.argv[1]) as bank:
        loader = DataLoader(Lengths(bank), num_workers=1, multiprocessing_context="spawn")
        print([int(each) for each in loader])
        bank.delete("a")
"""


@pytest.mark.slow
def test_a_spawned_data_worker_gets_a_bank(tmp_path):
    make_bank(tmp_path / "bank").close()
    (tmp_path / "script.py").write_text(WORKER)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "bank")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[18, 18, 18]\n", done.stderr
