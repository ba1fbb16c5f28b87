"""What a bank knows about one document: its rows, its source text, its tags and how often it was read."""

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from longmem.memory.rows.segments import Segments

# Keys and values of one memory layer; layers may differ in heads and widths, so sizes have no names (underscore).
LayerTokens = tuple[Float[Tensor, "_kv_heads _tokens _key_dim"], Float[Tensor, "_kv_heads _tokens _value_dim"]]


@dataclass(frozen=True)
class DocumentInfo:
    """What a bank knows about one document; lengths and offsets in tokens of the document, times in seconds since 1970."""

    document_id: str
    num_tokens: int  # written so far, also those since evicted
    num_chunks: int  # resident, so found by search, unless hidden
    num_waiting_tokens: int  # in the last chunk, if it is shorter than the others: found like them, and waits for more
    first_resident_token: int  # where the first resident chunk starts
    tags: tuple[str, ...] = ()
    is_pinned: bool = False
    dated: float | None = None  # when the content was true; None: when it was written
    valid_until: float | None = None  # when it ceases to be; None: never
    is_superseded: bool = False  # it no longer holds, and no search finds it
    superseded_by: str | None = None  # what took its place, if anything did
    num_reads: int = field(default=0, compare=False)  # how often a search returned a chunk of it, for each query
    last_read: float = field(default=0.0, compare=False, repr=False)  # 0: never
    written_at: float = field(default=0.0, compare=False, repr=False)

    @property
    def num_resident_tokens(self) -> int:
        """Return the number of tokens that a search can find, unless the document is hidden."""
        return self.num_tokens - self.first_resident_token


LONG = 2**18  # tokens; the source of a longer document is read from a folder in parts, and let go of once it is there
# What a summary takes from a document as it is.
COUNTED = ("num_chunks", "num_waiting_tokens", "first_resident_token")
KEPT_AND_SHOWN = [each.name for each in fields(DocumentInfo) if each.name not in COUNTED]


class IntQueue:
    """A queue of integers in one tensor; pushing and popping cost O(what is pushed or popped), amortised.

    Consecutive integers (`of_range`), and none, become a tensor when somebody looks: most are never looked at. One that begins
    with int32 becomes one of int64 when a value asks for it; values are at least 0 then.

    >>> queue = IntQueue(dtype=torch.int32)
    >>> queue.push(torch.tensor([1, 2, 3])); queue.pop(2), queue.values
    (tensor([1, 2], dtype=torch.int32), tensor([3], dtype=torch.int32))
    """

    __slots__ = ("_held", "_start", "_stop")

    def __init__(self, dtype: torch.dtype = torch.int64) -> None:
        self._held: Tensor | range = range(0) if dtype is torch.int64 else torch.empty(0, dtype=dtype)
        self._start = self._stop = 0

    @classmethod
    def of_range(cls, values: range) -> "IntQueue":
        """Return a queue of consecutive integers."""
        queue = cls.__new__(cls)
        queue._held, queue._start, queue._stop = values, 0, len(values)
        return queue

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def _data(self) -> Integer[Tensor, " held"]:
        if isinstance(self._held, range):
            self._held = torch.arange(self._held.start, self._held.stop)
        return self._held

    @property
    def values(self) -> Integer[Tensor, " values"]:
        """Return a view of the values, oldest first; it is valid until the next push."""
        return self._data[self._start : self._stop]

    def push(self, values: Integer[Tensor, " values"]) -> None:
        dtype = self._data.dtype
        if dtype is torch.int32 and len(values) and int(values.max()) >= 2**31:
            dtype = torch.int64
        if dtype is not self._data.dtype or self._stop + len(values) > len(self._data):
            data = torch.empty(2 * (len(self) + len(values)), dtype=dtype)
            data[: len(self)] = self.values
            self._held, self._start, self._stop = data, 0, len(self)
        self._data[self._stop : self._stop + len(values)] = values
        self._stop += len(values)

    def pop(self, count: int) -> Integer[Tensor, " count"]:
        """Return the oldest `count` values and drop them."""
        values = self.values[:count].clone()
        self._start += count
        return values

    def cut(self, count: int) -> None:
        self._stop = min(self._stop, self._start + count)


@dataclass(frozen=True)
class SourcePart:
    """The source of some consecutive tokens: their ids and, if known, the text that they came from.

    `char_ends`: for each token the character after its last, counted in `text`; the last token takes what follows it.
    Both are None if the writer gave ids alone.
    """

    token_ids: Int[Tensor, " tokens"]
    text: str | None = None
    char_ends: Int[Tensor, " tokens"] | None = None

    def part(self, start: int, stop: int) -> "SourcePart":
        """Return the source of tokens from `start` to `stop`."""
        ids = self.token_ids[start:stop]
        if self.text is None or self.char_ends is None:
            return SourcePart(ids)
        first = int(self.char_ends[start - 1]) if start else 0
        last = len(self.text) if stop == len(self.token_ids) else int(self.char_ends[stop - 1])
        return SourcePart(ids, self.text[first:last], self.char_ends[start:stop] - first)


