"""A full disk, a quota, a disk that cannot be written: an error that says so, and the bank as it was."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from folder_banks import SETTINGS, contents, segment_files, write

from longmem.memory import MemoryBank
from longmem.memory.folder import disk_storage

NOT_WRITTEN = "`folder` must be a folder that can be written.*unharmed.*Free some room"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Return a file system of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount a small file system: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(place)], check=True)


def fill(place: Path, leave: int) -> Path:
    """Fill the disk except for so many bytes."""
    path = place / "ballast"
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
    with path.open("r+b") as file:
        file.truncate(max(0, path.stat().st_size // 4096 * 4096 - leave))
    return path


def make_bank(folder: Path) -> MemoryBank:
    bank = MemoryBank.create(folder, **SETTINGS)
    for position, name in enumerate("abc"):
        write(bank, name, range(100 * position, 100 * position + 38))
    return bank


CHANGES = {
    "add": lambda bank: write(bank, "d", range(1000, 1202)),
    "append": lambda bank: write(bank, "b", range(1000, 1202)),
    "replace": lambda bank: replace(bank, "a"),
    "rename": lambda bank: bank.rename("a", "long name " * 3000),
    "compact": lambda bank: bank.folder.compact(),
}


def replace(bank: MemoryBank, name: str) -> None:
    with bank.transaction():
        bank.delete(name)
        write(bank, name, range(1000, 1202))


@pytest.mark.parametrize("change", CHANGES)
def test_a_full_disk_leaves_the_last_commit_and_no_litter(small_disk, change):
    folder, failed = small_disk / "bank", set()
    bank = make_bank(folder)
    with bank.transaction():
        write(bank, "big", range(2000, 2202))
        write(bank, "small", range(3000, 3100))
    bank.delete("small")
    before = contents(bank)
    for leave in range(0, 120_000, 8192):
        ballast = fill(small_disk, leave)
        try:
            CHANGES[change](bank)
            ballast.unlink()
            break
        except ValueError as error:
            failed.add(str(error))
        assert contents(bank) == before
        assert segment_files(folder) == {s.file.path.name for s in bank._table.storage.segments}
        with MemoryBank.open(folder, read_only=True) as reader:
            reader.folder.verify()
            assert contents(reader) == before
        ballast.unlink()
        bank.folder.verify()
    else:
        CHANGES[change](bank)
    assert failed
    assert all(str(folder) in message and "Free some room" in message for message in failed)
    bank.folder.verify()
    write(bank, "after", range(5000, 5020))
    found = contents(bank)
    assert found != before
    bank.close()
    with MemoryBank.open(folder) as bank:
        bank.folder.verify()
        assert contents(bank) == found


def test_a_full_disk_keeps_what_a_save_would_replace(small_disk):
    make_bank(small_disk / "bank").close()
    before = contents(MemoryBank.load(small_disk / "bank"))
    other = MemoryBank(**SETTINGS)
    write(other, "other", range(1000, 1400))
    ballast = fill(small_disk, 60_000)
    for folder in (small_disk / "bank", small_disk / "new"):
        with pytest.raises(ValueError, match=NOT_WRITTEN):
            other.save(folder)
    assert contents(MemoryBank.load(small_disk / "bank")) == before
    with pytest.raises(ValueError, match="must be a saved memory bank"):
        MemoryBank.load(small_disk / "new")
    ballast.unlink()
    for folder in (small_disk / "bank", small_disk / "new"):
        other.save(folder)
        assert contents(MemoryBank.load(folder)) == contents(other)


def test_a_bank_is_not_made_on_a_full_disk_but_later(small_disk):
    ballast = fill(small_disk, 0)
    with pytest.raises(ValueError, match=NOT_WRITTEN):
        MemoryBank.create(small_disk / "bank", **SETTINGS)
    ballast.unlink()
    make_bank(small_disk / "bank").close()
    bank = MemoryBank.open(small_disk / "bank")
    bank.search(1, torch.ones(2, 1, 64), 3)
    ballast = fill(small_disk, 0)
    with pytest.raises(ValueError, match=NOT_WRITTEN):
        bank.close()  # it counts reads
    with pytest.raises(ValueError, match=NOT_WRITTEN):
        MemoryBank.create(small_disk / "another", **SETTINGS)
    ballast.unlink()
    with MemoryBank.open(small_disk / "bank") as bank:  # the lock is free
        bank.folder.verify()


def test_what_waits_within_a_transaction_meets_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_storage, "SEGMENT_BYTES", 1000)
    with make_bank(tmp_path) as bank:
        before = contents(bank)

        def full(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        def write_much(patch: pytest.MonkeyPatch) -> None:
            with bank.transaction():
                write(bank, "d", range(1000, 1200))
                patch.setattr(disk_storage, "write_tensors", full)
                write(bank, "e", range(1200, 1400))

        with monkeypatch.context() as patch, pytest.raises(ValueError, match=NOT_WRITTEN):
            write_much(patch)
        assert contents(bank) == before
        assert segment_files(tmp_path) == {s.file.path.name for s in bank._table.storage.segments}


def test_a_disk_that_cannot_be_written_is_read(small_disk):
    bank = make_bank(small_disk / "bank")
    found = contents(bank)
    bank.close()
    remount(small_disk, "ro")
    try:
        with MemoryBank.open(small_disk / "bank", read_only=True) as reader:
            assert contents(reader) == found
            assert not reader.folder.reload()
            reader.folder.verify()
        assert contents(MemoryBank.load(small_disk / "bank")) == found
        for write_to in (MemoryBank.open, MemoryBank.load(small_disk / "bank").save):
            with pytest.raises(ValueError, match="can be written"):
                write_to(small_disk / "bank")
        with pytest.raises(ValueError, match="can be written"):
            MemoryBank.create(small_disk / "new", **SETTINGS)
    finally:
        remount(small_disk, "rw")
    with MemoryBank.open(small_disk / "bank") as bank:
        write(bank, "d", range(1000, 1009))


def test_a_folder_without_permission_to_write_is_read(tmp_path):
    bank = make_bank(tmp_path / "bank")
    found = contents(bank)
    bank.close()
    places = [*(tmp_path / "bank").rglob("*"), tmp_path / "bank"]
    for path in places:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        if os.access(tmp_path / "bank", os.W_OK):
            pytest.skip("this user may write everywhere")
        with MemoryBank.open(tmp_path / "bank", read_only=True) as reader:
            assert contents(reader) == found
        with pytest.raises(ValueError, match="can be written"):
            MemoryBank.open(tmp_path / "bank")
    finally:
        for path in places:
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("max_bytes", [20_000, 100_000, 400_000])
def test_a_quota_leaves_the_last_commit(workers, tmp_path, max_bytes):
    make_bank(tmp_path / "bank").close()
    reports, status = workers.run("fill_under_quota", folder=str(tmp_path / "bank"), max_bytes=max_bytes)
    assert status == 0, reports
    (message, in_memory), on_disk, after = reports
    assert str(tmp_path / "bank") in message
    assert "can be written, with room" in message
    assert in_memory == on_disk
    assert after == [*on_disk, "after"]
    with MemoryBank.open(tmp_path / "bank") as bank:
        bank.folder.verify()
        assert list(contents(bank)) == after
    shutil.rmtree(tmp_path / "bank")
