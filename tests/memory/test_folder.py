"""A bank in a folder: the same answers as one in memory, changes that count together, and nothing left of what is gone."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from folder_banks import SETTINGS, SIZES, RandomSteps, contents, keys_and_values, segment_files, write
from kept_fast import fast

from longmem.memory import MemoryBank
from longmem.memory.folder import bank_folder, disk_storage, tensor_file
from longmem.memory.folder.place import Place


def make_bank(folder, **options) -> MemoryBank:
    bank = MemoryBank.create(folder, **SETTINGS | options)
    for position, name in enumerate("abc"):
        write(bank, name, range(100 * position, 100 * position + 18), tags=[f"tag {name}"])
    return bank


@pytest.mark.parametrize("seed", fast(1, range(4)))
def test_random_steps_leave_what_a_bank_in_memory_holds(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(disk_storage, "SEGMENTS_TO_MERGE", 3)
    monkeypatch.setattr(disk_storage, "SEGMENT_BYTES", 30_000)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    on_disk, in_memory = RandomSteps(seed, tmp_path / "bank"), RandomSteps(seed)
    for number in range(60):
        before = contents(in_memory.bank)
        on_disk.step()
        in_memory.step()
        if number % 5 == 0:
            assert contents(on_disk.bank) == contents(in_memory.bank)
            with MemoryBank.open(tmp_path / "bank", read_only=True) as reader:
                reader.folder.verify()
                assert contents(reader) == contents(in_memory.bank)
    assert contents(in_memory.bank) != before or len(before) > 3
    assert segment_files(tmp_path / "bank") == {s.file.path.name for s in on_disk.bank._table.storage.segments}


def test_many_new_objects_are_not_looked_through_and_what_others_froze_stays_frozen():
    code = (
        "import gc\n"
        "from longmem.memory.folder.records import MANY_OBJECTS, without_collections\n"
        "runs, own = [], [[]]\n"
        "gc.callbacks.append(lambda phase, info: runs.append((phase, info['generation'])))\n"
        "for frozen in (False, True):\n"
        "    if frozen: gc.freeze()\n"
        "    runs.clear()\n"
        "    with without_collections():\n"
        "        kept = [[number] for number in range(2 * MANY_OBJECTS)]\n"
        "        assert not runs\n"
        "    seen = any(each is own for each in gc.get_objects())\n"  # it does not list what is frozen
        "    assert gc.isenabled() and seen != frozen\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Transactions.


def change_and_raise(bank: MemoryBank, error: type[BaseException]) -> None:
    before = contents(bank)
    with bank.transaction():
        bank.delete("a")
        write(bank, "new", range(500, 520))
        with bank.transaction():
            bank.rename("b", "other")
            write(bank, "c", range(520, 530))
        bank.pin("c")
        assert contents(bank) != before
        raise error


def test_a_transaction_that_fails_leaves_memory_and_disk_at_the_last_commit(tmp_path):
    with make_bank(tmp_path) as bank:
        before = contents(bank)
        for error in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(error):
                change_and_raise(bank, error)
            assert contents(bank) == before
            with MemoryBank.open(tmp_path, read_only=True) as reader:
                assert contents(reader) == before
        bank.folder.verify()
        write(bank, "new", range(500, 520))
        assert contents(bank) != before


def test_an_inner_block_is_a_part_of_the_outer_one(tmp_path):
    with make_bank(tmp_path) as bank, MemoryBank.open(tmp_path, read_only=True) as reader:
        with bank.transaction():
            with bank.transaction():
                bank.delete("a")
            assert not reader.folder.reload()
            with contextlib.suppress(RuntimeError), bank.transaction():
                bank.delete("b")
                raise RuntimeError
        assert reader.folder.reload()
        assert list(contents(reader)) == list(contents(bank)) == ["c"]


def test_an_interrupt_while_files_are_written_leaves_the_last_commit(tmp_path, monkeypatch):
    with make_bank(tmp_path) as bank:
        before = contents(bank)

        steps = (disk_storage, "write_tensors"), (Place, "sync"), (bank_folder.records, "put_document")
        for place, name in steps:
            with monkeypatch.context() as patch:
                step = mock.Mock(side_effect=[KeyboardInterrupt, None])  # what is undone then goes through
                patch.setattr(place, name, step)
                with pytest.raises(KeyboardInterrupt):
                    write(bank, "a", range(300, 330))
            assert contents(bank) == before
        bank.folder.verify()
        write(bank, "a", range(300, 330))
        assert contents(bank)["a"][0].num_tokens == 48
        with MemoryBank.open(tmp_path, read_only=True) as reader:
            assert contents(reader) == contents(bank)


def test_a_bank_in_memory_undoes_nothing():
    bank = MemoryBank(**SETTINGS)
    for position, name in enumerate("abc"):
        write(bank, name, range(100 * position, 100 * position + 18))
    with pytest.raises(RuntimeError):
        change_and_raise(bank, RuntimeError)
    assert list(contents(bank)) == ["other", "c", "new"]


@pytest.mark.parametrize("ends", [lambda bank: bank.folder.compact(), MemoryBank.close])
def test_what_would_end_a_transaction_is_refused_inside_it(tmp_path, ends):
    with make_bank(tmp_path) as bank:
        before = contents(bank)

        def end_inside() -> None:
            with bank.transaction():
                bank.delete("a")
                ends(bank)

        with pytest.raises(ValueError, match="must not be called inside a transaction"):
            end_inside()
        assert contents(bank) == before
        with MemoryBank.open(tmp_path, read_only=True) as reader:
            assert contents(reader) == before


def test_a_closed_bank_says_so(tmp_path):
    bank = make_bank(tmp_path)
    bank.close()
    bank.close()
    files = segment_files(tmp_path)
    for use in (lambda: write(bank, "d", range(9)), bank.folder.compact, bank.folder.verify, bank.folder.reload):
        with pytest.raises(ValueError, match="closed"):
            use()
    assert segment_files(tmp_path) == files


# Documents that are all gone, or were never whole.


@pytest.mark.parametrize("index", ["exact", "flat", "ivf", "hnsw", "pq", "auto"])
def test_a_bank_whose_documents_are_all_gone_answers_and_goes_on(tmp_path, index):
    with make_bank(tmp_path, index=index) as bank:
        bank.clear()
    for _ in range(2):
        with MemoryBank.open(tmp_path) as bank:
            for layer, (heads, dim, _) in SIZES.items():
                rows, scores, *_ = bank.search(layer, torch.ones(heads, 2, dim), 3)
                assert torch.isneginf(scores).all()
                assert (rows == -1).all()
            with pytest.raises(ValueError, match="sizes|heads|shape"):
                bank.add("wrong", [torch.ones(3, 8, 2)] * 2, [torch.ones(3, 8, 2)] * 2)
            bank.folder.compact()
            bank.folder.verify()
    with MemoryBank.open(tmp_path) as bank:
        assert not segment_files(tmp_path)
        write(bank, "d", range(9))
        assert contents(bank)["d"][0].num_chunks == 3


def test_a_bank_of_short_chunks_keeps_the_sizes_it_has_seen(tmp_path):
    bank = MemoryBank(**SETTINGS)
    bank.add("a", *keys_and_values(torch.arange(3)))
    bank.save(tmp_path)
    loaded = MemoryBank.load(tmp_path)
    for each in (bank, loaded):
        with pytest.raises(ValueError, match="heads|sizes|shape"):
            each.append("a", [torch.ones(3, 8, 2)] * 2, [torch.ones(3, 8, 2)] * 2)


# What compact leaves.


def bytes_of(token_ids) -> list[bytes]:
    """Return what identifies tokens in a file: ids, text, and of every layer the keys and values of whole chunks."""
    ids = torch.tensor(token_ids)
    keys, values = keys_and_values(ids)
    chunks = [tensor[head, :4].half().numpy().tobytes() for tensor in keys + values for head in range(len(tensor))]
    means = [tensor[head, :4].mean(dim=0).numpy().tobytes() for tensor in keys for head in range(len(tensor))]
    text = "".join(f"wörd{token} " for token in token_ids)
    return [ids.int().numpy().tobytes(), text.encode(), *chunks, *means]


def files_with(folder: Path, wanted: bytes) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and wanted in path.read_bytes()]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("reopen", [False, True])
def test_compact_leaves_no_byte_of_what_was_deleted_or_evicted(tmp_path, reopen):
    bank = make_bank(tmp_path, capacity_tokens=164)
    evicted = bytes_of(range(4))
    assert all(files_with(tmp_path, wanted) for wanted in evicted)
    with bank.transaction():  # into one file with what stays
        write(bank, "secret name", range(9_000, 9_022))
        write(bank, "old", range(7_000, 7_004), tags=["secret tag"])
        write(bank, "c", range(218, 300))
    gone = [*bytes_of(range(9_000, 9_004)), *bytes_of(range(7_000, 7_004)), b"secret name", b"secret tag"]
    gone += bytes_of(range(9_000, 9_022))[:2]
    assert all(files_with(tmp_path, wanted) for wanted in gone)
    assert bank.info("a").num_chunks == 4, "the bank was full, so the first chunk was evicted"
    bank.delete("secret name")
    bank.delete("old")
    for wanted in (evicted, gone):
        assert any(files_with(tmp_path, each) for each in wanted), "without compact the files stay"
    if reopen:
        bank.close()
        bank = MemoryBank.open(tmp_path)
    found, size = contents(bank), size_of(tmp_path)
    bank.folder.compact()
    for wanted in (*gone, *evicted):
        assert files_with(tmp_path, wanted) == []
    assert files_with(tmp_path, bytes_of(range(218, 222))[1])
    assert size_of(tmp_path) < size
    assert contents(bank) == found
    bank.folder.verify()
    bank.close()
    with MemoryBank.open(tmp_path, read_only=True) as bank:
        assert contents(bank) == found


def test_a_bank_with_more_files_than_may_be_open_is_not_called_damaged(tmp_path, monkeypatch):
    MemoryBank.create(tmp_path, **SETTINGS).close()
    with MemoryBank.open(tmp_path) as bank:
        write(bank, "a", range(8))

    def refuse(*_args, **_options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(tensor_file.weakref, "finalize", refuse)  # right after the file is opened
    with pytest.raises(ValueError, match=r"more files than this process may open.*nothing is damaged.*ulimit"):
        MemoryBank.open(tmp_path, read_only=True, mmap=False)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc/self/fd")
def test_mapped_segments_keep_no_file_open(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_storage, "SEGMENTS_TO_MERGE", 100)
    with MemoryBank.create(tmp_path, **SETTINGS) as bank:
        for number in range(12):
            write(bank, str(number), range(100 * number, 100 * number + 8))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with MemoryBank.open(tmp_path, read_only=True) as bank:
        found = contents(bank)
        assert len(bank._table.storage.segments) == 12
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1  # the catalogue
    with MemoryBank.open(tmp_path, read_only=True, mmap=False) as bank:
        assert contents(bank) == found
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 13
