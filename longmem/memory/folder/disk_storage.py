"""Rows whose keys and values are on disk, and whose search keys are in memory: how a bank grows beyond the memory.

Every chunk has a slot: its place in the order of writing, which no other chunk ever gets. A segment is an immutable file
with the chunks of consecutive slots, of all layers. Rows, which an index searches densely, point to slots; moving a row
moves the pointer. What was written since the last file waits in memory.
"""

from __future__ import annotations

import bisect
import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int, Num, Shaped
from torch import Tensor

from longmem.memory.folder.place import SEGMENT_FOLDER, Place
from longmem.memory.folder.tensor_file import TensorFile, not_written, write_tensors
from longmem.memory.rows.documents import Run
from longmem.memory.rows.storage import (
    Chunks,
    KeysValues,
    LayerShape,
    bytes_of_chunk,
    chunks_at,
    decode,
    names_on_device,
    rows_within,
    searched_name,
    sent,
    shape_of,
    with_rows,
)
from longmem.memory.rows.table import Table

# Chunks of so many bytes wait in memory at most, and make one file.
SEGMENT_BYTES = 2**26
# So many segments of about one size are merged into one: a bank that grows by small steps keeps few files.
SEGMENTS_TO_MERGE = 8


@dataclass
class Segment:
    """Chunks of consecutive slots: a file or, while they wait, tensors (`waiting`)."""

    first_slot: int
    num_slots: int
    num_live: int
    file: TensorFile | None = None
    waiting: list[Chunks] | None = None

    def tensor(self, position: int, name: str) -> Tensor:
        """Return the keys, values or search keys of one layer."""
        if self.waiting is not None:
            return getattr(self.waiting[position], name)
        assert self.file is not None
        return self.file.tensor(f"{position}.{name}")

    def empty(self, position: int, name: str, num_pieces: int) -> Shaped[Tensor, "pieces ..."]:
        """Return room for so many chunks, of one head each, of one tensor."""
        if self.file is not None:
            return self.file.empty(f"{position}.{name}", num_pieces)
        tensor = self.tensor(position, name)
        return tensor.new_empty(num_pieces, *tensor.shape[2:])

    def take(
        self, position: int, name: str, places: Int[Tensor, " pieces"], into: Shaped[Tensor, "pieces ..."], check: bool
    ) -> None:
        """Copy what the heads and slots of one tensor, counted as one axis, hold at these places."""
        if self.file is not None:
            self.file.take(f"{position}.{name}", places, into, check)
        else:
            torch.index_select(self.tensor(position, name).flatten(0, 1), 0, places, out=into)


