"""Index kinds against a sort of all inner products."""

import pytest
import torch

from longmem.memory.index import ChunkIndex, ExactIndex
from longmem.memory.index import exact as exact_module
from longmem.memory.rows.storage import Chunks, ChunkStore
from longmem.plugins import find

HEADS, DIM = 3, 8


def store_of(search_keys: torch.Tensor) -> ChunkStore:
    chunks = search_keys.unsqueeze(2).half()
    return ChunkStore(Chunks(chunks, chunks, search_keys), 1000)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_search(queries, search_keys, num_chunks, allowed):
    """Return what an index must: by sorting, one query at a time."""
    scores = torch.full((*queries.shape[:2], num_chunks), -torch.inf)
    rows = torch.full((*queries.shape[:2], num_chunks), -1)
    for head in range(queries.shape[0]):
        for position, query in enumerate(queries[head]):
            products = [(float((query.double() * search_keys[head, row].double()).sum()), row) for row in allowed]
            for slot, (score, row) in enumerate(sorted(products, reverse=True)[:num_chunks]):
                scores[head, position, slot], rows[head, position, slot] = score, row
    return scores, rows


@pytest.fixture(params=["auto", "exact", "flat", "hnsw", "ivf", "pq"])
def kind(request) -> type[ChunkIndex]:
    return find("index", request.param)


@pytest.mark.parametrize("num_chunks", [1, 7, 50, 60])
@pytest.mark.parametrize("subset", [None, [3], [0, 5, 17, 18, 49], []])
def test_search_equals_a_sort(kind, num_chunks, subset):
    search_keys, queries = random(HEADS, 50, DIM), random(HEADS, 11, DIM, seed=1)
    rows = None if subset is None else torch.tensor(subset, dtype=torch.int64)
    scores, found = kind(store_of(search_keys)).search(queries, num_chunks, rows)
    naive_scores, naive_rows = naive_search(queries, search_keys, num_chunks, range(50) if subset is None else subset)
    assert found.dtype == torch.int64
    assert scores.dtype == torch.float32
    torch.testing.assert_close(found, naive_rows, rtol=0, atol=0)
    torch.testing.assert_close(scores, naive_scores, rtol=1e-5, atol=1e-5)


def test_blocks_of_queries_change_nothing(monkeypatch):
    index, queries = ExactIndex(store_of(random(HEADS, 50, DIM))), random(HEADS, 11, DIM, seed=1)
    whole = index.search(queries, 5)
    monkeypatch.setattr(exact_module, "SCORES_PER_STEP", {"cpu": 1})
    torch.testing.assert_close(index.search(queries, 5), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("size", "count"), [(1, 300), (4, 75), (4, 83), (64, 40)])
def test_of_many_scores_the_best_groups_have_the_best(size, count, monkeypatch):
    torch.manual_seed(0)
    scores = torch.randn(HEADS, 7, count, size)
    scores[:, 1, 3:9] = -torch.inf  # left out
    scores[:, 2, 5] = scores[:, 2, 9].amax()  # two are equal
    plain = scores.amax(dim=3).topk(3, dim=2)
    monkeypatch.setattr(exact_module, "MANY_SCORES", 0)
    monkeypatch.setattr(exact_module, "NEIGHBOURS", 4)
    best, places = exact_module.best_of(scores, 3)
    assert torch.equal(best, plain.values)
    assert torch.equal(scores.amax(dim=3).gather(2, places), best)
    assert (places.sort().values.diff() > 0).all()


def test_no_queries_and_no_rows_are_answered(kind):
    index = kind(store_of(random(HEADS, 5, DIM)))
    assert [tuple(part.shape) for part in index.search(random(HEADS, 0, DIM), 4)] == [(HEADS, 0, 4)] * 2
    scores, rows = kind(store_of(random(HEADS, 0, DIM))).search(random(HEADS, 2, DIM), 4)
    assert (rows == -1).all()
    assert torch.isneginf(scores).all()


def test_only_live_rows_are_found(kind):
    search_keys = random(HEADS, 20, DIM)
    store, queries = store_of(search_keys), search_keys[:, 15:16]
    before = kind(store).search(queries, 20)[1]
    store.truncate(10)
    after = kind(store).search(queries, 20)[1]
    assert (before == 15).any(dim=-1).all()
    assert after.max() == 9
    assert (after[..., 10:] == -1).all()


def test_queries_of_any_dtype_layout_and_graph_are_searched_in_float32(kind):
    index = kind(store_of(random(HEADS, 50, DIM)))
    queries = random(HEADS, 6, DIM, seed=1).bfloat16()
    scattered = queries.float().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    scores, rows = index.search(queries, 5)
    torch.testing.assert_close(index.search(scattered, 5), (scores, rows), rtol=1e-6, atol=1e-6)
    assert not scores.requires_grad


def test_a_query_of_nan_finds_nothing_out_of_range(kind):
    scores, rows = kind(store_of(random(HEADS, 50, DIM))).search(torch.full((HEADS, 1, DIM), torch.nan), 5)
    assert rows.min() >= -1
    assert rows.max() < 50
    assert torch.isneginf(scores[rows < 0]).all()
