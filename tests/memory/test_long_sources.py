"""The source of a long document in a folder: let go of once it is there, and read in parts until somebody asks for all."""

import re
import sys

import pytest
import torch
from folder_banks import SETTINGS, contents, write

from longmem.memory import MemoryBank
from longmem.memory.folder import disk_storage
from longmem.memory.folder.bank_folder import storage_of
from longmem.memory.folder.catalogue import Catalogue
from longmem.memory.folder.tensor_file import TensorFile, write_tensors
from longmem.memory.rows import documents
from longmem.memory.rows.documents import Source, StoredSource

PARTS = [(0, 30), (30, 31), (31, 44), (44, 61)]


@pytest.fixture(autouse=True)
def all_are_long(monkeypatch):
    monkeypatch.setattr(documents, "LONG", 8)


def held(bank: MemoryBank):
    return bank._table.ledger.documents["a"].source_or_stored


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("is_reopened", [True, False])
def test_parts_of_a_long_source_are_those_of_one_in_memory(tmp_path, with_text, is_reopened):
    known, bank = MemoryBank(**SETTINGS), MemoryBank.create(tmp_path / "bank", **SETTINGS)
    for start, stop in PARTS:
        write(known, "a", range(start, stop), with_text=with_text)
        if is_reopened and start == PARTS[2][0]:
            bank.close()
            bank = MemoryBank.open(tmp_path / "bank")
        with bank.transaction():
            middle = (start + stop + 1) // 2
            for part in (range(start, middle), range(middle, stop)):
                if part:
                    write(bank, "a", part, with_text=with_text)
            for low in (1, max(start - 1, 1), middle, stop):  # what waits for the commit is there, too
                for high in (low, middle, stop + 9):
                    assert bank.text("a", low, high) == known.text("a", low, high)
                assert torch.equal(bank.token_ids("a", low), known.token_ids("a", low))
        assert isinstance(held(bank), StoredSource)
        assert held(bank).fresh.num_tokens == 0
    assert bank.text("a") == known.text("a")
    write(bank, "a", [61], with_text=with_text)
    assert isinstance(held(bank), Source)  # somebody has asked for all of it, and will again
    assert not with_text or contents(bank)["a"][2] == list(range(62))
    bank.folder.verify()
    bank.close()


def test_after_a_commit_that_failed_a_long_source_is_that_of_the_last(tmp_path, monkeypatch):
    with MemoryBank.create(tmp_path / "bank", **SETTINGS) as bank:
        write(bank, "a", range(20))
        for where in ((disk_storage.DiskStorage, "flush"), (Catalogue, "describe")):
            with monkeypatch.context() as patched:
                patched.setattr(*where, lambda *given: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    write(bank, "a", range(20, 33))
            assert bank.token_ids("a", 1).tolist() == list(range(1, 20))
            write(bank, "b", range(3))
            bank.delete("b")
        write(bank, "a", range(20, 33))
        assert isinstance(held(bank), StoredSource)
        assert contents(bank)["a"][2] == list(range(33))


def test_a_full_bank_lets_go_of_the_start_of_a_long_source(tmp_path):
    with MemoryBank.create(tmp_path / "bank", **SETTINGS, capacity_tokens=40) as bank:
        for start in range(0, 200, 25):
            write(bank, "a", range(start, start + 25))
        assert contents(bank)["a"][2] == list(range(160, 200))
        bank.folder.compact()
        write(bank, "a", range(200, 203))
        assert contents(bank)["a"][2] == list(range(164, 203))


def test_no_more_waits_for_its_file_than_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_storage, "SEGMENT_BYTES", 20_000)
    with MemoryBank.create(tmp_path / "bank", **SETTINGS) as bank, bank.transaction():
        for start in range(0, 240, 12):
            write(bank, "a", range(start, start + 12))
            waiting = [each.waiting for each in storage_of(bank._table).segments if each.waiting is not None]
            assert sum(tensor.nbytes for layers in waiting for layer in layers for tensor in layer) <= 20_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
@pytest.mark.parametrize("check", [False, True])
def test_what_was_checked_as_a_whole_stays_in_no_memory(tmp_path, check):
    tensors = {"a": torch.arange(2**20).view(1, 2**10, 2**10), "b": torch.ones(1, 2**18)}
    with (tmp_path / "file").open("xb") as file:
        digests = write_tensors(file, tensors)
        num_bytes = file.tell()
    read, into = TensorFile(tmp_path / "file", num_bytes, digests), torch.empty(2**10, 2**10, dtype=torch.int64)
    for _ in range(2):
        read.take("a", torch.arange(2**10), into, check)
        assert torch.equal(into, tensors["a"][0])
        with open("/proc/self/smaps") as maps:
            part = maps.read().split(str(tmp_path / "file"))[1]
        resident = int(re.search(r"Rss: +(\d+) kB", part)[1]) * 1024
        assert resident < 2**17 if check else resident > 2**22
    assert torch.equal(read.tensor("b"), tensors["b"])
