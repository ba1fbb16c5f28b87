"""A bank that changes its index, in memory and in a folder; and what it knows of the bytes in that folder."""

import contextlib

import pytest
import torch

from longmem.memory import MemoryBank
from longmem.memory.index import FlatIndex, approximate


def draw(tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(2, tokens, 6, generator=generator)] for _ in range(2)]


QUERIES = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))


def test_another_index_answers_from_then_on(monkeypatch):
    monkeypatch.setattr(approximate, "EXACT_BELOW", 10)
    bank = MemoryBank(memory_layers=[5], chunk_size=2, index="flat")
    bank.add("a", *draw(400))
    exact = bank.search(5, QUERIES, 8)
    version, generation = bank.version, bank.generation
    bank.use_index("ivf:probed_share=0.02")
    assert bank.index == bank.empty_like().index == "ivf:probed_share=0.02"
    assert bank.search(5, QUERIES, 8).scores.tolist() != exact[0].tolist()
    assert bank.version != version
    assert bank.generation == generation  # rows found before are still good
    bank.use_index("flat")
    assert isinstance(bank._table.index_of(0), FlatIndex)
    torch.testing.assert_close(bank.search(5, QUERIES, 8), exact)


def test_the_folder_remembers_the_index_and_readers_take_it_over(tmp_path):
    with MemoryBank.create(tmp_path, memory_layers=[5], chunk_size=2) as bank:
        bank.add("a", *draw(9))
        reader = MemoryBank.open(tmp_path, read_only=True)
        bank.use_index("flat")
        assert reader.index == "auto"
        assert reader.folder.reload()
        assert reader.index == "flat"
        reader.close()
    with MemoryBank.open(tmp_path, read_only=True) as again:
        assert again.index == "flat"
        with pytest.raises(ValueError, match="read_only"):
            again.use_index("exact")
        assert again.index == "flat"


def test_a_change_of_index_is_undone_with_its_transaction(tmp_path):
    bank = MemoryBank.create(tmp_path, memory_layers=[5], chunk_size=2, index="flat")
    bank.add("a", *draw(9))
    with contextlib.suppress(RuntimeError), bank.transaction():
        bank.use_index("exact")
        assert bank.index == "exact"
        raise RuntimeError
    assert bank.index == "flat"
    assert isinstance(bank._table.index_of(0), FlatIndex)
    with pytest.raises(ValueError, match="Did you mean `flat`"):
        bank.use_index("flta")
    bank.close()


def test_search_keys_are_the_means_of_chunks():
    bank = MemoryBank(memory_layers=[5], chunk_size=2)
    with pytest.raises(ValueError, match="holds chunks, got an empty one"):
        bank.search_keys(5)
    keys, values = draw(9)
    bank.add("a", keys, values)
    torch.testing.assert_close(bank.search_keys(5)[:, :4], keys[0][:, :8].unflatten(1, (4, 2)).mean(dim=2))
    torch.testing.assert_close(bank.search_keys(5)[:, 4], keys[0][:, 8])  # a chunk of one token
    bank.search_keys(5).zero_()  # a copy
    assert bank.search_keys(5).any()


def test_dead_bytes_are_those_that_compact_gives_back(tmp_path):
    with MemoryBank.create(tmp_path, memory_layers=[5], chunk_size=2) as bank:
        with bank.transaction():
            bank.add("small", *draw(100))
            bank.add("large", *draw(900, seed=1))
        assert bank.folder.num_dead_bytes == 0
        bank.delete("small")
        dead, before = bank.folder.num_dead_bytes, bank.nbytes
        assert dead == pytest.approx(before / 10, rel=0.01)
        bank.folder.compact()
        assert before - bank.nbytes == pytest.approx(dead, rel=0.05)
        assert bank.folder.num_dead_bytes == 0
        assert {path.name for path in bank.folder.verify()} == {
            "catalogue.sqlite",
            *(path.name for path in (tmp_path / "segments").iterdir()),
        }
