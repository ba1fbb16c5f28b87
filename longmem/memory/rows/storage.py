"""Where a bank keeps keys, values and search keys: rows of one chunk each, in memory or on disk.

Keys and values are stored as floats of the storage dtype, or in one byte a number with a scale for each vector.
int8: a vector (of one token and head) becomes `dim` whole numbers from -127 to 127 and, in the two bytes behind them, the
bfloat16 scale to multiply them by. One tensor holds all, so whoever copies, moves or saves rows need not know of scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Num, Shaped
from torch import Tensor

FLOATING_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STORAGE_DTYPES = {**FLOATING_DTYPES, "int8": torch.int8}

LARGEST_NUMBER = 2.0**100  # a single chunk with a mean or a score of inf would spoil every read of a bank
LARGEST_STEP = 127
# bfloat16 for its range, that of float32: a float16 scale is inf for vectors that reach 1e7 and 0 for those below 4e-6.
SCALE_DTYPE = torch.bfloat16
# Scales below it would be subnormal, and zero on some devices; it makes zeros of zeros.
SMALLEST_SCALE = torch.finfo(SCALE_DTYPE).tiny


def stored_width(dim: int, storage_dtype: torch.dtype) -> int:
    """Return the width of the stored form of vectors of `dim` numbers.

    >>> stored_width(64, torch.int8), stored_width(64, torch.float16)
    (66, 64)
    """
    return dim + (SCALE_DTYPE.itemsize if storage_dtype == torch.int8 else 0)


def vector_width(stored: int, storage_dtype: torch.dtype) -> int:
    """Return the `dim` whose `stored_width` is `stored`."""
    return stored - stored_width(0, storage_dtype)


def largest_number(storage_dtype: torch.dtype) -> float:
    """Return the largest number that is stored: one that `decode` gives back, and whose means and scores are finite."""
    return min(torch.finfo(torch.float32 if storage_dtype == torch.int8 else storage_dtype).max, LARGEST_NUMBER)


def encode(vectors: Float[Tensor, "*axes dim"], storage_dtype: torch.dtype) -> Num[Tensor, "*axes stored_dim"]:
    """Return vectors as they are stored: a cast or, for int8, absmax / 127 as the scale of each and rounding to nearest.

    No number is then further than absmax / 254 * (1 + 1/256) from its decoded form, and none needs clipping: the scale,
    rounded to nearest like the rest, is at most 1/257 short, which makes 127.496 of 127. Vectors below 1e-36 are kept to
    6e-39.

    >>> encode(torch.tensor([[254.0, -3.0, 0.0], [0.0, 0.0, 0.0]]), torch.int8)[:, :3]
    tensor([[127,  -2,   0],
            [  0,   0,   0]], dtype=torch.int8)
    """
    if storage_dtype != torch.int8:
        return vectors.to(storage_dtype)
    vectors = vectors.float()
    scale = (vectors.abs().amax(dim=-1, keepdim=True) / LARGEST_STEP).to(SCALE_DTYPE).clamp_min(SMALLEST_SCALE)
    return torch.cat([(vectors / scale).round().to(torch.int8), scale.view(torch.int8)], dim=-1)


def decode(stored: Num[Tensor, "*axes stored_dim"]) -> Float[Tensor, "*axes dim"]:
    """Return the vectors that `encode` was given, rounded: float32 for int8, else as they are stored.

    float32, because the product of seven and eight bits is exact there, because nothing overflows, and because a CPU
    computes attention in it: products in half precision take it twice the time, and would then be cast.
    """
    if stored.dtype != torch.int8:
        return stored
    dim = vector_width(stored.shape[-1], stored.dtype)
    # A copy, always: the bytes of a single vector are contiguous as they are, but may start at an odd address.
    scale = stored[..., dim:].clone(memory_format=torch.contiguous_format).view(SCALE_DTYPE)
    return stored[..., :dim].float().mul_(scale)


class LayerShape(NamedTuple):
    """What all chunks of one memory layer share: sizes, where key and value heads may have different widths, and search.

    `by_token`: a chunk is found by its best key, so the keys themselves are searched and no search keys are stored.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    by_token: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return the number of heads, and the widths of keys and values."""
        return self.kv_heads, self.key_dim, self.value_dim


class Chunks(NamedTuple):
    """The chunks of one memory layer, ready to be written: keys and values encoded, search keys not.

    Where chunks are found by their best token, search keys have no width. A chunk that is shorter than the others, the last
    of its document, is filled up with copies of its last token: so its best key is the best of its own, and only attention,
    which would count them, has to leave the copies out (`Found.sizes`).
    """

    keys: Num[Tensor, "kv_heads chunks chunk_size stored_key_dim"]
    values: Num[Tensor, "kv_heads chunks chunk_size stored_value_dim"]
    search_keys: Float[Tensor, "kv_heads chunks key_dim"]


# Keys and values that were gathered, other chunks for each head.
KeysValues = tuple[
    Float[Tensor, "kv_heads chunks chunk_size key_dim"], Float[Tensor, "kv_heads chunks chunk_size value_dim"]
]


@runtime_checkable
class LayerRows(Protocol):
    """What an index sees of one layer: `num_rows` live rows and their search keys, dense for each head, as they are stored.

    Where chunks are found by their best token, search keys are those of all tokens, row by row, in the storage dtype; else
    they are float32. What is searched is a view; `decode` is for the part that is compared at a time.
    """

    @property
    def shape(self) -> LayerShape: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def search_keys(self) -> Num[Tensor, "kv_heads rows stored_key_dim"]: ...
    @property
    def device(self) -> torch.device: ...


def shape_of(chunks: Chunks) -> LayerShape:
    """Return the sizes of chunks."""
    key_dim, value_dim = (vector_width(each.shape[3], each.dtype) for each in chunks[:2])
    return LayerShape(chunks.keys.shape[0], key_dim, value_dim, by_token=chunks.search_keys.shape[2] == 0)


def bytes_of_chunk(shapes: Sequence[LayerShape], chunk_size: int, storage_dtype: torch.dtype) -> int:
    """Return the bytes of one chunk in all layers: keys, values and the search key, if there is one.

    >>> bytes_of_chunk([LayerShape(2, 64, 64)], 4, torch.float16)
    2560
    >>> bytes_of_chunk([LayerShape(2, 64, 64, by_token=True)], 4, torch.float16)
    2048
    """
    return sum(bytes_by_name(shapes, chunk_size, storage_dtype).values())


def bytes_by_name(shapes: Sequence[LayerShape], chunk_size: int, storage_dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes of one chunk in all layers, for each field of `Chunks`."""
    number = chunk_size * storage_dtype.itemsize
    return {
        "keys": sum(shape.kv_heads * stored_width(shape.key_dim, storage_dtype) * number for shape in shapes),
        "values": sum(shape.kv_heads * stored_width(shape.value_dim, storage_dtype) * number for shape in shapes),
        "search_keys": sum(shape.kv_heads * shape.key_dim * 4 for shape in shapes if not shape.by_token),
    }


