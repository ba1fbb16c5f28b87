"""The kinds of chunk index that do not compare a query with every key; a new kind is one class, registered by its name."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import faiss

from longmem.memory.index import approximate
from longmem.memory.index.approximate import ApproximateIndex
from longmem.memory.index.exact import ChunkIndex
from longmem.memory.rows.storage import LayerRows
from longmem.plugins import Setting, parse_name, register

STORAGE = {"float32": "Flat", "float16": "SQfp16"}


@register("index", "ivf")
class InvertedFileIndex(ApproximateIndex):
    """Search by clusters (FAISS IVF): a query looks only into those whose centres have its largest products.

    Half precision is the default: it is as good, takes half the memory and is read in less time. What is found is
    ranked again by the store's search keys, so scores are exact. For keys beyond 65,504 choose float32.
    """

    settings: ClassVar[Mapping[str, Setting]] = {
        "clusters_per_root": Setting(4.0, "the clusters for each square root of the chunks", 0.25, 64.0),
        "probed_share": Setting(1 / 32, "the share of the clusters that a query looks into", 0.0001, 1.0),
        # The best chunks of a query lie in some tens of clusters, however few these are.
        "least_probes": Setting(16, "the clusters that a query looks into at least", 1, 65_536),
        "storage": Setting("float16", "the type of the copied search keys", words=tuple(STORAGE)),
    }
    # Measured on 250,880 chunks: at a sixteenth both take the same time, at an eighth clusters take half of it, and the
    # thinner the filter the more of its best chunks lie in clusters that nobody looks into.
    exact_share = 1 / 8
    has_gpu_form = finds_by_distance = True

    def clusters(self, num_rows: int) -> int:
        """Return the number of clusters: no more than there are enough points to train."""
        wanted = int(self.chosen["clusters_per_root"] * math.sqrt(num_rows))
        return max(1, min(wanted, num_rows // approximate.POINTS_PER_CENTROID))

    def layout(self, dim: int, num_rows: int) -> str:
        """Return an inverted file of whole vectors."""
        return f"IVF{self.clusters(num_rows)},{STORAGE[self.chosen['storage']]}"

    def training_points(self, num_rows: int) -> int:
        """Return FAISS's lower limit and half of it again; k-means with more is slower and finds as much."""
        return math.ceil(1.5 * approximate.POINTS_PER_CENTROID * self.clusters(num_rows))

    def prepare(self, file: Any) -> None:
        """Let k-means train with what it is given, and to convergence as far as it matters."""
        file.cp.min_points_per_centroid = 1
        file.cp.spherical = False
        file.cp.niter = 10

    def compare_by(self, file: Any, metric: int) -> None:
        """Set how the cluster of a key is chosen: the coarse quantizer is a flat index, which reads this when asked."""
        file.quantizer.metric_type = metric

    def parameters(self, file: Any, selector: faiss.IDSelector | None, share: float) -> Any:
        return faiss.SearchParametersIVF(sel=selector, nprobe=self.probes(file))  # type: ignore[call-arg]

    def probes(self, file: Any) -> int:
        return max(self.chosen["least_probes"], round(self.chosen["probed_share"] * file.nlist))


@register("index", "auto")
class AutoIndex(InvertedFileIndex):
    """Exact search while the store is small and an inverted file beyond, with settings that need no choice."""

    settings: ClassVar[Mapping[str, Setting]] = {}

    def __init__(self, store: LayerRows) -> None:
        super().__init__(store)
        self.chosen = {name: setting.default for name, setting in InvertedFileIndex.settings.items()}