class Source:
    """The source of a document, empty at first: the tokens that are resident, and the text from which they came.

    Characters are counted from the start of the document, also when its first tokens have been dropped. A folder holds it up to
    token `stored_to`; what was read from there (`read_to`), for somebody, stays in memory.

    >>> source = Source(has_text=True)
    >>> source.push(SourcePart(torch.tensor([7, 8]), "Call me", torch.tensor([4, 7])))
    >>> source.drop(1); source.ids_of(0, 1).tolist(), source.characters(0, 1)
    ([8], (4, 7, ' me'))
    """

    def __init__(self, has_text: bool, first_char: int = 0, read_to: int = 0) -> None:
        self.has_text = has_text
        self.first_char = first_char
        self.stored_to, self.stays = read_to, read_to > 0
        # As narrow as they can be: with four characters a token these are 12 bytes, not 20.
        self._ids, self._ends = IntQueue(dtype=torch.int32), IntQueue(dtype=torch.int32)
        # The text as it came, where each part of it begins, and where the next one will.
        self._parts: list[str] = []
        self._starts: list[int] = []
        self._end = first_char

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that are left."""
        return len(self._ids)

    def ids_of(self, start: int, stop: int) -> Int[Tensor, " tokens"]:
        """Return a copy of the ids of some of the tokens that are left, counted from the first of them."""
        return self._ids.values[start:stop].to(torch.int64, copy=True)

    def ids_at(self, places: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return the ids of the tokens at these places, counted from the first that is left."""
        return self._ids.values[places].to(torch.int64)

    def push(self, part: SourcePart) -> None:
        self._ids.push(part.token_ids)
        if part.text is not None and part.char_ends is not None:
            self._ends.push(part.char_ends + self._end)
            self._parts.append(part.text)
            self._starts.append(self._end)
            self._end += len(part.text)

    def drop(self, num_tokens: int) -> None:
        """Forget the oldest tokens, and their text."""
        self._ids.pop(num_tokens)
        if self.has_text and num_tokens:
            self.first_char = max(int(self._ends.pop(num_tokens)[-1]), self.first_char)
            gone = max(bisect.bisect_right(self._starts, self.first_char) - 1, 0)
            del self._parts[:gone], self._starts[:gone]

    def behind(self, num_tokens: int) -> "Source":
        """Return an empty source that goes on behind the first `num_tokens` tokens that are left."""
        return Source(self.has_text, self.characters(num_tokens, num_tokens)[0] if self.has_text else 0)

    def part(self, start: int, stop: int) -> SourcePart:
        """Return the source of some of the tokens that are left, counted from the first of them."""
        ids = self.ids_of(start, stop)
        if not self.has_text:
            return SourcePart(ids)
        first, _, text = self.characters(start, stop)
        return SourcePart(ids, text, self._ends.values[start:stop].long() - first)

    def characters(self, start: int, stop: int) -> tuple[int, int, str]:
        """Return the first character of some tokens, the one after the last, and the text between them."""
        first = int(self._ends.values[start - 1]) if start else self.first_char
        last = int(self._ends.values[stop - 1]) if stop > start else first
        if first >= last:
            return first, last, ""
        low = bisect.bisect_right(self._starts, first) - 1
        text = "".join(self._parts[low : bisect.bisect_left(self._starts, last)])
        return first, last, text[first - self._starts[low] : last - self._starts[low]]


SourceReader = Callable[[int, int, int], Source | None]  # of a document's serial and a range of its tokens


class StoredSource:
    """The source of tokens `start` to `stored_to` of a document, which a folder holds, and of those that were written since.

    `read` returns what the folder holds of some tokens, given the document's serial and their range.
    """

    __slots__ = ("_fresh", "_read", "_serial", "start", "stored_to")

    def __init__(self, read: SourceReader, serial: int, start: int, stored_to: int) -> None:
        self._read, self._serial, self.start, self.stored_to = read, serial, start, stored_to
        self._fresh: Source | None = None

    @property
    def fresh(self) -> Source | None:
        """Return the source of the tokens that were written since; None where that of those before them is not there."""
        if self._fresh is None and (last := self._read(self._serial, self.stored_to - 1, self.stored_to)) is not None:
            self._fresh = last.behind(last.num_tokens)
        return self._fresh

    def of(self, start: int, stop: int) -> Source | None:
        """Return the source of some tokens, counted in the document; None if it is not all there."""
        fresh, end = self._fresh, self.stored_to
        found = self._read(self._serial, start, min(stop, end)) if start < end else fresh and fresh.behind(start - end)
        if found is not None and fresh is not None and stop > end:
            found.push(fresh.part(max(start - end, 0), stop - end))
        return found

    def stored(self, stop: int) -> None:
        """Hold no longer what is now in the folder, up to the last token."""
        self._fresh, self.stored_to = self._fresh and self._fresh.behind(self._fresh.num_tokens), stop