def searched_name(shape: LayerShape) -> str:
    """Return which field of `Chunks` a search compares."""
    return "keys" if shape.by_token else "search_keys"


def names_on_device(
    shapes: Sequence[LayerShape], chunk_size: int, storage_dtype: torch.dtype, num_rows: int, budget: int | None
) -> tuple[str, ...]:
    """Return which fields of so many chunks a device holds: all, if they fit in `budget` bytes, else what a search compares.

    Raises ValueError if that does not fit.
    """
    if budget is None or not shapes:
        return Chunks._fields
    sizes, searched = bytes_by_name(shapes, chunk_size, storage_dtype), searched_name(shapes[0])
    whole, needed = num_rows * sum(sizes.values()), num_rows * sizes[searched]
    if needed > budget:
        raise ValueError(
            f"`device_budget` must have room for what a search compares, {needed:,} bytes for {num_rows:,} chunks "
            f"({whole:,} with all keys and values), got {budget:,}; raise it, or keep the bank in host memory: "
            '`bank.to("cpu")`.'
        )
    return Chunks._fields if whole <= budget else (searched,)


def rows_within(
    budget: int | None, names: Sequence[str], shapes: Sequence[LayerShape], chunk_size: int, storage_dtype: torch.dtype
) -> int:
    """Return for how many chunks there is room in a budget where these fields are on the device."""
    if budget is None:
        return 2**63
    sizes = bytes_by_name(shapes, chunk_size, storage_dtype)
    return budget // max(1, sum(sizes[name] for name in names))


