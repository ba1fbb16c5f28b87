"""FAISS on a GPU: resources made once for each device, and what is found is what exact search finds.

A stand-in takes the place of FAISS's GPU build: it is given the same pointers, and answers on the CPU. With a GPU and faiss-gpu
the same tests run on these (`-m gpu`).
"""

import types

import faiss
import numpy as np
import pytest
import torch

from longmem.memory.index import exact_top_chunks, gpu, make_index
from longmem.memory.index.approximate import ApproximateIndex
from longmem.memory.index.exact import faiss_top_chunks
from longmem.memory.rows.storage import Chunks, ChunkStore

HEADS, DIM, ROWS = 2, 16, 3_000
DEVICES = ["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)]


class Resources:
    """Counts how many of it were made, and notes how much scratch memory they may take."""

    made: list["Resources"] = []

    def __init__(self):
        self.scratch = None
        self.made.append(self)

    def setTempMemory(self, size):
        self.scratch = size


def array(pointer, *shape):
    return faiss.rev_swig_ptr(pointer, int(np.prod(shape))).reshape(shape)


def brute_force(resources, asked):
    """Do what FAISS's `bfKnn` does, with the pointers that it is given."""
    assert isinstance(resources, Resources)
    keys, queries = (array(getattr(asked, name), count, asked.dims) for name, count in _sizes(asked))
    found = faiss.knn(queries, keys, asked.k, asked.metric)
    for part, pointer in zip(found, (asked.outDistances, asked.outIndices), strict=True):
        array(pointer, asked.numQueries, asked.k)[:] = part


def _sizes(asked):
    return ("vectors", asked.numVectors), ("queries", asked.numQueries)


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Return where the store is; the stand-in's is the CPU, which is taken for a GPU."""
    gpu._made_resources.cache_clear()
    if request.param == "cuda":
        if not gpu.searches_on(torch.device("cuda")):
            pytest.skip("needs faiss-gpu")
        yield torch.device("cuda", torch.cuda.current_device())
    else:
        copies = []

        def copied(resources, number, index, options):
            assert isinstance(resources, Resources)
            copies.append(faiss.clone_index(index))
            return copies[-1]

        monkeypatch.setattr(Resources, "made", [])
        for name, made in {
            "StandardGpuResources": Resources,
            "GpuDistanceParams": types.SimpleNamespace,
            "GpuClonerOptions": types.SimpleNamespace,
            "bfKnn": brute_force,
            "index_cpu_to_gpu": copied,
        }.items():
            monkeypatch.setattr(faiss, name, made, raising=False)
        monkeypatch.setattr(gpu, "searches_on", lambda device: True)
        monkeypatch.setattr(ApproximateIndex, "is_on_gpu", True)
        yield torch.device("cpu")
    gpu._made_resources.cache_clear()


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def store_on(device, rows=ROWS):
    keys = some(HEADS, rows, DIM).to(device)
    return ChunkStore(Chunks(keys.unsqueeze(2), keys.unsqueeze(2), keys), 10 * rows)


def same(found, expected):
    scores, rows = (each.cpu() for each in found)
    torch.testing.assert_close(scores, expected[0].cpu(), rtol=1e-4, atol=1e-4)
    assert torch.equal(rows, expected[1].cpu())


def test_exact_search_by_pointers(device):
    store, queries = store_on(device), some(HEADS, 7, DIM, seed=1).to(device)
    found = [
        torch.stack(part)
        for part in zip(
            *map(gpu.knn, queries, store.search_keys, [9] * HEADS), strict=True
        )  # a view of a larger tensor
    ]
    same(found, exact_top_chunks(queries, store.search_keys, 9))
    same(faiss_top_chunks(queries, store.search_keys, 9), exact_top_chunks(queries, store.search_keys, 9))


@pytest.mark.parametrize("kind", ["ivf", "pq", "auto"])
def test_clusters_on_a_gpu_follow_changes(kind, device, monkeypatch):
    monkeypatch.setattr("longmem.memory.index.approximate.EXACT_BELOW", 512)
    monkeypatch.setattr("longmem.memory.index.approximate.POINTS_PER_CENTROID", 4)
    monkeypatch.setattr(ApproximateIndex, "exact_below", lambda index: 512)
    settings = {"ivf": "ivf:probed_share=1.0", "pq": "pq:probed_share=1.0,bits=6,candidates=60", "auto": "auto"}[kind]
    store = store_on(device)
    index = make_index(settings, store)
    index.chosen["probed_share"] = 1.0
    queries = some(HEADS, 7, DIM, seed=1).to(device)
    assert not index.is_exact(None)
    assert index.is_exact(torch.arange(2_000))  # no filter there
    searched = []
    search = gpu.search
    monkeypatch.setattr(gpu, "search", lambda *given: searched.append(1) or search(*given))
    close = kind == "pq"  # near scores: some of the best are missed

    def check(rows=None):
        found = index.search(queries, 5, rows)
        expected = exact_top_chunks(queries, store.search_keys, 5, rows=rows)
        if not close:
            return same(found, expected)
        hits = (found[1].unsqueeze(-1) == expected[1].unsqueeze(-2)).any(dim=-1).float().mean()
        assert hits > 0.9
        return None

    check()
    assert len(searched) == HEADS
    copies = index._copies
    check()
    assert index._copies is copies  # not made anew while nothing was added
    gone, sources = torch.arange(0, 500), torch.arange(ROWS - 500, ROWS)  # dead vectors, and moved rows
    index.rows_dropped(gone)
    store.move(sources, gone)
    store.truncate(ROWS - 500)
    index.rows_moved(sources, gone)
    check()
    keys = 3 * some(HEADS, 40, DIM, seed=5).to(device)  # longer than the others: they will be found
    rows = torch.arange(store.num_rows, store.num_rows + 40)
    store.write(rows, Chunks(keys.unsqueeze(2), keys.unsqueeze(2), keys))
    index.rows_written(rows)
    check()
    assert index._copies is copies  # the new ones were compared one by one
    assert (index.search(queries, 5)[1] >= ROWS - 500).any()
    check(torch.arange(0, store.num_rows, 2))
    index.rows_dropped(rows[:20])  # some of these die and move, too
    store.move(rows[20:], rows[:20])
    store.truncate(store.num_rows - 20)
    index.rows_moved(rows[20:], rows[:20])
    check()
    more = torch.arange(store.num_rows, store.num_rows + 600)
    keys = 2 * some(HEADS, 600, DIM, seed=6).to(device)
    store.write(more, Chunks(keys.unsqueeze(2), keys.unsqueeze(2), keys))
    index.rows_written(more)
    check()
    assert index._copies is not copies  # too many to be compared: copied anew
    assert index._num_copied == index._table.num_labels


def test_resources_are_made_once_and_bounded(device):
    store = store_on(device)
    for _ in range(3):
        make_index("flat", store).search(some(HEADS, 2, DIM).to(device), 3)
        gpu.knn(some(2, DIM).to(device), store.search_keys[0], 3)
    index = make_index("ivf", store)
    index._train()
    assert len({id(gpu.resources_of(device)) for _ in range(3)}) == 1
    if device.type == "cpu":
        gpu.copy_of(index._files[0], device)
        assert [each.scratch for each in Resources.made] == [gpu.SCRATCH_BYTES]


def test_what_faiss_lacks_on_a_gpu_is_searched_exactly(device, monkeypatch):
    monkeypatch.setattr("longmem.memory.index.approximate.EXACT_BELOW", 512)
    store, queries = store_on(device), some(HEADS, 4, DIM, seed=1).to(device)
    graph = make_index("hnsw", store)
    assert graph.is_exact(None)
    same(graph.search(queries, 5), exact_top_chunks(queries, store.search_keys, 5))

    def refuse(*given):
        raise RuntimeError("no such index")

    monkeypatch.setattr(gpu, "copy_of", refuse)
    index = make_index("ivf", store)
    with pytest.warns(UserWarning, match="all is compared there: no such index"):
        found = index.search(queries, 5)
    same(found, exact_top_chunks(queries, store.search_keys, 5))
    same(index.search(queries, 5), exact_top_chunks(queries, store.search_keys, 5))  # without a word
