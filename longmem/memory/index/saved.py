"""The data of an approximate index outside of it: what a bank on disk keeps, so that reopening need not build it.

It is kept as plain arrays, from which an empty index of the same layout is filled. FAISS reads no file: its format can name
other files, and what it says is followed without a check.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float, Int

# The layouts whose insides are known here: clusters or a graph, of vectors as they are, in half precision or as codes.
LAYOUT = re.compile(
    r"(?:IVF(?P<lists>[1-9]\d{0,7})|HNSW(?P<links>[2-9]|[1-9]\d{1,2})(?!,PQ)),"
    r"(?:Flat|SQfp16|PQ(?P<codes>[1-9]\d{0,4})x(?P<bits>[4-8]))"
)
LARGEST_DIM = 2**16
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class SavedIndex:
    """The state of an index: derived data, that can be built anew from the store at any time."""

    files: list[faiss.Index]  # one for each key-value head
    rows: Int[np.ndarray, " labels"]  # the row of each label, -1 for one that is dead
    trained_rows: int  # live rows when it was trained
    layout: str  # what was built, so that other settings do not adopt it
    centres: Float[np.ndarray, "kv_heads dim"]  # for each head the mean key that was subtracted from all keys


def arrays_of(index: Any, layout: str) -> dict[str, np.ndarray] | None:
    """Return what an index holds, for `index_of`; None if its layout, a name for FAISS's factory, is not a known one."""
    if (known := LAYOUT.fullmatch(layout)) is None:
        return None
    if known["links"]:
        graph, storage = index.hnsw, faiss.downcast_index(index.storage)
        assert isinstance(storage, faiss.IndexFlatCodes)
        return {
            "levels": faiss.vector_to_array(graph.levels),
            "links": faiss.vector_to_array(graph.neighbors),
            "entry": np.array([graph.entry_point]),
            "codes": faiss.vector_to_array(storage.codes).reshape(index.ntotal, -1),
        }
    lists, size = index.invlists, index.code_size
    sizes = np.array([lists.list_size(number) for number in range(index.nlist)])
    filled = [(number, int(count)) for number, count in enumerate(sizes) if count]
    ids = [faiss.rev_swig_ptr(lists.get_ids(number), count).copy() for number, count in filled]
    codes = [faiss.rev_swig_ptr(lists.get_codes(number), count * size).reshape(count, size) for number, count in filled]
    arrays = {
        "centres": index.quantizer.reconstruct_n(0, index.nlist),
        "sizes": sizes,
        "ids": np.concatenate([np.empty(0, dtype=np.int64), *ids]),
        "codes": np.concatenate([np.empty((0, size), dtype=np.uint8), *codes]),
    }
    return arrays | ({"words": faiss.vector_to_array(index.pq.centroids)} if known["codes"] else {})


def index_of(layout: str, dim: int, arrays: Arrays) -> faiss.Index:
    """Return the index of this layout over vectors of `dim` numbers that held what `arrays_of` returned.

    Raises ValueError, before FAISS allocates anything, for arrays that did not come from such an index: every size follows
    from the arrays, and every number that FAISS would use as an address is inside of them.
    """
    known = LAYOUT.fullmatch(layout)
    codes, words = arrays["codes"], int((known and known["codes"]) or 0)
    if known is None or not 1 <= dim <= LARGEST_DIM or codes.dtype != np.uint8 or codes.ndim != 2:
        raise ValueError(f"an index must have a known layout and codes, got {layout!r} and {codes.dtype} codes")
    if words and (dim % words or arrays["words"].shape != (dim * 2 ** int(known["bits"]),)):
        raise ValueError(f"{words} codes must have words for {dim} numbers, got {arrays['words'].shape}")
    width = -(-words * int(known["bits"]) // 8) if words else dim * (4 if layout.endswith("Flat") else 2)
    if codes.shape[1] != width:
        raise ValueError(f"codes must have {width} bytes, got {codes.shape[1]}")
    if known["lists"] and arrays["centres"].shape != (int(known["lists"]), dim):
        raise ValueError(f"{known['lists']} clusters must have as many centres, got {arrays['centres'].shape}")
    index = faiss.index_factory(dim, layout, faiss.METRIC_INNER_PRODUCT)
    (_fill_graph if known["links"] else _fill_lists)(index, arrays)
    index.ntotal, index.is_trained = len(codes), True
    return index


def _fill_lists(index: Any, arrays: Arrays) -> None:
    sizes, ids, count = arrays["sizes"], arrays["ids"], len(arrays["codes"])
    if sizes.shape != (index.nlist,) or (sizes < 0).any() or (sizes > count).any() or sizes.sum() != count:
        raise ValueError(f"{index.nlist} clusters must hold {count} vectors, got {sizes.shape}")
    if ids.shape != (count,) or not np.array_equal(np.sort(ids), np.arange(count)):
        raise ValueError("ids must be those of the vectors, each once")
    index.quantizer.add(np.ascontiguousarray(arrays["centres"], dtype=np.float32))
    if "words" in arrays:
        faiss.copy_array_to_vector(np.ascontiguousarray(arrays["words"], dtype=np.float32), index.pq.centroids)
    done = 0
    ids, codes = np.ascontiguousarray(ids, dtype=np.int64), np.ascontiguousarray(arrays["codes"])
    for number, size in enumerate(sizes.tolist()):
        if size:
            part = slice(done, done + size)
            index.invlists.add_entries(number, size, faiss.swig_ptr(ids[part]), faiss.swig_ptr(codes[part]))
            done += size


def _fill_graph(index: Any, arrays: Arrays) -> None:
    graph, storage, count = index.hnsw, faiss.downcast_index(index.storage), len(arrays["codes"])
    levels, links, entry = (arrays[name] for name in ("levels", "links", "entry"))
    ends = faiss.vector_to_array(graph.cum_nneighbor_per_level).astype(np.int64)  # of the links of a vector, by level
    if levels.shape != (count,) or not count or levels.min() < 1 or levels.max() >= len(ends):
        raise ValueError(f"a graph of {count} vectors must have as many levels, got {levels.shape}")
    starts = np.concatenate([[0], np.cumsum(ends[levels])])
    if links.shape != (starts[-1],):
        raise ValueError(f"a graph of these levels must have {starts[-1]} links, got {links.shape}")
    for level in range(int(levels.max())):
        there = starts[:-1][levels > level]
        for block in np.array_split(there, 1 + len(there) // 65_536):
            found = links[block[:, None] + np.arange(ends[level], ends[level + 1])]
            # A vector that is linked on a level is on it: else FAISS would read the links of another one, or beyond all.
            if (
                found.min(initial=-1) < -1
                or found.max(initial=-1) >= count
                or (levels[found[found >= 0]] <= level).any()
            ):
                raise ValueError(f"the links of level {level} must lead to vectors of that level")
    if entry.shape != (1,) or not 0 <= entry[0] < count or levels[entry[0]] != levels.max():
        raise ValueError("the graph must be entered on its highest level")
    storage.is_trained = True
    storage.add_sa_codes(np.ascontiguousarray(arrays["codes"]))
    faiss.copy_array_to_vector(np.ascontiguousarray(levels, dtype=np.int32), graph.levels)
    graph.prepare_level_tab(count, True)
    links = np.ascontiguousarray(links, dtype=np.int32)
    assert graph.neighbors.size() == len(links)
    faiss.memcpy(graph.neighbors.data(), faiss.swig_ptr(links), links.nbytes)
    graph.entry_point, graph.max_level = int(entry[0]), int(levels.max()) - 1