@dataclass(eq=False, slots=True)
class Run:
    """A run of consecutive chunks of one document, written together."""

    document: "Document"
    num_chunks: int
    written_at: float
    order: int
    slot: int = -1  # where the first of them is on disk
    stored: tuple[int, int, int] | None = None  # what the catalogue holds: first chunk, number of chunks, slot


@dataclass(eq=False, slots=True)
class Document:
    """The record of one document.

    `serial` is its number in the ledger, -1 before it is entered; it is never used again, so that a document that
    replaces another of the same name cannot inherit rows.
    """

    document_id: str
    serial: int = -1
    num_tokens: int = 0
    tags: tuple[str, ...] = ()
    is_pinned: bool = False
    dated: float | None = None
    valid_until: float | None = None
    is_superseded: bool = False
    superseded_by: str | None = None
    segments: Segments = field(default_factory=Segments)
    num_reads: int = 0
    last_read: float = 0.0
    written_at: float = field(default_factory=time.time)
    rows: IntQueue = field(default_factory=IntQueue)
    # Oldest first; a list, because an empty deque takes more room than the rest of a document.
    runs: list[Run] = field(default_factory=list)
    # Source of the resident tokens; None where the writer gave none.
    source_or_stored: Source | StoredSource | None = None

    @property
    def source(self) -> Source | None:
        """Return the source of the resident tokens, None if the writer gave none."""
        if isinstance(self.source_or_stored, StoredSource):
            self.source_or_stored = self.source_or_stored.of(self.source_or_stored.start, self.num_tokens)
        return self.source_or_stored

    @property
    def newest_source(self) -> Source | None:
        """Return the source of the newest tokens, as far as it is in memory: perhaps of none; None if the writer gave none."""
        held = self.source_or_stored
        return held.fresh if isinstance(held, StoredSource) else held

    def source_of(self, start: int | None, stop: int | None, chunk_size: int) -> tuple[Source | None, int, int]:
        """Return a source that has those resident tokens that are from `start` to `stop`, and which of its own they are.

        Of a long document in a folder no more than these is read, and nothing stays, unless all are asked for.
        """
        held, first, end = self.source_or_stored, self.first_chunk(chunk_size) * chunk_size, self.num_tokens
        low, high = (min(max(each, first), end) for each in (start or 0, end if stop is None else stop))
        high = max(low, high)
        if isinstance(held, StoredSource) and LONG < end - first > high - low:
            first = min(low, end - 1)  # of no tokens, too, the text is known by that of one
            return held.of(first, max(high, first + 1)), low - first, high - first
        return self.source, low - first, high - first

    def source_is_stored(self, read: SourceReader) -> None:
        """Let go of a long source that nobody has asked for: a folder now holds all of it; `read` as for `StoredSource`."""
        held = self.source_or_stored
        if isinstance(held, StoredSource):
            held.stored(self.num_tokens)
        elif held is not None and (held.stays or held.num_tokens <= LONG):
            held.stored_to = self.num_tokens
        elif held is not None:
            self.source_or_stored = StoredSource(read, self.serial, self.num_tokens - held.num_tokens, self.num_tokens)

    @property
    def date(self) -> float:
        """Return when the content was true: when it was written, if nobody said."""
        return self.written_at if self.dated is None else self.dated

    def num_chunks(self, chunk_size: int) -> int:
        """Return how many chunks were written so far, also those since evicted; the last one may be shorter."""
        return -(-self.num_tokens // chunk_size)

    def first_chunk(self, chunk_size: int) -> int:
        """Return the position in the document, in chunks, of its first resident chunk."""
        return self.num_chunks(chunk_size) - len(self.rows)

    def push_source(self, part: SourcePart) -> None:
        """Add the source of new tokens."""
        if self.source_or_stored is None:
            self.source_or_stored = Source(has_text=part.text is not None)
        assert self.newest_source is not None
        self.newest_source.push(part)

    def info(self, chunk_size: int) -> DocumentInfo:
        counted = len(self.rows), self.num_tokens % chunk_size, self.first_chunk(chunk_size) * chunk_size
        said = {name: getattr(self, name) for name in KEPT_AND_SHOWN} | dict(zip(COUNTED, counted, strict=True))
        return DocumentInfo(**said)
