"""Approximate search: FAISS indexes, one for each key-value head, that follow the rows of a store."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num, UInt8
from torch import Tensor

from longmem.memory.index import gpu
from longmem.memory.index.exact import FlatIndex, Ranked, exact_top_chunks, ranked_again
from longmem.memory.index.saved import SavedIndex
from longmem.memory.rows.storage import LayerRows, decode

EXACT_BELOW = 8_192  # rows; a store, or a subset, of so few is searched faster exactly
# A store that has grown by this factor wants other clusters than it was trained with, and so does one to which as many
# rows were added in place of others.
GROWTH_BEFORE_RETRAINING = 4
# Tombstones cost memory and are skipped one by one. A rebuild adds every row again, so at this share each drop pays for
# three rows of it, whatever the size.
DEAD_SHARE_BEFORE_REBUILDING = 0.25
# So many rows with other keys of the same chunks, from another encoder, want other clusters.
REENCODED_SHARE_BEFORE_RETRAINING = 0.5
POINTS_PER_CENTROID = 39  # k-means of FAISS warns below this
FLOAT16_LIMIT = 65_504.0
ROWS_PER_STEP = 65_536  # rows copied at a time while they are added
# Chunks that are looked for, for each that is wanted, where age counts too and they are ranked again with it.
CANDIDATES_WITH_BONUS = 4


class ApproximateIndex(FlatIndex):
    """An index that misses some of the best chunks, and searches exactly while the store is small.

    Subclasses name a FAISS index and its search parameters. Two things make keys of attention fit such an index, which
    by itself finds few of their best (`docs/experiments.md`):
    - Vectors are the keys less their mean key, which is most of the length of a key. For one query that lowers all
      scores by the same number, so it changes no ranking.
    - Clusters are made by distance and searched by inner product. Made by inner product, a few with long centres would
      draw most keys to themselves.

    On a GPU FAISS's indexes know no filter and let go of no vector. So a search of all rows asks a copy there for as many more
    as are dead, and ranks what lives again. Rows that were added since the copy was made are all compared; when they are many,
    another is made. A search of some rows is exact, and so is every one of kinds that FAISS does not have there, or without
    its GPU build.
    """

    has_gpu_form = False
    finds_by_distance = False  # whether FAISS can be asked for the nearest as well
    # Share of the rows below which a filtered search is exact: see the kinds.
    exact_share = 0.0

    def __init__(self, store: LayerRows, **chosen: Any) -> None:
        super().__init__(store)
        self.chosen = {name: setting.default for name, setting in self.settings.items()} | chosen
        self._table = LabelTable()
        self._files: list[faiss.Index] = []
        self._centres: Float[np.ndarray, "kv_heads dim"] = np.empty((0, 0), dtype=np.float32)
        self._trained_rows = 0
        self._rows_added = self._rows_reencoded = 0  # since it was trained
        self._copies: list[Any] = []  # of the files, on a GPU
        self._num_copied = 0  # vectors that the copies hold, the first of the files

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes along: not what is on a GPU, which it makes anew."""
        return {**self.__dict__, "_copies": []}

    # What a kind says.

    def layout(self, dim: int, num_rows: int) -> str:
        """Return the name of the FAISS index to build for so many rows."""
        raise NotImplementedError

    def training_points(self, num_rows: int) -> int:
        """Return how many keys to train with; at most all are there."""
        raise NotImplementedError

    def prepare(self, file: Any) -> None:
        """Set what the name of a FAISS index cannot say, before it is trained."""

    def compare_by(self, file: Any, metric: int) -> None:
        """Set how the cluster of a key is chosen, where there are clusters."""

    def parameters(self, file: Any, selector: faiss.IDSelector | None, share: float) -> Any:
        """Return the search parameters where a `share` of the vectors may be found, chosen by `selector`."""
        raise NotImplementedError

    @property
    def is_exact_in_scores(self) -> bool:
        """Return whether vectors are kept as they are; where not, what is found is ranked again by the store's keys."""
        return self.chosen.get("storage") == "float32"

    def candidates(self, num_chunks: int) -> int:
        """Return how many vectors to look for, so that the best of them by their exact scores are good."""
        return num_chunks

    def exact_below(self) -> int:
        """Return the rows below which this kind searches exactly."""
        return EXACT_BELOW

    # Search.

    def best_rows(self, queries: Tensor, num_chunks: int, rows: Tensor | None, bonus: Tensor | None = None) -> Ranked:
        """Return the best rows that FAISS finds, and the exact answer to queries for which it finds too few."""
        num_rows = self.store.num_rows
        if self.is_exact(rows) or (self.is_on_gpu and num_chunks > gpu.MOST_FOUND):
            return super().best_rows(queries, num_chunks, rows, bonus)
        if bonus is not None:
            count = min(CANDIDATES_WITH_BONUS * num_chunks, num_rows if rows is None else len(rows))
            products, candidates = self.best_rows(queries, count, rows)
            scores, slots = (products + bonus[candidates.clamp(min=0)]).topk(num_chunks, dim=2)
            return scores, candidates.gather(2, slots)
        self._catch_up()
        if self.is_on_gpu:
            scores, found = self._look_up_on_gpu(queries, num_chunks)
        else:
            scores, found = self._look_up(queries, num_chunks, rows)
            if not self.is_exact_in_scores:
                scores, found = self._rank_again(queries, found, num_chunks)
        # Clusters that hold too few, or a filter that cuts the graph: rare, but nobody else would fill the slots.
        short = (found < 0).any(dim=2).any(dim=0).nonzero().flatten()
        if len(short):
            scores[:, short], found[:, short] = super().best_rows(queries[:, short].contiguous(), num_chunks, rows)
        return scores, found

    def nearest_rows(self, queries: Tensor, num_chunks: int, rows: Tensor | None) -> Ranked:
        """Return the nearest rows that FAISS finds, ranked by the store's keys."""
        if self.is_exact(rows) or self.is_on_gpu or not self.finds_by_distance:
            return super().nearest_rows(queries, num_chunks, rows)
        self._catch_up()
        found = self._look_up(queries, num_chunks, rows, by_distance=True)[1]
        scores, found = ranked_again(queries, self.store.search_keys, found, num_chunks, by_distance=True)
        short = (found < 0).any(dim=2).any(dim=0).nonzero().flatten()
        if len(short):
            asked = queries[:, short].contiguous()
            best = exact_top_chunks(asked, self.store.search_keys, num_chunks, None, rows, by_distance=True)
            scores[:, short], found[:, short] = best
        return scores, found

    def mean_keys(self) -> Float[Tensor, "kv_heads 1 dim"]:
        """Return the mean keys that vectors lack."""
        self._catch_up()
        return torch.from_numpy(self._centres).to(self.device).unsqueeze(1)

    def is_exact(self, rows: Tensor | None) -> bool:
        """Return whether all of the store, or of the subset, is compared: it is small, or a GPU has nothing else for it."""
        num_rows = self.store.num_rows
        if num_rows < self.exact_below() * self.rows_per_chunk:
            return True
        if self.is_on_gpu and not (rows is None and self.has_gpu_form and gpu.searches_on(self.device)):
            return True
        return rows is not None and len(rows) < max(EXACT_BELOW * self.rows_per_chunk, self.exact_share * num_rows)

    @property
    def is_on_gpu(self) -> bool:
        """Return whether the store is on a device where FAISS's indexes for the CPU cannot search it."""
        return self.device.type != "cpu"

    def probes(self, file: Any) -> int:
        """Return how many clusters a query looks into, for kinds that have a form for GPUs."""
        raise NotImplementedError

    def _look_up_on_gpu(self, queries: Tensor, num_chunks: int) -> Ranked:
        table = self._table
        try:
            if not self._copies or table.num_labels - self._num_copied > EXACT_BELOW * self.rows_per_chunk:
                self._copies = [gpu.copy_of(file, self.device) for file in self._files]
                self._num_copied = table.num_labels
        except RuntimeError as error:
            warnings.warn(f"FAISS has no such index on a GPU, so all is compared there: {error}", stacklevel=2)
            self.has_gpu_form = False
            return super().best_rows(queries, num_chunks, None)
        # Dead vectors take places: by so much more is asked for, and half of that again, for they stand together.
        count = math.ceil(self.candidates(num_chunks) * (1 + 1.5 * table.num_dead / max(1, table.num_live)))
        count, rows_of = min(count, table.num_live, gpu.MOST_FOUND), torch.from_numpy(table.rows.copy()).to(self.device)
        found = []
        for copy, file, query in zip(self._copies, self._files, queries, strict=True):
            labels = gpu.search(copy, query, max(count, num_chunks), self.probes(file))[1]
            found.append(torch.where(labels < 0, -1, rows_of[labels.clamp(min=0)]))
        candidates, new = torch.stack(found), rows_of[self._num_copied :]
        if len(new := new[new >= 0]):
            latest = super().best_rows(queries, min(num_chunks, len(new)), new)[1]
            candidates = torch.cat([candidates, latest], dim=2)
        return self._rank_again(queries, candidates, num_chunks)

    def _look_up(self, queries: Tensor, num_chunks: int, rows: Tensor | None, by_distance: bool = False) -> Ranked:
        mask = self._table.mask(None if rows is None else rows.numpy())
        selector = None if mask is None else faiss.IDSelectorBitmap(mask)  # type: ignore[arg-type, call-arg]
        share = (self._table.num_live if rows is None else len(rows)) / self._table.num_labels
        count = min(self.candidates(num_chunks), self._table.num_live)
        scores = torch.empty(*queries.shape[:2], count)
        found = torch.empty(*queries.shape[:2], count, dtype=torch.int64)
        for head, (file, query) in enumerate(zip(self._files, queries.numpy(), strict=True)):
            parameters = self.parameters(file, selector, share)
            if by_distance:
                with self._by_distance(file, with_vectors=True):
                    lowered, labels = file.search(query - self._centres[head], count, params=parameters)
            else:
                lowered, labels = file.search(query, count, params=parameters)
            scores[head] = torch.from_numpy(lowered + (query @ self._centres[head])[:, None])
            found[head] = torch.from_numpy(np.where(labels < 0, -1, self._table.rows[labels]))
        return scores, found

    def _rank_again(self, queries: Tensor, found: Tensor, num_chunks: int) -> Ranked:
        """Return the best of the rows found by their exact scores."""
        return ranked_again(queries, self.store.search_keys, found, num_chunks)

    # Changes: noted as they come, carried out at the next search.

    def rows_written(self, rows: Int[Tensor, " rows"]) -> None:
        """Note rows to add; before the first training there is nothing to add them to."""
        if self._files:
            self._table.wait(rows.numpy())

    def rows_moved(self, sources: Int[Tensor, " rows"], destinations: Int[Tensor, " rows"]) -> None:
        """Hand the vectors of the sources to the destinations."""
        if self._files:
            self._table.move(sources.numpy(), destinations.numpy())

    def rows_dropped(self, rows: Int[Tensor, " rows"]) -> None:
        """Make tombstones of the vectors of these rows."""
        if self._files:
            self._table.drop(rows.numpy())

    def note_reencoded(self, count: int) -> None:
        """Note rows whose keys have moved with the encoder, and may have left the clusters behind."""
        self._rows_reencoded += count

    def _catch_up(self) -> None:
        """Train if the store has outgrown what is there, rebuild if too much of it is dead, and add new rows."""
        num_rows, table = self.store.num_rows, self._table
        # A build or an addition that was interrupted has left the heads with vectors that have no label.
        is_whole = bool(self._files) and all(file.ntotal == table.num_labels for file in self._files)
        has_moved = self._rows_reencoded > REENCODED_SHARE_BEFORE_RETRAINING * self._trained_rows
        has_grown = max(num_rows, self._rows_added) >= GROWTH_BEFORE_RETRAINING * self._trained_rows
        if is_whole and not has_moved and not has_grown:
            if table.num_dead <= DEAD_SHARE_BEFORE_REBUILDING * table.num_labels:
                self._add(table.take_waiting(num_rows))
                if table.num_live == num_rows:
                    return  # else an interruption has lost notes
            for file in self._files:
                file.reset()
            self._copies = []
        else:
            self._train()
        table.clear()
        self._add(np.arange(num_rows))

    def _train(self) -> None:
        num_rows = self.store.num_rows
        sample = np.arange(num_rows)
        if num_rows > (count := self.training_points(num_rows)):
            sample = np.sort(np.random.default_rng(0).choice(num_rows, count, replace=False))
        files, centres = [], []
        for keys in self.store.search_keys:
            points = _floats(keys, sample)
            dim = points.shape[1]
            centres.append(points.mean(axis=0))
            file = faiss.index_factory(dim, self.layout(dim, num_rows), faiss.METRIC_INNER_PRODUCT)
            self.prepare(file)
            with self._by_distance(file):
                file.train(self._vectors(points, centres[-1]))
            files.append(file)
        self._files, self._centres, self._trained_rows, self._rows_added = files, np.stack(centres), num_rows, 0
        self._rows_reencoded, self._copies = 0, []

    def _vectors(self, keys: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Return what FAISS gets for these keys; what it rounds must not become inf, so it is cut off first."""
        vectors = keys - centre
        return vectors if self.is_exact_in_scores else vectors.clip(-FLOAT16_LIMIT, FLOAT16_LIMIT)

    def _add(self, rows: Int[np.ndarray, " rows"]) -> None:
        if not len(rows):
            return
        for file, keys, centre in zip(self._files, self.store.search_keys, self._centres, strict=True):
            with self._by_distance(file):
                for start in range(0, len(rows), ROWS_PER_STEP):
                    file.add(self._vectors(_floats(keys, rows[start : start + ROWS_PER_STEP]), centre))
        self._table.add(rows)
        self._rows_added += len(rows)

    @contextmanager
    def _by_distance(self, file: Any, with_vectors: bool = False) -> Iterator[None]:
        """Choose clusters by distance inside the block, and compare the vectors in them so as well, if these are wanted."""
        self.compare_by(file, faiss.METRIC_L2)
        file.metric_type = faiss.METRIC_L2 if with_vectors else faiss.METRIC_INNER_PRODUCT
        try:
            yield
        finally:
            self.compare_by(file, faiss.METRIC_INNER_PRODUCT)
            file.metric_type = faiss.METRIC_INNER_PRODUCT

    # Derived data on disk.

    def export(self) -> SavedIndex | None:
        """Return the FAISS indexes and their labels; rows that wait are left for the reader to add."""
        if not self._files or any(file.ntotal != self._table.num_labels for file in self._files):
            return None
        layout = self.layout(self._centres.shape[1], self._trained_rows)
        return SavedIndex(self._files, self._table.rows.copy(), self._trained_rows, layout, self._centres)

    def adopt(self, saved: SavedIndex) -> bool:
        """Take over saved FAISS indexes if they are what these settings would build."""
        heads, dim = self.store.shape[:2]
        fits = (
            saved.centres.shape == (heads, dim)
            and len(saved.files) == heads
            and saved.trained_rows > 0
            and saved.layout == self.layout(dim, saved.trained_rows)
            and all(file.d == dim and file.ntotal == len(saved.rows) and file.is_trained for file in saved.files)
        )
        if not fits or not self._table.adopt(saved.rows, self.store.num_rows):
            return False
        self._files, self._centres, self._trained_rows = saved.files, saved.centres, saved.trained_rows
        self._copies = []
        for file in self._files:
            self.prepare(file)
        # Of tombstones nobody knows whether they were encoded again, which leaves clusters of another encoder.
        self._rows_reencoded = int((saved.rows < 0).sum())
        return True


class LabelTable:
    """A table between labels and rows, empty at first; every change costs O(changed rows), amortised.

    FAISS numbers the vectors of an index as they are added: 0, 1, 2, ... Such a label never changes, so a row that is
    moved only gets another label in this table, and the label of a dropped row stays behind as a tombstone.

    >>> table = LabelTable()
    >>> table.add(np.array([0, 1, 2]))
    >>> table.drop(np.array([0])); table.move(np.array([2]), np.array([0]))  # as a bank does when row 0 is freed
    >>> table.rows, table.num_dead
    (array([-1,  1,  0]), 1)
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all labels, and the rows that wait for one."""
        self._rows = np.empty(0, dtype=np.int64)
        self._labels = np.empty(0, dtype=np.int64)
        # A row waits at most once, however often it is rewritten, so a bank that is never searched gathers no more.
        self._is_waiting = np.empty(0, dtype=bool)
        self._waiting: list[Int[np.ndarray, " rows"]] = []
        self.num_labels = 0
        self.num_dead = 0

    @property
    def rows(self) -> Int[np.ndarray, " labels"]:
        """Return a view of the row of each label, -1 for a tombstone."""
        return self._rows[: self.num_labels]

    @property
    def num_live(self) -> int:
        """Return the number of rows that have a label."""
        return self.num_labels - self.num_dead

    def labels(self, rows: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
        """Return the label of each row, -1 for rows without one."""
        self._make_room(rows)
        return self._labels[rows]

    def wait(self, rows: Int[np.ndarray, " rows"]) -> None:
        """Note rows that need a label."""
        self._make_room(rows)
        new = rows[~self._is_waiting[rows]]
        if len(new):
            self._is_waiting[new] = True
            self._waiting.append(new.copy())

    def take_waiting(self, num_rows: int) -> Int[np.ndarray, " rows"]:
        """Return the rows below `num_rows` that need a label, sorted, and wait for them no more."""
        if not self._waiting:
            return np.empty(0, dtype=np.int64)
        noted = np.sort(np.concatenate(self._waiting))
        self._is_waiting[noted] = False
        self._waiting = []
        # What was dropped since has ceased to live, or its place was taken by a row that is noted or labelled itself.
        noted = noted[noted < num_rows]
        return noted[self._labels[noted] < 0]

    def add(self, rows: Int[np.ndarray, " rows"]) -> None:
        """Give the next labels to these rows, which have none."""
        stop = self.num_labels + len(rows)
        self._rows = _with_length(self._rows, stop, self.num_labels)
        self._rows[self.num_labels : stop] = rows
        self._make_room(rows)
        self._labels[rows] = np.arange(self.num_labels, stop)
        self.num_labels = stop

    def drop(self, rows: Int[np.ndarray, " rows"]) -> None:
        """Make tombstones of the labels of these rows."""
        labels = self.labels(rows)
        labels = labels[labels >= 0]
        self._rows[labels] = -1
        self._labels[rows] = -1
        self.num_dead += len(labels)

    def move(self, sources: Int[np.ndarray, " rows"], destinations: Int[np.ndarray, " rows"]) -> None:
        """Hand the labels of the sources to the destinations, which have none; without a label they wait for one."""
        labels = self.labels(sources)
        self._make_room(destinations)
        self._labels[sources] = -1
        self._labels[destinations] = labels
        has_label = labels >= 0
        self._rows[labels[has_label]] = destinations[has_label]
        self.wait(destinations[~has_label])

    def adopt(self, rows: Int[np.ndarray, " labels"], num_rows: int) -> bool:
        """Take over the rows of labels of another table, and let the other rows wait; return whether they fit."""
        live = rows[rows >= 0]
        if rows.ndim != 1 or (len(rows) and (rows.min() < -1 or rows.max() >= num_rows)):
            return False
        if len(np.unique(live)) < len(live):
            return False
        self.clear()
        self._rows = rows.astype(np.int64)
        self.num_labels, self.num_dead = len(rows), len(rows) - len(live)
        every = np.arange(num_rows)
        self._make_room(every)
        self._labels[live] = np.flatnonzero(rows >= 0)
        self.wait(every[self._labels[every] < 0])
        return True

    def mask(self, rows: Int[np.ndarray, " rows"] | None) -> UInt8[np.ndarray, " bytes"] | None:
        """Return one bit for each label that may be found, eight in a byte; None if that is every label.

        `rows`: only these; default all that live.
        """
        if rows is None and not self.num_dead:
            return None
        allowed: Bool[np.ndarray, " labels"]
        if rows is None:
            allowed = self.rows >= 0
        else:
            allowed = np.zeros(self.num_labels, dtype=bool)
            allowed[self._labels[rows]] = True
        return np.packbits(allowed, bitorder="little")

    def _make_room(self, rows: Int[np.ndarray, " rows"]) -> None:
        """Let the table by row reach to the largest of `rows`."""
        stop, known = int(rows.max(initial=-1)) + 1, len(self._labels)
        if stop > known:
            self._labels = _with_length(self._labels, stop, known, fill=-1)
            self._is_waiting = _with_length(self._is_waiting, len(self._labels), known, fill=0)


def _floats(keys: Num[Tensor, "rows stored_dim"], rows: Int[np.ndarray, " some"]) -> Float[np.ndarray, "some dim"]:
    """Return some of the keys in float32, on the CPU."""
    return decode(keys[torch.from_numpy(rows).to(keys.device)]).float().cpu().numpy()


def _with_length(array: np.ndarray, length: int, used: int, fill: int = -1) -> np.ndarray:
    """Return the array, or one at least twice as long that starts with its `used` numbers."""
    if length <= len(array):
        return array
    grown = np.full(max(length, 2 * len(array)), fill, dtype=array.dtype)
    grown[:used] = array[:used]
    return grown
