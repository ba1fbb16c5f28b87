"""Search by token: a chunk is found by the best of its keys, whatever the index, the storage or what happened to the bank."""

import pytest
import torch

from longmem import MemoryBank
from longmem.memory import BankShards

HEADS, DIM, SIZE = 2, 8, 4


def some_keys(tokens, seed):
    return torch.randn(HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def fill(bank):
    """Write documents, and let rows move: some are deleted, one is continued, one updated in place by others' rows."""
    for number, tokens in enumerate((40, 24, 60, 7, 48)):
        keys = some_keys(tokens, number)
        bank.add(str(number), [keys], [keys], tags=["even"] * (number % 2 == 0))
    bank.delete("1")
    more = some_keys(9, 77)
    bank.append("3", [more], [more])
    bank.delete("0")
    return bank


def make(folder=None, **options):
    settings = {"memory_layers": [5], "chunk_size": SIZE, "search": "token", "storage_dtype": "float32", **options}
    return fill(MemoryBank(**settings) if folder is None else MemoryBank.create(folder, **settings))


def plain_best(bank, queries, num_chunks, reader=None):
    """Return scores and rows found by writing all products out: the twin that every index is held against."""
    rows = torch.arange(bank.num_chunks)
    keys, _ = bank.gather(5, rows.expand(HEADS, -1), generation=bank.search(5, queries, 1).generation)
    scores = torch.einsum("hqd,hrtd->hqrt", queries, keys).amax(dim=-1)
    if reader is not None:
        seen = [place is not None and place.document_id in reader for place in bank.locate(rows)]
        scores = scores.masked_fill(~torch.tensor(seen), -torch.inf)
    return scores.topk(num_chunks, dim=2)


@pytest.mark.parametrize("index", ["exact", "flat", "auto"])
@pytest.mark.parametrize("place", ["memory", "disk", "reopened", "copied"])
def test_chunks_are_found_by_their_best_token(index, place, tmp_path):
    bank = make(None if place == "memory" else tmp_path / "bank", index=index)
    if place == "reopened":
        bank.close()
        bank = MemoryBank.open(tmp_path / "bank", read_only=True)
    if place == "copied":
        bank = bank.copy()
    assert bank.by_token
    queries = some_keys(11, 99)
    found = bank.search(5, queries, 6)
    scores, rows = plain_best(bank, queries, 6)
    torch.testing.assert_close(found.scores, scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.rows, rows)
    assert all(len(set(each)) == 6 for each in found.rows.flatten(0, 1).tolist())  # no chunk twice


@pytest.mark.parametrize("index", ["exact", "flat"])
def test_a_selection_sees_its_own_alone(index):
    bank = make(index=index)
    queries = some_keys(3, 99)
    scores, rows = plain_best(bank, queries, 5, reader=("2", "4"))
    found = bank.select(tags=["even"]).search(5, queries, 5)
    assert torch.equal(found.rows, rows)
    torch.testing.assert_close(found.scores, scores, rtol=1e-5, atol=1e-5)


def test_age_counts_for_a_chunk_as_for_its_tokens():
    bank = make(age_prior="exp:a=0.5")
    queries = some_keys(3, 99)
    found = bank.search(5, queries, bank.num_chunks, scaling=1.0)
    plain, rows = plain_best(bank, queries, bank.num_chunks)
    weights = bank.log_weights(rows)
    expected = (plain + weights).sort(dim=2, descending=True)
    torch.testing.assert_close(found.scores.sort(dim=2, descending=True).values, expected.values, rtol=1e-4, atol=1e-4)


def test_approximate_search_finds_most_of_the_best():
    bank = MemoryBank(memory_layers=[5], chunk_size=SIZE, search="token", index="ivf", capacity_tokens=None)
    keys = some_keys(40_000, 3)
    bank.add("a", [keys], [keys])
    queries = keys[:, ::997] + 0.1 * some_keys(41, 4)[:, : len(keys[0, ::997])]
    approximate = bank.search(5, queries, 4).rows
    bank.use_index("exact")
    exact = bank.search(5, queries, 4).rows
    hits = (approximate.unsqueeze(-1) == exact.unsqueeze(-2)).any(dim=-1).float().mean()
    assert hits > 0.7
    assert (approximate[..., 0] == exact[..., 0]).float().mean() > 0.9


def test_no_key_is_stored_twice(tmp_path):
    by_token, by_mean = make(), make(search="chunk_mean")
    assert by_token.num_chunks == by_mean.num_chunks
    keys_and_values = 2 * HEADS * by_token.num_tokens * DIM * 4
    assert sum(tensor.nbytes for tensor in by_token._table.storage.layer(0).live) == keys_and_values
    make(tmp_path / "a").close()
    make(tmp_path / "b", search="chunk_mean").close()
    sizes = [sum(f.stat().st_size for f in (tmp_path / name / "segments").iterdir()) for name in "ab"]
    assert sizes[0] < sizes[1]


def test_chunks_of_one_token_are_found_alike_by_both():
    queries = some_keys(7, 99)
    one, other = (make(chunk_size=1, search=search, index="exact") for search in ("token", "chunk_mean"))
    assert torch.equal(one.search(5, queries, 9).rows, other.search(5, queries, 9).rows)


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match='`search` must be .*, got \'tokens\'; known: "chunk_mean", "token". Did you mean `token`'
    ):
        MemoryBank(memory_layers=[5], chunk_size=4, search="tokens")
    with pytest.raises(ValueError, match="`banks` must agree in `by_token`"):
        BankShards([make(), make(search="chunk_mean")])