def default_budget(device: torch.device) -> int | None:
    """Return the bytes that a bank may take of a device: half of what is free on a GPU now; None: as many as it needs."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else None


def sent(tensor: Shaped[Tensor, "*shape"], device: torch.device) -> Shaped[Tensor, "*shape"]:
    """Return a tensor on a device; from host memory to a GPU through pinned memory, so that nobody waits for the copy."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def chunks_at(
    tensor: Num[Tensor, "kv_heads rows chunk_size stored_dim"], rows: Int[Tensor, "kv_heads chunks"]
) -> Float[Tensor, "kv_heads chunks chunk_size dim"]:
    """Return copies of these rows, decoded, other ones for each head, where `rows` are; row -1 is read as row 0."""
    return _taken(tensor, _places(tensor, rows), rows)


def _places(tensor: Tensor, rows: Int[Tensor, "kv_heads chunks"]) -> Int[Tensor, " places"]:
    """Return where rows are among those of all heads, on the device of the tensor that has them."""
    heads, allocated = tensor.shape[:2]
    places = rows.to(tensor.device).clamp(min=0)
    if heads > 1:
        places = places + allocated * torch.arange(heads, device=tensor.device).unsqueeze(1)
    return places.flatten()


def _taken(tensor: Tensor, places: Int[Tensor, " places"], rows: Int[Tensor, "kv_heads chunks"]) -> Tensor:
    # One index_select over (heads * rows) copies whole chunks; `gather` would need an index for every number.
    return decode(sent(tensor.flatten(0, 1).index_select(0, places), rows.device)).unflatten(0, rows.shape)


