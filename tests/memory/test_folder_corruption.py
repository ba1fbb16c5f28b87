"""Damage to any file is refused with the file's name, or harmless: all answers are the same."""

import random
import shutil
import sqlite3
from collections import Counter
from pathlib import Path

import pytest
import torch
from folder_banks import SETTINGS, contents, segment_files, write

from longmem.memory import MemoryBank
from longmem.memory.folder.catalogue import CATALOGUE


@pytest.fixture(scope="module")
def bank_folder(tmp_path_factory) -> Path:
    """Return a bank with several segments, short chunks, texts, tags, a pin, and free pages in its catalogue."""
    folder = tmp_path_factory.mktemp("bank") / "bank"
    with MemoryBank.create(folder, **SETTINGS, capacity_tokens=140) as bank:
        for position, name in enumerate("abcd"):
            write(bank, name, range(100 * position, 100 * position + 23), tags=[f"tag {name}", "all"], segment="new")
        write(bank, "b", range(123, 170))  # evicts
        write(bank, "without text", range(1000, 1009), with_text=False)
        bank.pin("c")
        bank.delete("d")
        bank.rename("a", "ä")
    assert len(segment_files(folder)) > 2
    return folder


@pytest.fixture(scope="module")
def answers(bank_folder) -> dict:
    with MemoryBank.open(bank_folder, read_only=True) as bank:
        return contents(bank)


@pytest.fixture
def folder(bank_folder, tmp_path) -> Path:
    return Path(shutil.copytree(bank_folder, tmp_path / "bank"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def outcome(folder: Path, answers: dict, damaged: Path | None, *, read_only: bool = True) -> str:
    """Return "refused", by an error that names the file, or "harmless", where all answers are the same."""
    names = [CATALOGUE] if damaged is None else [damaged.name]
    try:
        with MemoryBank.open(folder, read_only=read_only) as bank:
            bank.folder.verify()
            assert contents(bank) == answers
            return "harmless"
    except ValueError as error:
        refusal = error
    assert type(refusal) is ValueError, repr(refusal)
    assert any(name in str(refusal) for name in names), str(refusal)
    return "refused"


def flip(path: Path, place: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ mask]))


def flip_many(folder: Path, bank_folder: Path, answers: dict, seed: int, count: int) -> Counter:
    """Change so many bytes, one at a time, as many in the catalogue as in the segments."""
    chosen, outcomes = random.Random(seed), Counter()
    catalogue, *segments = files_of(folder)
    assert catalogue.name == CATALOGUE
    for number in range(count):
        path = catalogue if number % 2 else chosen.choice(segments)
        # The first kilobyte of a segment is its header.
        highest = path.stat().st_size if number % 3 else min(1024, path.stat().st_size)
        place = chosen.randrange(highest)
        if number % 4 == 1:  # a good part of a catalogue is free pages, of zeros
            place = chosen.choice([place for place, byte in enumerate(path.read_bytes()) if byte])
        flip(path, place, chosen.randrange(1, 256))
        kind = outcome(folder, answers, path)
        outcomes[path.name.split("-")[0], kind] += 1
        shutil.copyfile(bank_folder / path.relative_to(folder), path)
    return outcomes


def test_a_changed_byte_is_refused_or_harmless(folder, bank_folder, answers):
    outcomes = flip_many(folder, bank_folder, answers, 0, 60)
    assert outcomes["segment", "harmless"] == 0
    assert outcomes["segment", "refused"] == 30
    assert outcomes[CATALOGUE, "refused"] > 5
    assert outcome(folder, answers, None) == "harmless", "the files are as they were"


@pytest.mark.slow
def test_many_changed_bytes_are_refused_or_harmless(folder, bank_folder, answers):
    outcomes = flip_many(folder, bank_folder, answers, 1, 1500)
    print(outcomes)
    assert outcomes["segment", "harmless"] == 0
    assert outcomes.total() == 1500