@register("index", "hnsw")
class GraphIndex(ApproximateIndex):
    """Search along a graph of neighbours (FAISS HNSW), for comparison: on keys of attention clusters do better.

    The graph is linked by inner product, like the search; linked by distance it found half as much. It knows no filter:
    it walks as before and leaves out what it may not return, so a filtered search goes deeper by as much, and below
    half of the chunks exact search is both faster and better (an eighth: 30 times as fast, recall 0.78 by the graph).
    """

    settings: ClassVar[Mapping[str, Setting]] = {
        "neighbors": Setting(32, "the links of each chunk", 2, 256),
        "build_depth": Setting(40, "the candidates for the links of a new chunk", 1, 4096),
        "search_depth": Setting(256, "the candidates that a search keeps", 1, 65_536),
        "storage": Setting("float32", "the type of the copied search keys", words=tuple(STORAGE)),
    }
    exact_share = 1 / 2

    def layout(self, dim: int, num_rows: int) -> str:
        """Return a graph over whole vectors."""
        return f"HNSW{self.chosen['neighbors']},{STORAGE[self.chosen['storage']]}"

    def training_points(self, num_rows: int) -> int:
        """Return enough for a mean key: nothing else is trained."""
        return ROWS_FOR_MEAN

    def prepare(self, file: Any) -> None:
        """Set how carefully the graph is built."""
        file.hnsw.efConstruction = self.chosen["build_depth"]

    def parameters(self, file: Any, selector: faiss.IDSelector | None, share: float) -> Any:
        depth = math.ceil(self.chosen["search_depth"] / share)
        return faiss.SearchParametersHNSW(sel=selector, efSearch=depth)  # type: ignore[attr-defined]


ROWS_FOR_MEAN = 16_384


@register("index", "pq")
class CodeIndex(InvertedFileIndex):
    """Search by clusters over product-quantised keys: the least memory, and scores that are only near.

    So more chunks are looked for than are wanted, and these are ranked again with the store's search keys.
    """

    settings: ClassVar[Mapping[str, Setting]] = {
        **{name: InvertedFileIndex.settings[name] for name in ("clusters_per_root", "probed_share", "least_probes")},
        "dims_per_code": Setting(2, "the numbers of a key that share a code", 1, 64),
        "bits": Setting(8, "the bits of a code", 4, 8),
        "candidates": Setting(4, "the candidates that are ranked again, for each chunk that is wanted", 1, 1024),
    }

    def layout(self, dim: int, num_rows: int) -> str:
        """Return an inverted file of codes; the number of codes has to divide the width of a key."""
        codes = next(count for count in range(max(1, dim // self.chosen["dims_per_code"]), 0, -1) if dim % count == 0)
        return f"IVF{self.clusters(num_rows)},PQ{codes}x{self.chosen['bits']}"

    def exact_below(self) -> int:
        """Return a size at which the codes can be trained as well."""
        return max(super().exact_below(), approximate.POINTS_PER_CENTROID * 2 ** self.chosen["bits"])

    def training_points(self, num_rows: int) -> int:
        """Return enough points for clusters and codes."""
        return max(super().training_points(num_rows), approximate.POINTS_PER_CENTROID * 2 ** self.chosen["bits"])

    def prepare(self, file: Any) -> None:
        """Leave out what FAISS does by default for searches by Hamming distance, which takes minutes."""
        super().prepare(file)
        file.do_polysemous_training = False
        file.pq.cp.min_points_per_centroid = 1
        file.pq.cp.max_points_per_centroid = 64
        file.pq.cp.niter = 10

    def candidates(self, num_chunks: int) -> int:
        """Return a multiple of the chunks that are wanted."""
        return self.chosen["candidates"] * num_chunks


def validate_index(index: object) -> None:
    """Raise ValueError unless `index` names a kind, and settings of it with values that they can have."""
    parse_name("index", index)


def make_index(index: str, store: LayerRows) -> ChunkIndex:
    """Return an index over `store` of the kind and with the settings that `index` names.

    >>> from longmem.memory.rows.storage import ChunkStore, cut_into_chunks
    >>> import torch
    >>> store = ChunkStore(cut_into_chunks(torch.ones(2, 8, 3), torch.ones(2, 8, 5), 4, torch.float16))
    >>> make_index("ivf:probed_share=0.5", store).chosen["probed_share"]
    0.5
    """
    kind, chosen = parse_name("index", index)
    return kind(store, **chosen)