def cut_into_chunks(
    keys: Float[Tensor, "kv_heads tokens key_dim"],
    values: Float[Tensor, "kv_heads tokens value_dim"],
    chunk_size: int,
    storage_dtype: torch.dtype,
    by_token: bool = False,
    begun: tuple[Chunks, int] | None = None,
) -> Chunks:
    """Return the tokens as chunks; the search key is the float32 mean of the keys before they are rounded.

    A last, shorter chunk is filled up with copies of its last token, which do not count in the mean. `by_token`: there are no
    search keys. `begun`: a chunk with so many tokens, which the first of these tokens go on to fill; what comes out is, bit
    for bit, what all tokens at once would give.

    >>> chunks = cut_into_chunks(torch.ones(2, 7, 3), torch.ones(2, 7, 5), 4, torch.float16)
    >>> [tuple(tensor.shape) for tensor in chunks]
    [(2, 2, 4, 3), (2, 2, 4, 5), (2, 2, 3)]
    """
    first = 0 if begun is None else begun[1]
    stop = first + keys.shape[1]
    places = torch.arange(-(-stop // chunk_size) * chunk_size, device=keys.device)
    search_keys = keys.new_zeros(len(keys), len(places) // chunk_size, 0 if by_token else keys.shape[2]).float()
    encoded = [encode(tensor, storage_dtype) for tensor in (keys, values)]
    if begun is not None:
        before = begun[0].keys, begun[0].values
        encoded = [torch.cat([old[:, 0, :first], new], dim=1) for old, new in zip(before, encoded, strict=True)]
        search_keys[:, :1] = begun[0].search_keys
    if len(places) > stop:
        encoded = [tensor.index_select(1, places.clamp(max=stop - 1)) for tensor in encoded]
    for place in range(0 if by_token else chunk_size):
        # From token to token, with nothing but the mean so far: the same roundings, whatever pieces the tokens come in.
        own = keys[:, (place - first) % chunk_size if place < first else place - first :: chunk_size].float()
        means = search_keys[:, int(place < first) :][:, : own.shape[1]]
        means.mul_(place).add_(own).div_(place + 1)
    cut_keys, cut_values = (tensor.unflatten(1, (-1, chunk_size)) for tensor in encoded)
    return Chunks(cut_keys, cut_values, search_keys)


class ChunkStore:
    """A store for the chunks of one memory layer: at most `capacity` rows (None: no limit), one chunk in each.

    Live rows are always `[0, num_rows)`: whoever frees a row in the middle moves the last live row into it. So exact
    search runs over one dense tensor without a mask. Memory grows by doubling, up to `capacity` rows. It begins with `chunks`,
    perhaps none, row by row, in these very tensors (which may be memory-mapped).

    >>> store = ChunkStore(cut_into_chunks(torch.ones(2, 8, 3), torch.ones(2, 8, 5), 4, torch.float16))
    >>> store.num_rows, tuple(store.search_keys.shape)
    (2, (2, 2, 3))
    """

    def __init__(self, chunks: Chunks, capacity: int | None = None) -> None:
        self.shape, self.capacity = shape_of(chunks), capacity
        self.num_rows = chunks.keys.shape[1]
        self._tensors = chunks

    @property
    def live(self) -> Chunks:
        """Return views of the live rows, `[0, num_rows)`; they are valid until the next write or move."""
        return Chunks(*(tensor[:, : self.num_rows] for tensor in self._tensors))

    @property
    def search_keys(self) -> Num[Tensor, "kv_heads rows stored_key_dim"]:
        """Return a view of what a search compares: float32 search keys of the live rows, or all tokens' keys as stored."""
        if self.shape.by_token:
            return self._tensors.keys[:, : self.num_rows].flatten(1, 2)
        return self._tensors.search_keys[:, : self.num_rows]

    @property
    def device(self) -> torch.device:
        """Return where a search compares."""
        return getattr(self._tensors, searched_name(self.shape)).device

    def place(self, device: torch.device, names: Sequence[str]) -> None:
        """Keep the tensors of these names on a device, and the others in host memory."""
        host = torch.device("cpu")
        places = (device if name in names else host for name in Chunks._fields)
        self._tensors = Chunks(*(sent(tensor, place) for tensor, place in zip(self._tensors, places, strict=True)))

    @property
    def num_allocated(self) -> int:
        """Return how many rows there is room for."""
        return self._tensors.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensors, with the room that growth has reserved."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def reserve(self, num_rows: int, most: int = 2**63) -> None:
        """Make room for `num_rows` rows in all, and for up to `most`: the only step of a write that allocates and may fail."""
        allocated = self.num_allocated
        if num_rows > allocated:
            most = most if self.capacity is None else min(most, self.capacity)
            rows = max(num_rows, min(2 * allocated, most))
            self._tensors = Chunks(*(with_rows(tensor, rows, self.num_rows) for tensor in self._tensors))

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all rows, as they are stored, with the room for rows to come."""
        return self._tensors.keys, self._tensors.values

    def write(self, rows: Int[Tensor, " chunks"], chunks: Chunks) -> None:
        """Write one chunk into each row; rows beyond the live ones must continue them without a gap."""
        if not len(rows):
            return
        num_rows = max(self.num_rows, int(rows.max()) + 1)
        assert num_rows <= self.num_rows + len(rows)
        self.reserve(num_rows)
        for tensor, written in zip(self._tensors, chunks, strict=True):
            tensor.index_copy_(1, rows.to(tensor.device), sent(written, tensor.device))
        self.num_rows = num_rows

    def move(self, sources: Int[Tensor, " rows"], destinations: Int[Tensor, " rows"]) -> None:
        """Copy rows onto other rows; no row may be both a source and a destination."""
        if not len(sources):
            return
        for tensor in self._tensors:
            moved = tensor.index_select(1, sources.to(tensor.device))
            tensor.index_copy_(1, destinations.to(tensor.device), moved)

    def truncate(self, num_rows: int) -> None:
        """Forget the rows from `num_rows` on; their memory is kept for the rows to come."""
        assert num_rows <= self.num_rows
        self.num_rows = num_rows

    def select(self, rows: Int[Tensor, " chunks"]) -> Chunks:
        """Return copies of these rows, the same for every head, in this order."""
        return Chunks(*(tensor.index_select(1, rows.to(tensor.device)) for tensor in self._tensors))

    def gather(self, rows: Int[Tensor, "kv_heads chunks"]) -> KeysValues:
        """Return copies of the keys and values of these rows, as `chunks_at` does."""
        keys, values, _ = self._tensors
        places = _places(keys, rows)
        return _taken(keys, places, rows), _taken(values, places.to(values.device), rows)


def with_rows(tensor: Tensor, rows: int, num_live: int) -> Tensor:
    """Return a tensor with room for `rows` rows that starts with the live rows of `tensor`."""
    grown = tensor.new_empty(tensor.shape[0], rows, *tensor.shape[2:])
    grown[:, :num_live] = tensor[:, :num_live]
    return grown


class Storage(Protocol):
    """Keys, values and search keys of all layers, in rows `[0, num_rows)` that hold one chunk each.

    Layers are counted by position. `reserve` allocates whatever the writes up to `num_rows` rows need, so that they cannot
    fail for want of memory. `write` writes one chunk of every layer into each row, and returns where the first of them is on
    disk, -1 for nowhere. `drop` names rows that are given up, before they are overwritten or moved onto; `keep` returns some
    rows as they are, in a storage of their own that is only read. `place` keeps it on a device, within a budget of bytes there:
    see `names_on_device`; what has no room there stays in host memory or on disk. `gather` answers where its rows are.
    """

    @property
    def shapes(self) -> list[LayerShape]: ...  # of each layer; none before the first write has fixed them
    @property
    def nbytes(self) -> int: ...
    def place(self, device: torch.device, budget: int | None) -> None: ...
    def layer(self, position: int) -> LayerRows: ...
    def reserve(self, layers: Sequence[Chunks], num_rows: int) -> None: ...
    def write(self, rows: Int[Tensor, " chunks"], layers: Sequence[Chunks]) -> int: ...
    def drop(self, rows: Int[Tensor, " rows"]) -> None: ...
    def move(self, sources: Int[Tensor, " rows"], destinations: Int[Tensor, " rows"]) -> None: ...
    def truncate(self, num_rows: int) -> None: ...
    def select(self, rows: Int[Tensor, " chunks"]) -> list[Chunks]: ...
    def keep(self, rows: Int[Tensor, " chunks"]) -> Storage: ...
    def recheck(self) -> None: ...  # so that what is selected next is found to be as it was written
    def gather(self, position: int, rows: Int[Tensor, "kv_heads chunks"]) -> KeysValues: ...
    # Tensors with all rows, None where there are none.
    def stored(self, position: int) -> tuple[Tensor, Tensor] | None: ...


class MemoryStorage:
    """A storage in memory, or on a GPU, empty at first; it grows by doubling, up to `capacity` rows (None: no limit)."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.stores: list[ChunkStore] = []
        self.shapes: list[LayerShape] = []  # of each layer
        self._device = torch.device("cpu")
        self._budget: int | None = None
        self._names: tuple[str, ...] = Chunks._fields  # of what is on the device

    def place(self, device: torch.device, budget: int | None) -> None:
        if self.stores:
            sizes = self._sizes
            self._names = names_on_device(*sizes, self.stores[0].num_allocated, budget)
            for store in self.stores:
                store.place(device, self._names)
        self._device, self._budget = device, budget

    @property
    def _sizes(self) -> tuple[list[LayerShape], int, torch.dtype]:
        keys = self.stores[0].live.keys
        return self.shapes, keys.shape[2], keys.dtype

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores)

    def layer(self, position: int) -> ChunkStore:
        return self.stores[position]

    def reserve(self, layers: Sequence[Chunks], num_rows: int) -> None:
        if not self.stores:
            empty = [Chunks(*(tensor[:, :0].clone() for tensor in layer)) for layer in layers]
            self.stores = [ChunkStore(layer, self.capacity) for layer in empty]
            self.shapes = [store.shape for store in self.stores]
        names = names_on_device(*self._sizes, num_rows, self._budget)
        if names != self._names:
            self._names = names
            for store in self.stores:
                store.place(self._device, names)
        for store in self.stores:
            store.reserve(num_rows, rows_within(self._budget, names, *self._sizes))

    def write(self, rows: Int[Tensor, " chunks"], layers: Sequence[Chunks]) -> int:
        """Write one chunk of every layer into each row; there is no place on disk, -1."""
        for store, layer in zip(self.stores, layers, strict=True):
            store.write(rows, layer)
        return -1

    def drop(self, rows: Int[Tensor, " rows"]) -> None:
        """Give up rows: nothing to do here."""

    def move(self, sources: Int[Tensor, " rows"], destinations: Int[Tensor, " rows"]) -> None:
        for store in self.stores:
            store.move(sources, destinations)

    def truncate(self, num_rows: int) -> None:
        for store in self.stores:
            store.truncate(num_rows)

    def recheck(self) -> None:
        """Nothing to do here: memory has no checksums."""

    def select(self, rows: Int[Tensor, " chunks"]) -> list[Chunks]:
        return [store.select(rows) for store in self.stores]

    def keep(self, rows: Int[Tensor, " chunks"]) -> MemoryStorage:
        twin = MemoryStorage()
        twin.stores = [ChunkStore(chunks) for chunks in self.select(rows)]
        twin.shapes = self.shapes
        return twin

    def gather(self, position: int, rows: Int[Tensor, "kv_heads chunks"]) -> KeysValues:
        return self.stores[position].gather(rows)

    def stored(self, position: int) -> tuple[Tensor, Tensor] | None:
        return self.stores[position].stored
