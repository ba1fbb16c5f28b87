"""The keys at the smallest distance: by every index and storage, of a selection, of shards, and beside who writes."""

import pytest
import torch

from longmem import MemoryBank
from longmem.memory import BankShards
from longmem.memory.index import approximate
from longmem.memory.visibility import reading_as

HEADS, DIM, SIZE = 2, 8, 4


def some_keys(tokens, seed):
    """Return keys as attention has them: far from zero, some much longer than others."""
    drawn = torch.Generator().manual_seed(seed)
    keys = torch.randn(HEADS, tokens, DIM, generator=drawn)
    return 3 + keys * (0.3 + 2 * torch.rand(1, tokens, 1, generator=drawn))


def make(sizes=(40, 24, 60, 7, 48), first=0, **options):
    bank = MemoryBank(**{"memory_layers": [5], "chunk_size": SIZE, "storage_dtype": "float32", **options})
    for number, tokens in enumerate(sizes, first):
        keys = some_keys(tokens, number)
        bank.add(str(number), [keys], [keys], tags=["even"] * (number % 2 == 0))
    return bank


def plain(bank, keys, num_chunks, names=None):
    """Return scores and rows by comparing with every search key."""
    stored = bank.search_keys(5).unflatten(1, (bank.num_chunks, -1))
    scores = torch.einsum("hqd,hrtd->hqrt", keys, stored) - stored.square().sum(-1).unsqueeze(1) / 2
    scores = scores.amax(dim=-1)
    if names is not None:
        places = bank.locate(torch.arange(bank.num_chunks))
        scores[..., [place.document_id not in names for place in places]] = -torch.inf
    return scores.topk(num_chunks, dim=2)


@pytest.mark.parametrize("search", ["token", "chunk_mean"])
@pytest.mark.parametrize("storage_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("index", ["exact", "flat", "auto"])
def test_the_nearest_are_found(index, storage_dtype, search):
    bank, keys = make(index=index, storage_dtype=storage_dtype, search=search), some_keys(9, 99)
    found, (scores, rows) = bank.nearest(5, keys, 6), plain(bank, keys, 6)
    assert torch.equal(found.rows, rows)
    torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-4)
    assert (found.rows != bank.search(5, keys, 6).rows).any()  # which prefers what is long
    if search == "token":  # a key of its own is the nearest to itself
        own = bank.gather(5, torch.arange(bank.num_chunks).expand(HEADS, -1), found.generation)[0][:, :, 1]
        nearest = bank.nearest(5, own.float(), 1).rows[..., 0]
        assert (nearest == torch.arange(bank.num_chunks)).float().mean() > 0.95  # int8 has equal ones


def test_a_selection_and_shards_find_their_own():
    bank, keys = make(search="token"), some_keys(5, 99)
    assert torch.equal(bank.select(["2", "4"]).nearest(5, keys, 6).rows, plain(bank, keys, 6, {"2", "4"})[1])
    assert bank.select("3").nearest(5, keys, 6).rows[0, 0].tolist()[2:] == [-1] * 4  # it has two chunks
    bank.supersede("2")
    assert torch.equal(bank.nearest(5, keys, 6).rows, plain(bank, keys, 6, {"0", "1", "3", "4"})[1])
    parts = BankShards([make((40, 24), search="token"), make((60, 7, 48), 2, search="token")])
    whole = make(search="token")
    found, expected = parts.nearest(5, keys, 6), whole.nearest(5, keys, 6)
    assert [each[:3] for each in parts.locate(found.rows)] == [each[:3] for each in whole.locate(expected.rows)]
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.generation == parts.generation


def test_a_pass_finds_what_was_there_when_it_began():
    bank, keys = make(search="token"), some_keys(5, 99)
    expected = bank.nearest(5, keys, 6)
    with reading_as(None, {}):
        bank.search(5, keys, 1)
        bank.delete("2")
        bank.add("5", [some_keys(30, 5)], [some_keys(30, 5)])
        found = bank.nearest(5, keys, 6)
        torch.testing.assert_close(found.scores, expected.scores)
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(bank.sample(4096).rows, torch.arange(45)[None, None])
    assert not torch.equal(bank.nearest(5, keys, 6).rows, expected.rows)


@pytest.mark.parametrize(
    ("index", "least"), [("ivf", 0.9), ("pq:dims_per_code=1,bits=4,candidates=8", 0.8), ("hnsw", 0.3)]
)
def test_an_approximate_index_finds_most_of_the_nearest(index, least, monkeypatch):
    """One that is linked by inner product finds what is near among its best, which for such keys is little."""
    monkeypatch.setattr(approximate, "EXACT_BELOW", 32)
    bank, keys = make((1200, 900, 1100), index=index, search="token"), some_keys(40, 99)
    found, (scores, rows) = bank.nearest(5, keys, 8), plain(bank, keys, 8)
    shared = (found.rows[..., None] == rows[..., None, :]).any(-1).float().mean()
    assert shared > least
    same = found.rows == rows
    is_exact = (
        found.scores[same] - scores[same]
    ).abs() < 1e-3  # but where a chunk's second token was found, and not its nearest
    assert is_exact.float().mean() > 0.98
    assert all(len(set(each)) == 8 for each in found.rows.flatten(0, 1).tolist())


def test_a_sample_is_spread_over_what_can_be_found():
    bank = make(search="token")
    assert bank.sample(4).rows.tolist() == [[[0, 14, 29, 44]]]
    assert bank.sample(100).rows.tolist() == [[list(range(45))]]
    even = bank.select(tags=["even"]).sample(12).rows
    assert {place.document_id for place in bank.locate(even)} == {"0", "2", "4"}
    assert not any(document.num_reads for document in bank.documents())
    assert MemoryBank(memory_layers=[5], chunk_size=SIZE).sample(4).generation is None


def test_a_selection_outside_of_the_clusters_that_are_looked_into_is_found_all_the_same(monkeypatch):
    monkeypatch.setattr(approximate, "EXACT_BELOW", 64)
    bank = MemoryBank(memory_layers=[5], chunk_size=1, index="ivf:least_probes=1,probed_share=0.0001")
    for name, place in (("far", 40.0), ("near", 0.0)):
        keys = place + torch.randn(1, 2000, DIM, generator=torch.Generator().manual_seed(1))
        bank.add(name, [keys], [keys])
    found = bank.select("far").nearest(5, torch.zeros(1, 4, DIM), 8)
    assert (found.rows >= 0).all()
    assert {place.document_id for place in bank.locate(found.rows)} == {"far"}
