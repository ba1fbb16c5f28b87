"""Where a bank can be, and how it can be used there: any path, from threads, under inference mode, with little memory."""

import copy
import pickle
import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from folder_banks import SETTINGS, contents, write
from named_encoder import NamedEncoder

from longmem.memory import MemoryBank
from longmem.memory.memorize import Memorized


def make_bank(folder, **options) -> MemoryBank:
    bank = MemoryBank.create(folder, **SETTINGS | options)
    for position, name in enumerate("abc"):
        write(bank, name, range(100 * position, 100 * position + 18))
    return bank


@pytest.mark.parametrize(
    "name",
    ["a b", "bänk 銀行 🏦", "a#b", "a?mode=ro", "100%", "%41", "a&b=c;d", "'\"", "a\\b", "new\nline", ":memory:"],
)
def test_any_name_of_a_folder_will_do(tmp_path, name):
    with make_bank(tmp_path / name) as bank:
        found = contents(bank)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with MemoryBank.open(str(tmp_path / name)) as bank:
        assert contents(bank) == found
        bank.delete("a")
        bank.folder.compact()
    assert list(contents(MemoryBank.load(tmp_path / name))) == ["b", "c"]


def test_a_relative_path_stays_the_same_folder_when_the_process_goes_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    bank = make_bank("bank")
    reader = MemoryBank.open(Path("bank"), read_only=True)
    monkeypatch.chdir(tmp_path / "there")
    with bank, reader:
        bank.delete("a")
        write(bank, "d", range(300, 330))
        bank.folder.compact()
        bank.folder.verify()
        bank.save("bank")  # another folder, in this place
        assert reader.folder.reload()
        assert contents(reader) == contents(bank)
        bank.save(tmp_path / "here" / "bank")  # its own folder: nothing to do
        found = contents(bank)
    assert contents(MemoryBank.load(tmp_path / "here" / "bank")) == contents(MemoryBank.load("bank")) == found


def test_a_linked_folder_is_the_folder_and_has_its_lock(tmp_path):
    make_bank(tmp_path / "real").close()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    with MemoryBank.open(tmp_path / "link") as bank:
        with pytest.raises(ValueError, match="writing the bank"):
            MemoryBank.open(tmp_path / "real")
        bank.delete("a")
        bank.save(tmp_path / "real")  # itself
    assert list(contents(MemoryBank.load(tmp_path / "real"))) == ["b", "c"]


@pytest.mark.parametrize("move", [shutil.copytree, shutil.move])
def test_a_bank_that_was_copied_or_moved_is_opened_there(tmp_path, move):
    with make_bank(tmp_path / "a") as bank:
        found = contents(bank)
    move(tmp_path / "a", tmp_path / "b")
    if move is shutil.copytree:
        shutil.rmtree(tmp_path / "a")
    with MemoryBank.open(tmp_path / "b") as bank:
        assert contents(bank) == found
        write(bank, "a", range(18, 40))
        bank.folder.verify()


def memorize_in_two_pieces(model, bank, text_or_ids, document_id, **options):
    write(bank, document_id, text_or_ids[:13])
    write(bank, document_id, text_or_ids[13:])
    return Memorized.of(len(text_or_ids), len(text_or_ids), 0)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_bank_that_was_opened_and_read_under_inference_mode_is_written_outside(tmp_path, mode):
    make_bank(tmp_path).close()
    with mode():
        bank = MemoryBank.open(tmp_path, device="cpu")
        contents(bank)
    with bank:
        bank.delete("c")
        write(bank, "a", range(18, 21))
        write(bank, "a", range(21, 60))
        write(bank, "d", range(300, 400))
        bank.delete("b")
        with mode():
            write(bank, "e", range(400, 450))
            bank.delete("d")
            bank.folder.compact()
            with mock.patch("longmem.memory.bank.memorize", memorize_in_two_pieces):
                bank.update("e", range(450, 480), model=NamedEncoder())
        write(bank, "e", range(480, 483))
        bank.rename("e", "f")
        bank.delete("a")
        bank.folder.verify()
        found = contents(bank)
    assert contents(MemoryBank.load(tmp_path)) == found


def test_threads_read_at_once(tmp_path):
    with make_bank(tmp_path) as bank:
        found = contents(bank)
    for read_only in (True, False):
        with MemoryBank.open(tmp_path, read_only=read_only) as bank:
            results, errors, start = [], [], threading.Barrier(6)

            def read(bank=bank, results=results, errors=errors, start=start):
                try:
                    start.wait()
                    results.append(contents(bank))
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=read) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors
            assert results == [found] * 6


def test_a_bank_in_memory_is_copied_and_pickled(tmp_path):
    with make_bank(tmp_path) as on_disk:
        found = contents(on_disk)
    bank = MemoryBank.load(tmp_path)
    bank.ready_for(NamedEncoder())  # a bank knows its reader, which must not go along
    for twin in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert contents(twin) == found
        write(twin, "d", range(300, 309))
        assert "d" not in bank


def resident_bytes(folder: Path) -> int:
    """Return how much of the folder's mapped segments is resident for this process."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0] and ":" not in line.split(" ", 1)[0]:
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
def test_without_mapping_what_was_read_does_not_stay(tmp_path):
    bank = MemoryBank.create(tmp_path, memory_layers=[1], chunk_size=16, index="exact")
    for number in range(4):
        tokens = torch.randn(2, 16 * 256, 64)
        bank.add(str(number), [tokens], [tokens])
    bank.close()
    peaks = {}
    read = {}
    for mapped in (True, False):
        with MemoryBank.open(tmp_path, read_only=True, mmap=mapped) as bank:
            order, peak = torch.randperm(bank.num_chunks, generator=torch.Generator().manual_seed(0)), 0
            found = bank.search(1, torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)), 4)
            read[mapped] = [found.rows, found.scores]
            for rows in order.split(64):
                read[mapped] += bank.gather(1, rows.expand(2, -1), bank.generation)
                peak = max(peak, resident_bytes(tmp_path))
            peaks[mapped] = peak
            assert bank.folder.verify()
    assert peaks[True] > 2**22
    assert peaks[False] == 0
    assert all(torch.equal(one, two) for one, two in zip(read[True], read[False], strict=True))
