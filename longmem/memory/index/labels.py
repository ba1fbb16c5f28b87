"""Which row of a store each vector of a FAISS index stands for, while rows are written, moved and dropped."""

import numpy as np
from jaxtyping import Bool, Int, UInt8


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


def _with_length(array: np.ndarray, length: int, used: int, fill: int = -1) -> np.ndarray:
    """Return the array, or one at least twice as long that starts with its `used` numbers."""
    if length <= len(array):
        return array
    grown = np.full(max(length, 2 * len(array)), fill, dtype=array.dtype)
    grown[:used] = array[:used]
    return grown