class DiskStorage:
    """The storage of a bank in a folder; `commit` of the folder makes what was written here count.

    Args:
        folder: with the segments.
        place: to write them; None: they are read only.
        storage_dtype: of keys and values.
        device: where search keys are, and gathered chunks go.
        mapped: whether files are read by mapping them.
        before_write: called before anything is written; raises where the bank may not be changed.
    """

    def __init__(
        self,
        folder: Path,
        place: Place | None,
        storage_dtype: torch.dtype,
        device: torch.device,
        mapped: bool,
        before_write: Callable[[], None],
    ) -> None:
        self.folder, self._place = folder, place
        self.storage_dtype = storage_dtype
        self.device = device
        self.mapped = mapped
        self.shapes: list[LayerShape] = []
        self.num_rows = 0
        self.next_slot = 0
        self.segments: list[Segment] = []  # by slot
        # Changes with every change, so that it is known whether a call that failed has done anything; and whether one has
        # failed midway, so that what is here must never be committed.
        self.num_changes, self.is_torn = 0, False
        self._before_write = before_write
        self._waiting_bytes = 0  # counted when they come, because many small writes wait together
        self._slots = torch.empty(0, dtype=torch.int64)  # of each row
        # What was read into memory, by layer and name, with room for rows to come: what a search compares of layers that were
        # searched and, on a GPU with room for it, keys and values that were gathered.
        self._held: dict[tuple[int, str], Tensor] = {}
        self._budget: int | None = None

    # What the bank's contents ask of a storage.

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory and on disk: keys, values and search keys of all slots, also dead ones."""
        waiting = [layer for segment in self.segments for layer in segment.waiting or ()]
        in_files = sum(segment.file.num_bytes for segment in self.segments if segment.file)
        return in_files + sum(tensor.nbytes for layer in waiting for tensor in layer)

    @property
    def num_dead_bytes(self) -> int:
        """Return the bytes in files of slots that no row points to."""
        return sum(
            segment.file.num_bytes * (segment.num_slots - segment.num_live) // segment.num_slots
            for segment in self.segments
            if segment.file is not None
        )

    def place(self, device: torch.device, budget: int | None) -> None:
        self._names_on(device, budget, self.num_rows)
        self.device, self._budget = device, budget
        self._held = {name: sent(tensor, device) for name, tensor in self._held.items() if self._is_held(name[1])}

    def _names_on(self, device: torch.device, budget: int | None, num_rows: int) -> tuple[str, ...]:
        if not self.shapes or device.type == "cpu":
            return (searched_name(self.shapes[0]),) if self.shapes else ()
        return names_on_device(*self._sizes, num_rows, budget)

    @property
    def _sizes(self) -> tuple[list[LayerShape], int, torch.dtype]:
        chunk_size = self.segments[0].empty(0, "keys", 0).shape[1] if self.segments else 1
        return self.shapes, chunk_size, self.storage_dtype

    def _is_held(self, name: str) -> bool:
        return name in self._names_on(self.device, self._budget, self.num_rows)

    def layer(self, position: int) -> DiskLayer:
        return DiskLayer(self, position)

    def reserve(self, layers: Sequence[Chunks], num_rows: int) -> None:
        self._before_write()
        self.num_changes += 1
        if not self.shapes:
            self.shapes = [shape_of(layer) for layer in layers]
        self._names_on(self.device, self._budget, num_rows)
        self._make_room(num_rows)

    def write(self, rows: Int[Tensor, " chunks"], layers: Sequence[Chunks]) -> int:
        """Write one chunk of every layer into each row; return the slot of the first, the others follow it."""
        first_slot, live = self._append(rows, layers), self.num_rows
        self.num_rows = max(live, int(rows.max()) + 1)
        self._held = {key: tensor for key, tensor in self._held.items() if self._is_held(key[1])}
        for (position, name), tensor in self._held.items():
            if self.num_rows > tensor.shape[1]:
                most = rows_within(self._budget, self._names_on(self.device, self._budget, self.num_rows), *self._sizes)
                tensor = with_rows(tensor, max(self.num_rows, min(2 * tensor.shape[1], most)), live)
                self._held[position, name] = tensor
            tensor.index_copy_(1, rows.to(self.device), sent(getattr(layers[position], name), self.device))
        return first_slot

    def rewrite(self, rows: Int[Tensor, " chunks"]) -> int:
        """Write the chunks of these rows anew, to other slots; return the first of them."""
        layers = self.select(rows)
        self.drop(rows)
        return self._append(rows, layers, copy=False)

    def drop(self, rows: Int[Tensor, " rows"]) -> None:
        self.num_changes += 1
        for segment, which in self._by_segment(self._slots[rows]):
            segment.num_live -= len(which)

    def move(self, sources: Int[Tensor, " rows"], destinations: Int[Tensor, " rows"]) -> None:
        """Let rows point where other rows do."""
        if len(sources):
            self._slots[destinations] = self._slots[sources]
            for keys in self._held.values():
                keys.index_copy_(1, destinations.to(self.device), keys.index_select(1, sources.to(self.device)))

    def truncate(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def select(self, rows: Int[Tensor, " chunks"]) -> list[Chunks]:
        """Return copies of these rows, of every layer, in this order, on the CPU, from files that are as they were written.

        Copies are what is written anew, and damage must not get a checksum that fits.
        """
        slots = self._slots[rows]
        return [
            Chunks(*self._take(position, Chunks._fields, slots, check=True)) for position in range(len(self.shapes))
        ]

    def recheck(self, segments: Sequence[Segment] | None = None) -> None:
        """Check segments, all if none are named, again before they are next copied."""
        for segment in self.segments if segments is None else segments:
            if segment.file is not None:
                segment.file.distrust()

    def keep(self, rows: Int[Tensor, " chunks"]) -> DiskStorage:
        """Return these rows as a storage that is only read, also when their files have been removed."""
        twin = copy.copy(self)
        twin.segments, twin._slots, twin.num_rows, twin._held = list(self.segments), self._slots[rows], len(rows), {}
        return twin

    def gather(self, position: int, rows: Int[Tensor, "kv_heads chunks"]) -> KeysValues:
        names = ("keys", "values")
        read = [name for name in names if not self._is_held(name)]
        slots = self._slots[rows.detach().cpu().clamp(min=0)]
        parts = dict(zip(read, self._take(position, read, slots), strict=True)) if read else {}
        keys, values = (
            decode(sent(parts[name], rows.device)) if name in parts else chunks_at(self.held(position, name), rows)
            for name in names
        )
        return keys, values

    def stored(self, position: int) -> tuple[Tensor, Tensor] | None:
        names = "keys", "values"
        if not all(map(self._is_held, names)):
            return None
        for name in names:
            self.held(position, name)
        return self._held[position, "keys"], self._held[position, "values"]

    # Slots and segments.

    def slots_of(self, rows: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        return self._slots[rows]

    def rows_of(self, slots: Int[Tensor, " slots"]) -> Int[Tensor, " slots"]:
        """Return the row that points to each slot, -1 where none does."""
        live, rows = self._slots[: self.num_rows].sort()
        if not len(live):
            return torch.full_like(slots, -1)
        places = torch.searchsorted(live, slots).clamp(max=len(live) - 1)
        return torch.where(live[places] == slots, rows[places], -1)

    def rows_in(self, segments: Sequence[Segment]) -> Int[Tensor, " rows"]:
        """Return the live rows that point into these segments."""
        slots = self._slots[: self.num_rows]
        inside = torch.zeros(len(slots), dtype=torch.bool)
        for segment in segments:
            inside |= (slots >= segment.first_slot) & (slots < segment.first_slot + segment.num_slots)
        return inside.nonzero().flatten()

    def restore(self, segments: Sequence[Segment], next_slot: int, shapes: Sequence[Sequence[int]]) -> None:
        """Take over what the catalogue says; rows follow by `point`."""
        self.segments, self.next_slot = list(segments), next_slot
        self.shapes = [LayerShape(shape[0], shape[1], shape[2], *map(bool, shape[3:])) for shape in shapes]

    def point(self, slots: Int[Tensor, " rows"]) -> None:
        """Let the rows, of which there were none, point to these slots."""
        self.num_rows, self._slots = len(slots), slots
        for segment, which in self._by_segment(slots):
            segment.num_live += len(which)

    @torch.inference_mode(False)  # a first search while the model runs must not keep later ones from being written
    def held(self, position: int, name: str) -> Tensor:
        """Return one tensor of the live rows of one layer, read from the segments, and checked, the first time."""
        if (position, name) not in self._held:
            (tensor,) = self._take(position, (name,), self._slots[: self.num_rows], check=True)
            self._held[position, name] = sent(tensor, self.device)
        return self._held[position, name][:, : self.num_rows]

    def search_keys(self, position: int) -> Num[Tensor, "kv_heads rows stored_key_dim"]:
        """Return what a search of the live rows of one layer compares."""
        keys = self.held(position, searched_name(self.shapes[position]))
        return keys.flatten(1, 2) if self.shapes[position].by_token else keys

    def flush(self) -> None:
        """Write what waits to a file, and to the disk itself; what waits goes on to wait where that raises OSError."""
        waiting = [segment for segment in self.segments if segment.waiting is not None]
        if not waiting:
            return
        first_slot = waiting[0].first_slot
        num_slots, num_live = (sum(getattr(segment, name) for segment in waiting) for name in ("num_slots", "num_live"))
        written = []
        if num_live:
            tensors = {
                f"{position}.{name}": torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
                for position in range(len(self.shapes))
                for name in Chunks._fields
                for parts in [[segment.tensor(position, name) for segment in waiting]]
            }
            assert self._place is not None
            name = self._place.new_name(f"segment-{first_slot:012d}", ".safetensors")
            with self._place.new_file(SEGMENT_FOLDER, name) as new:
                digests = write_tensors(new, tensors)
                num_bytes = new.tell()
            self._place.sync(SEGMENT_FOLDER)
            file = TensorFile(self.folder / name, num_bytes, digests, self.mapped)
            written = [Segment(first_slot, num_slots, num_live, file)]
        self.segments = [segment for segment in self.segments if segment.waiting is None] + written
        self._waiting_bytes = 0
        self.next_slot += 1  # a gap: no run of chunks goes on in another file

    def verify(self) -> list[Path]:
        """Return the files of all segments; raise ValueError, which names the file, unless each is as it was written."""
        files = [segment.file for segment in self.segments if segment.file is not None]
        for file in files:
            file.verify()
        return [file.path for file in files]

    def _append(self, rows: Int[Tensor, " chunks"], layers: Sequence[Chunks], copy: bool = True) -> int:
        self.num_changes += 1
        was_torn, self.is_torn = self.is_torn, True
        num_bytes = sum(tensor.nbytes for layer in layers for tensor in layer)
        if self._waiting_bytes and self._waiting_bytes + num_bytes > SEGMENT_BYTES:
            try:
                self.flush()
            except OSError as error:
                raise not_written(self.folder.parent, error) from error
        first_slot = self.next_slot
        # Copies: what the caller goes on to change, or a view of a whole document, must not be what waits.
        waiting = [Chunks(*(tensor.to("cpu", copy=copy) for tensor in layer)) for layer in layers]
        self.segments.append(Segment(first_slot, len(rows), len(rows), waiting=waiting))
        self._waiting_bytes += num_bytes
        self.next_slot += len(rows)
        self._make_room(int(rows.max()) + 1)
        self._slots[rows] = torch.arange(first_slot, self.next_slot)
        self.is_torn = was_torn
        return first_slot

    def _make_room(self, num_rows: int) -> None:
        if num_rows > len(self._slots):
            slots = torch.empty(max(num_rows, 2 * len(self._slots)), dtype=torch.int64)
            slots[: self.num_rows] = self._slots[: self.num_rows]
            self._slots = slots

    def _take(
        self, position: int, names: Sequence[str], slots: Int[Tensor, "*shape"], *, check: bool = False
    ) -> list[Tensor]:
        """Return tensors of one layer at these slots: the same for all heads, or, with two axes, others for each."""
        heads = self.shapes[position].kv_heads
        slots = slots.expand(heads, -1) if slots.ndim == 1 else slots
        flat = slots.reshape(-1)
        # Segment after segment, and then one more copy that puts all in order: copying to places is slower than from them.
        taken = [self.segments[0].empty(position, name, len(flat)) for name in names]
        order, done = [], 0
        for segment, which in self._by_segment(flat):
            heads_of = which.div(slots.shape[1], rounding_mode="floor")
            places = flat[which] - segment.first_slot + heads_of * segment.num_slots
            for into, name in zip(taken, names, strict=True):
                segment.take(position, name, places, into[done : done + len(which)], check)
            order.append(which)
            done += len(which)
        positions = torch.cat(order) if order else flat
        if (positions.diff() < 0).any():
            back = torch.empty_like(flat)
            back[positions] = torch.arange(len(flat))
            taken = [tensor.index_select(0, back) for tensor in taken]
        return [tensor.unflatten(0, (heads, slots.shape[1])) for tensor in taken]

    def _by_segment(self, slots: Int[Tensor, " slots"]) -> Iterator[tuple[Segment, Int[Tensor, " of_segment"]]]:
        """Yield each segment that holds some of these slots, with the positions of those in `slots`."""
        if not len(slots):
            return
        starts = [segment.first_slot for segment in self.segments]
        low, high = (bisect.bisect_right(starts, int(end)) - 1 for end in slots.aminmax())
        if low == high:
            yield self.segments[low], torch.arange(len(slots))
            return
        which = torch.bucketize(slots, torch.tensor(starts[low : high + 1]), right=True) - 1
        order = which.argsort(stable=True)
        for number, positions in enumerate(order.split(torch.bincount(which, minlength=high - low + 1).tolist())):
            if len(positions):
                yield self.segments[low + number], positions


class DiskLayer:
    """What an index sees of one layer: search keys that are read from the segments when they are first asked for."""

    def __init__(self, storage: DiskStorage, position: int) -> None:
        self._storage, self._position = storage, position

    @property
    def shape(self) -> LayerShape:
        return self._storage.shapes[self._position]

    @property
    def num_rows(self) -> int:
        return self._storage.num_rows

    @property
    def search_keys(self) -> Num[Tensor, "kv_heads rows stored_key_dim"]:
        return self._storage.search_keys(self._position)

    @property
    def device(self) -> torch.device:
        return self._storage.device


def segments_to_merge(storage: DiskStorage) -> list[Segment]:
    """Return segments that are better written anew: many of about one size, or one that is mostly dead.

    So a chunk is rewritten about once for every factor of `SEGMENTS_TO_MERGE` between a commit and a whole segment.
    """
    sizes = defaultdict(list)
    for segment in storage.segments:
        if segment.num_live * 2 < segment.num_slots:
            return [segment]
        if segment.file is not None and segment.file.num_bytes < SEGMENT_BYTES // 2:
            sizes[int(math.log(segment.file.num_bytes, SEGMENTS_TO_MERGE))].append(segment)
    return next((group for group in sizes.values() if len(group) >= SEGMENTS_TO_MERGE), [])


def rewrite(contents: Table, storage: DiskStorage, victims: Sequence[Segment]) -> None:
    """Write the live chunks of these segments to new ones; what nothing points to any longer ends with the next commit.

    As many runs as make a segment are written at once: one by one, a segment of many small ones would take a time that
    grows with the square of their number.
    """
    storage.recheck(victims)
    chunks_at_once = SEGMENT_BYTES // bytes_of_chunk(storage.shapes, contents.chunk_size, contents.storage_dtype)
    batch: list[tuple[Run, Int[Tensor, " _rows"]]] = []
    num_chunks = 0
    serials = contents.ledger.positions(storage.rows_in(victims))[0].unique()
    for document in map(contents.ledger.by_serial.__getitem__, serials.tolist()):
        done = 0
        for run in document.runs:
            if any(0 <= run.slot - segment.first_slot < segment.num_slots for segment in victims):
                batch.append((run, document.rows.values[done : done + run.num_chunks]))
                contents.ledger.changed.add(document.serial)
                num_chunks += run.num_chunks
                if num_chunks >= chunks_at_once:
                    _rewrite_runs(storage, batch)
                    batch, num_chunks = [], 0
            done += run.num_chunks
    _rewrite_runs(storage, batch)


def _rewrite_runs(storage: DiskStorage, batch: list[tuple[Run, Int[Tensor, " _rows"]]]) -> None:
    if batch:
        slot = storage.rewrite(torch.cat([rows for _, rows in batch]))
        for run, _ in batch:
            run.slot = slot
            slot += run.num_chunks
