"""Recall and latency of index settings on keys and queries of one's own: how to choose `index=`."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.memory.index.by_token import TokenIndex
from longmem.memory.index.exact import ChunkIndex
from longmem.memory.index.kinds import make_index
from longmem.memory.rows.storage import Chunks, ChunkStore

# A few settings of each kind, from fast to accurate.
SPECS = (
    "auto",
    "ivf:probed_share=0.01,least_probes=1",
    "ivf:storage=float32",
    "ivf:probed_share=0.06",
    "hnsw:search_depth=64",
    "hnsw:search_depth=128",
    "hnsw:search_depth=256",
    "pq",
    "pq:probed_share=0.06,candidates=8",
    "pq:probed_share=0.06,candidates=8,dims_per_code=4",
)


@dataclass(frozen=True)
class Tuned:
    """What one setting is worth."""

    index: str
    recall: float  # share of the chunks of exact search that are found
    milliseconds: float  # per 1,000 queries, each a vector of one head
    speed_ratio: float  # time of exact search over time of this one
    build_seconds: float  # training and adding all rows
    num_bytes: int  # of the index alone, without the store's search keys, which every kind needs


def recall(found: Int[Tensor, "kv_heads queries chunks"], best: Int[Tensor, "kv_heads queries chunks"]) -> float:
    """Return the share of the rows in `best` that are in `found`, query by query; -1 stands for no row.

    >>> recall(torch.tensor([[[4, 7, -1]]]), torch.tensor([[[7, 5, -1]]]))
    0.5
    """
    hits = (best.unsqueeze(3) == found.unsqueeze(2)).any(dim=3) & (best >= 0)
    return float(hits.sum() / (best >= 0).sum())


def tune(
    search_keys: Float[Tensor, "kv_heads rows dim"],
    queries: Float[Tensor, "kv_heads queries dim"],
    specs: Sequence[str] = SPECS,
    num_chunks: int = 16,
    repeats: int = 3,
    chunk_size: int | None = None,
) -> list[Tuned]:
    """Return recall, latency and price of every index in `specs`, in that order, with as many threads as there are.

    Queries should be those that a model asks: keys of the same text are not, and flatter an index. Each repeat times
    exact search and then the other, so what slows the machine for a while slows both; medians of repeats are given.

    `chunk_size`: rows are tokens, so many to a chunk, and recall is that of chunks found by their best token; None: rows are
    chunks.
    """
    store = _store_of(search_keys, chunk_size)

    def make(spec: str) -> ChunkIndex:
        return make_index(spec, store) if chunk_size is None else TokenIndex(spec, store, chunk_size)

    exact = make("flat")
    best = exact.search(queries, num_chunks)[1]
    thousands = queries.shape[0] * queries.shape[1] / 1000
    results = []
    for spec in specs:
        index = make(spec)
        start = time.perf_counter()
        index.search(queries[:, :1], num_chunks)  # the first search builds
        build_seconds = time.perf_counter() - start
        found, times = index.search(queries, num_chunks)[1], []
        for _ in range(repeats):
            start = time.perf_counter()
            exact.search(queries, num_chunks)
            middle = time.perf_counter()
            index.search(queries, num_chunks)
            times.append((middle - start, time.perf_counter() - middle))
        seconds = statistics.median(own for _, own in times)
        ratio = statistics.median(reference / own for reference, own in times)
        saved = index.export()
        files = [] if saved is None else map(faiss.serialize_index, saved.files)
        results.append(
            Tuned(
                index=spec,
                recall=recall(found, best),
                milliseconds=1000 * seconds / thousands,
                speed_ratio=ratio,
                build_seconds=0.0 if saved is None else build_seconds,
                num_bytes=0 if saved is None else saved.rows.nbytes + sum(each.nbytes for each in files),
            )
        )
    return results


def recommended_index(results: Sequence[Tuned], recall: float) -> str:
    """Return the fastest setting with at least this recall, "flat" where none is both that good and faster than exact search.

    Where no setting has built anything, all are exact, and "auto" it is: it will build an index when the bank has grown.

    >>> slow, fast = Tuned("ivf:probed_share=0.06", 0.97, 4.0, 2.0, 1.0, 9), Tuned("ivf", 0.9, 1.0, 8.0, 1.0, 9)
    >>> recommended_index([slow, fast], 0.95), recommended_index([slow, fast], 0.8), recommended_index([slow, fast], 1.0)
    ('ivf:probed_share=0.06', 'ivf', 'flat')
    """
    built = [each for each in results if each.num_bytes]
    if not built:
        return "auto"
    good = [each for each in built if each.recall >= recall and each.speed_ratio > 1]
    return min(good, key=lambda each: each.milliseconds).index if good else "flat"


def _store_of(search_keys: Float[Tensor, "kv_heads rows dim"], chunk_size: int | None = None) -> ChunkStore:
    """Return a store that holds these search keys and, where they are not those of tokens, keys and values of no width."""
    search_keys = search_keys.detach().to("cpu", torch.float32).contiguous()
    heads, rows, dim = search_keys.shape
    if chunk_size is not None:
        none = torch.empty(heads, rows // chunk_size, 0)
        keys = search_keys.unflatten(1, (-1, chunk_size))
        return ChunkStore(Chunks(keys, keys, none), rows // chunk_size)
    keys = torch.empty(heads, rows, 0, dim)
    return ChunkStore(Chunks(keys, keys, search_keys), rows)