# Bytes that say how SQLite must read the file: page size, journal, reserved bytes, encoding, and the like.
@pytest.mark.parametrize("masks", [(3, 255), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_every_byte_of_the_header_of_the_catalogue(folder, bank_folder, answers, masks):
    path, outcomes = folder / CATALOGUE, Counter()
    for place in range(100):
        for mask in masks:
            flip(path, place, mask)
            kind = outcome(folder, answers, path)
            outcomes[kind] += 1
            assert kind == "refused" or place not in (*range(18), 21, 22, 23), (place, mask)
            shutil.copyfile(bank_folder / CATALOGUE, path)
            for left in folder.glob(f"{CATALOGUE}-*"):
                raise AssertionError(f"byte {place} ^ {mask} left {left.name}")
    assert min(outcomes.values()) > 10


def test_a_catalogue_that_keeps_a_log_beside_it_is_refused(folder):
    with sqlite3.connect(folder / CATALOGUE) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    with pytest.raises(ValueError, match=r"catalogue\.sqlite.*journal"):
        MemoryBank.open(folder, read_only=True)


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize(
    "damage", ["cut by one", "cut in half", "emptied", "one byte more", "a page more", "missing", "zeros", "folder"]
)
def test_a_file_that_was_cut_or_grew_or_is_gone_is_refused(folder, bank_folder, answers, damage, read_only):
    for path in files_of(folder):
        content = path.read_bytes()
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage != "missing":
            path.write_bytes(
                {
                    "cut by one": content[:-1],
                    "cut in half": content[: len(content) // 2],
                    "emptied": b"",
                    "one byte more": content + b"\0",
                    "a page more": content + content[:4096],
                    "zeros": bytes(len(content)),
                }[damage]
            )
        kind = outcome(folder, answers, path, read_only=read_only)
        # SQLite does not look at what follows the pages that its header counts, and reads zeros where a page is cut.
        harmless = ("cut by one", "one byte more", "a page more") if path.name == CATALOGUE else ()
        assert kind == "refused" or damage in harmless, path
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)
        assert {path.name for path in files_of(folder)} == {path.name for path in files_of(bank_folder)}
    assert outcome(folder, answers, None, read_only=read_only) == "harmless"


def test_files_that_were_swapped_are_refused(folder, answers):
    segments = sorted((folder / "segments").iterdir())
    for one, other in zip(segments, segments[1:], strict=False):
        contents_of = one.read_bytes(), other.read_bytes()
        one.write_bytes(contents_of[1])
        other.write_bytes(contents_of[0])
        with pytest.raises(ValueError, match=f"{one.name}|{other.name}"), MemoryBank.open(folder) as bank:
            bank.folder.verify()
        one.write_bytes(contents_of[0])
        other.write_bytes(contents_of[1])
    assert outcome(folder, answers, None) == "harmless"


def test_segments_of_one_size_that_were_swapped_are_found_at_the_first_search(tmp_path):
    with MemoryBank.create(tmp_path, **SETTINGS) as bank:
        write(bank, "a", range(8))
        write(bank, "b", range(100, 108))
    one, other = sorted((tmp_path / "segments").iterdir())
    contents_of = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents_of[1])
    other.write_bytes(contents_of[0])
    with MemoryBank.open(tmp_path) as bank, pytest.raises(ValueError, match=one.name):
        bank.search(1, torch.ones(2, 1, 64), 1)


def test_the_catalogue_of_another_bank_is_refused(folder, answers, tmp_path):
    with MemoryBank.create(tmp_path / "other", **SETTINGS) as bank:
        write(bank, "a", range(8))
    shutil.copyfile(tmp_path / "other" / CATALOGUE, folder / CATALOGUE)
    with pytest.raises(ValueError, match="segment-"):
        MemoryBank.open(folder)


def test_what_is_not_of_the_bank_is_left_alone(folder, answers):
    (folder / "notes.txt").write_text("mine")
    (folder / "segments" / "notes.txt").write_text("mine")
    (folder / "lock").write_text("something")
    assert outcome(folder, answers, None, read_only=False) == "harmless"
    assert (folder / "notes.txt").read_text() == (folder / "segments" / "notes.txt").read_text() == "mine"
