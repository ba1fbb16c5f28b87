"""Encoding again: stale segments, exactly as they were written, one document after the other, each at one stroke."""

import bisect
import dataclasses
import itertools
import math
import queue
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from longmem.encoder.history import UNKNOWN, Encoders
from longmem.errors import StaleMemoryError
from longmem.memory.protocols import Writer
from longmem.memory.rows.documents import Document, LayerTokens
from longmem.memory.rows.segments import Segment
from longmem.memory.rows.storage import Chunks, decode, largest_number
from longmem.memory.rows.table import Table

CLOCKS = ("version", "gap", "probe")
# Documents with some of their segments; and these with the ids of each, or with what they were encoded to.
Targets = list[tuple[Document, list[Segment]]]
Job = tuple[Document, list[tuple[Segment, Tensor]]]
Encoded = tuple[Document, list[tuple[Segment, list[LayerTokens]]]]


@dataclasses.dataclass(frozen=True)
class Lags:
    """The lag of each version of a bank's encoders on a clock; the last entry is that of the unknown encoder.

    The clocks agree only in what is fresh: "version", how often the encoder has changed since, is cheap, and blind to how much;
    "gap", how far its weights have moved, relative to their norm, from sketches (`longmem/encoder/sketch.py`); "probe", how far
    its keys have moved: relative distance between stored keys and the same tokens encoded now.

    `values`: 0 for what is fresh, inf where a clock can't tell. `probed`: what the clock "probe" has measured, by version. They
    are those of one moment: of encoders that come later nothing is said.
    """

    encoders: Encoders
    clock: str = "version"
    probed: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoders", self.encoders.copy())

    @property
    def values(self) -> Float[Tensor, " versions"]:
        """Return the lags, as float64."""
        counts = self.encoders.lags()
        if self.clock == "gap":
            found = [torch.inf if gap is None else gap for gap in self.encoders.gaps()]
        elif self.clock == "probe":
            found = [self.probed.get(version, torch.inf) if count else 0.0 for version, count in enumerate(counts)]
        else:
            found = [float(count) for count in counts]
        return torch.tensor([*found, torch.inf], dtype=torch.float64)

    @property
    def is_fresh(self) -> Bool[Tensor, " versions"]:
        """Return for each version whether the current encoder is the one; where no encoder was ever named, all are."""
        counts = self.encoders.lags()
        return torch.tensor([*(count == 0 for count in counts), not counts])


@dataclasses.dataclass
class RefreshReport:
    """What a refresh did: tokens and segments encoded again, documents rewritten, seconds it took.

    `failed`: segments whose new numbers were not finite, which stay as they were. `mapped`: segments moved by a map.
    `probed_tokens`: encoded to measure how far keys have moved, and thrown away.
    """

    tokens: int = 0
    segments: int = 0
    documents: int = 0
    failed: int = 0
    mapped: int = 0
    probed_tokens: int = 0
    seconds: float = 0.0

    def add(self, other: "RefreshReport") -> None:
        """Add what another refresh did."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def since(self, before: "RefreshReport") -> "RefreshReport":
        """Return what was done after an earlier state of this report."""
        return RefreshReport(**{name: value - getattr(before, name) for name, value in vars(self).items()})


@dataclasses.dataclass
class RefreshState:
    """The table of a bank, and what its refresh policy has found and done."""

    table: Table
    reads_mapped: bool = False  # whether the policy reads what a map has moved to the current encoder
    # All that was encoded again since the bank was made or opened; what the clock "probe" has measured, by version;
    # stale chunks that a read has found and could not have encoded again there and then: encoder, document's serial, position.
    refreshed: RefreshReport = dataclasses.field(default_factory=RefreshReport)
    probed: dict[int, float] = dataclasses.field(default_factory=dict)
    wanted: set[tuple[str, int, int]] = dataclasses.field(default_factory=set)
    warned: set[str] = dataclasses.field(default_factory=set)

    @property
    def may_write(self) -> bool:
        """Return whether the bank can be written to."""
        try:
            self.table.refuse_reader()
        except ValueError:
            return False
        return True

    def lags(self, clock: str = "version") -> Lags:
        """Return how far each version of the encoder is behind, on a clock."""
        return Lags(self.table.encoders, clock, self.probed)

    def warn_once(self, about: str, message: str) -> None:
        """Warn of something, once in the life of the bank."""
        if about not in self.warned:
            self.warned.add(about)
            warnings.warn(message, stacklevel=3)


class Refresher:
    """What brings a bank up to date with an encoder, and all that a refresh policy gets to work with.

    `writers`: equal encoders; with several, each encodes on a thread of its own (one for each device).
    """

    def __init__(self, state: RefreshState, writers: Sequence[Writer]) -> None:
        self.state, self.table, self.writers = state, state.table, list(writers)

    def stale(self, is_readable: Sequence[bool] | None = None, *, mapped_is_fresh: bool | None = None) -> Targets:
        """Return the segments of each document that can be encoded again and are not readable, oldest versions first.

        Two that share a chunk and are of different versions are not readable there. `is_readable`: for each version, and for
        the unknown one; versions that came since are. None: only the current encoder's are. `mapped_is_fresh`: what a map has
        moved to it is; None: as the policy says.
        """
        found: Targets = []
        with self.table.lock:
            lags = self.table.encoders.lags()
            readable = [lag == 0 for lag in lags] + [False] if is_readable is None else list(is_readable)
            readable[-1:-1] = [True] * (len(lags) + 1 - len(readable))
            reads_mapped = self.state.reads_mapped if mapped_is_fresh is None else mapped_is_fresh
            good_map = self.table.encoders.current if reads_mapped else UNKNOWN
            for document in self.table.ledger.documents.values():
                if document.source_or_stored is None:
                    continue
                mixed = self._mixed(document)
                segments = [
                    each
                    for each in document.segments
                    if each.is_known
                    and (
                        each.start in mixed
                        or (not readable[each.version] if each.mapped_to < 0 else each.mapped_to != good_map)
                    )
                ]
                if segments:
                    found.append((document, segments))
        return sorted(found, key=lambda target: min(each.version for each in target[1]))

    def _mixed(self, document: Document) -> set[int]:
        """Return the first tokens of segments that share a chunk with one of another version, or that a map could not move."""
        segments = list(document.segments)
        return {
            each.start
            for one, other in itertools.pairwise(segments)
            if one.is_known
            and other.is_known
            and other.start % self.table.chunk_size
            and (one.version != other.version or one.mapped_to >= 0)
            for each in (one, other)
        }

    def of_chunks(self, document: Document, chunks: Iterable[int]) -> list[Segment]:
        """Return the segments of a document that these chunks are of, as far as they can be encoded again."""
        size = self.table.chunk_size
        starts = [*sorted(chunk * size for chunk in set(chunks)), math.inf]

        def first_after(token: int) -> float:
            """Return where the first of the chunks starts that ends behind a token."""
            return starts[bisect.bisect_right(starts, token - size)]

        return [each for each in document.segments if each.is_known and first_after(each.start) < each.stop]

    def num_tokens(self, targets: Targets) -> int:
        """Return how many tokens `reencode` would encode for these targets, without a budget."""
        return sum(each.stop - each.start for target in targets for each in self._closure(*target))

    def reencode(
        self, targets: Targets, budget_tokens: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> RefreshReport:
        """Encode segments again and write them, each document in one transaction; return what was done.

        `budget_tokens`: encode no more whole segments than fit, but one at least; None: all. `progress` is called with (tokens
        done, tokens in all) after each segment.
        """
        self.table.refuse_reader()
        begin = time.perf_counter()
        version = self._version()
        closed = [(each, self._closure(each, segments)) for each, segments in targets]
        targets = within_budget(closed, budget_tokens, self.table.chunk_size)
        total = sum(each.stop - each.start for _, segments in targets for each in segments)
        report = RefreshReport()

        jobs = (job for target in targets if (job := self._job(*target))[1])

        def note(tokens: int) -> None:
            report.tokens += tokens
            if progress is not None:
                progress(report.tokens, total)

        try:
            for document, encoded in encode_all(jobs, self.writers, note):
                self._write(document, encoded, version, report)
        finally:  # also what an interruption leaves was encoded
            report.seconds = time.perf_counter() - begin
            self.state.refreshed.add(report)
        return report

    def _version(self) -> int:
        """Return the version of what is encoded now; raise StaleMemoryError if one of the writers is not that encoder."""
        encoders = self.table.encoders
        version, known = encoders.current, encoders.stamp
        for writer in self.writers:
            if known is None or writer.stamp().digest != known.digest:
                raise StaleMemoryError(
                    f"all that encode a bank again must be its encoder, {known and known.digest}, got "
                    f"{writer.stamp().digest}; give equal models as `workers`, and call `bank.freshness.reencode(model)` or "
                    "read with the model after it has changed."
                )
        return version

    def probe_versions(self, num_tokens: int = 64, *, is_readable: Sequence[bool] | None = None) -> dict[int, float]:
        """Return for each old version how far its keys have moved: relative distance of stored keys to those encoded now.

        About `num_tokens` tokens of each are encoded, and counted as probed in `bank.freshness.refreshed`; nothing is written.
        `is_readable`: as for `stale`. Raises StaleMemoryError if the writer makes other sizes than the bank holds.
        """
        by_version: dict[int, Targets] = {}
        for document, segments in self.stale(is_readable):
            for each in segments:
                by_version.setdefault(each.version, []).append((document, [each]))
        return {version: self._probe(draw_segments(targets, num_tokens)) for version, targets in by_version.items()}

    def _probe(self, sample: Targets) -> float:
        moved = length = 0.0
        for document, segments in sample:
            for segment in segments:
                ids = self._ids(document, segment)
                self.state.refreshed.probed_tokens += len(ids)
                stored, size = stored_chunks(self.table, document, segment), self.table.chunk_size
                encoded = encode_segment(self.writers[0], ids)
                if not fits(encoded, self.table.shapes, largest_number(self.table.storage_dtype)):
                    return float("inf")  # of what is not finite no distance is known
                for chunks, now in zip(stored.chunks, encoded, strict=True):
                    first = stored.first * size - segment.start
                    old = vectors(chunks)[0][:, : stored.num_tokens]
                    new = now[0][:, first : first + old.shape[1]].to(old)
                    moved, length = moved + float((new - old).square().sum()), length + float(new.square().sum())
        return (moved / length) ** 0.5 if length else float("inf")  # nothing was comparable: nobody knows

    def _job(self, document: Document, segments: Sequence[Segment]) -> Job:
        """Return those of a document's segments that are still there to be encoded, with their ids: others write meanwhile."""
        with self.table.lock:
            is_here = self.table.ledger.by_serial.get(document.serial) is document
            there = {id(each) for each in document.segments if each.is_known} if is_here else ()
            return document, [(each, self._ids(document, each)) for each in segments if id(each) in there]

    def _ids(self, document: Document, segment: Segment) -> Tensor:
        assert document.source is not None
        first = document.first_chunk(self.table.chunk_size) * self.table.chunk_size
        return document.source.ids_of(segment.start - first, segment.stop - first)

    def _closure(self, document: Document, segments: Sequence[Segment]) -> list[Segment]:
        """Return the segments, and those that share a chunk with one of them: a chunk has numbers of one encoder."""
        size = self.table.chunk_size
        chosen = {each.start for each in segments}
        known = [each for each in document.segments if each.is_known]
        for order in (known, known[::-1]):
            for one, other in zip(order, order[1:], strict=False):
                border = max(one.start, other.start)
                touch = one.stop == other.start or other.stop == one.start
                if touch and border % size and one.start in chosen:
                    chosen.add(other.start)
        return [each for each in known if each.start in chosen]

    def _write(
        self, document: Document, encoded: list[tuple[Segment, list[LayerTokens]]], version: int, report: RefreshReport
    ) -> None:
        """Write what an encoder version has encoded of a document, as far as that is still there as it was."""
        table = self.table
        largest = largest_number(table.storage_dtype)
        good = [(segment, tokens) for segment, tokens in encoded if fits(tokens, table.shapes, largest)]
        report.failed += len(encoded) - len(good)  # the old numbers stay, with their old version
        with table.change():
            current = table.ledger.by_serial.get(document.serial)
            there = {id(each) for each in current.segments} if current is document else set()
            good = [
                (segment, tokens)
                for segment, tokens in good
                if id(segment) in there
                and segment.is_known
                and segment.stop - segment.start == tokens[0][0].shape[1]  # or it has been continued
            ]
            written = stretches(good)
            for start, tokens in written:
                table.overwrite(document, start, tokens)
            for segment, _ in good:
                segment.version, segment.mapped_to = version, -1
            # A chunk that reaches over to what can't be encoded again was not written: it is of no encoder from now on.
            size = table.chunk_size
            for start, tokens in written:
                for border in (start, start + tokens[0][0].shape[1]):
                    if border % size:
                        document.segments.forget_encoder(border - border % size, border - border % size + size)
            if good:
                table.ledger.note_encoding(document)
        report.segments += len(good)
        report.documents += bool(good)


def within_budget(targets: Targets, budget_tokens: int | None, chunk_size: int) -> Targets:
    """Return the first of the targets, so many whole segments as fit in the budget, but one at least.

    Segments that share a chunk are taken together or not at all: neither alone could write it.
    """
    if budget_tokens is None:
        return targets
    chosen: Targets = []
    left = budget_tokens
    for document, segments in targets:
        taken: list[Segment] = []
        for group in sharing_chunks(segments, chunk_size):
            size = sum(each.stop - each.start for each in group)
            if size > left and (chosen or taken):
                break
            taken += group
            left -= size
        if taken:
            chosen.append((document, taken))
        if len(taken) < len(segments):
            break
    return chosen


def sharing_chunks(segments: Sequence[Segment], chunk_size: int) -> list[list[Segment]]:
    """Return the segments, in their order, in groups of those that share chunks.

    >>> parts = [Segment(0, 8, 0), Segment(8, 9, 0), Segment(9, 12, 0)]
    >>> [len(group) for group in sharing_chunks(parts, chunk_size=4)]
    [1, 2]
    """
    groups: list[list[Segment]] = []
    for each in segments:
        if groups and each.start % chunk_size and groups[-1][-1].stop == each.start:
            groups[-1].append(each)
        else:
            groups.append([each])
    return groups


def fits(tokens: Sequence[LayerTokens], shapes: Sequence[Any] | None, largest: float) -> bool:
    """Return whether keys and values are finite and none is beyond the `largest` number.

    Raises StaleMemoryError if they have other sizes than the bank's.
    """
    for position, (key, value) in enumerate(tokens):
        if shapes is not None and (sizes := (key.shape[0], key.shape[2], value.shape[2])) != shapes[position].sizes:
            raise StaleMemoryError(
                f"the bank holds {shapes[position].sizes}, and this model writes {sizes} (heads, widths of keys and values): "
                "another architecture. Memorize the documents again from their texts, in `MemoryBank.for_model(model)`."
            )
        if not all(bool((each.abs() <= largest).all()) for each in (key, value)):  # NaN is not, either
            return False
    return True


def stretches(encoded: Sequence[tuple[Segment, list[LayerTokens]]]) -> list[tuple[int, list[LayerTokens]]]:
    """Return first token, keys and values of each stretch of adjacent segments."""
    found: list[tuple[int, int, list[list[LayerTokens]]]] = []
    for segment, tokens in sorted(encoded, key=lambda each: each[0].start):
        if found and found[-1][1] == segment.start:
            start, _, parts = found.pop()
            found.append((start, segment.stop, [*parts, tokens]))
        else:
            found.append((segment.start, segment.stop, [tokens]))

    def joined(layer: Sequence[LayerTokens]) -> LayerTokens:
        return torch.cat([key for key, _ in layer], dim=1), torch.cat([value for _, value in layer], dim=1)

    return [(start, [joined(layer) for layer in zip(*parts, strict=True)]) for start, _, parts in found]


def encode_all(jobs: Iterable[Job], writers: Sequence[Writer], note: Callable[[int], None]) -> Iterator[Encoded]:
    """Yield documents with their encoded segments, each once all of its segments are there.

    With one writer all is done here, segment after segment. With several, each has a thread, and whoever is free takes the
    next segment, so that a slow one holds up nothing but its last one. `note` is called with the tokens of each segment done.
    """
    if len(writers) == 1:
        for document, segments in jobs:
            encoded = []
            for segment, ids in segments:
                encoded.append((segment, encode_segment(writers[0], ids)))
                note(len(ids))
            yield document, encoded
        return
    idle: queue.SimpleQueue[Writer] = queue.SimpleQueue()
    for writer in writers:
        idle.put(writer)

    def encode(ids: Tensor) -> list[LayerTokens]:
        writer = idle.get()
        try:
            return encode_segment(writer, ids)
        finally:
            idle.put(writer)

    parts: dict[int, dict[int, list[LayerTokens]]] = {}  # what is done of each document, by its number
    tasks = ((number, job, place) for number, job in enumerate(jobs) for place in range(len(job[1])))
    running: dict[Future[list[LayerTokens]], tuple[int, Job, int]] = {}
    with ThreadPoolExecutor(len(writers)) as threads:
        while True:
            # One in hand and one waiting for each.
            for task in itertools.islice(tasks, 2 * len(writers) - len(running)):
                running[threads.submit(encode, task[1][1][task[2]][1])] = task
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                number, (document, segments), place = running.pop(done)
                own = parts.setdefault(number, {})
                own[place] = done.result()
                note(len(segments[place][1]))
                if len(own) == len(segments):
                    del parts[number]
                    yield document, [(segment, own[each]) for each, (segment, _) in enumerate(segments)]


def encode_segment(writer: Writer, ids: Tensor) -> list[LayerTokens]:
    """Return keys and values of one segment for each memory layer, encoded by itself, as it was when it was written."""
    keys, values = writer.encode(ids[None])
    return [(key[0], value[0]) for key, value in zip(keys, values, strict=True)]


class Stored(NamedTuple):
    """The chunks of a segment: the first of them, counted in the document, their numbers of each layer, and their tokens."""

    first: int
    chunks: list[Chunks]
    num_tokens: int


def stored_chunks(table: Table, document: Document, segment: Segment) -> Stored:
    """Return what is stored of a segment, without chunks that it only begins or ends; the document's last one is whole."""
    size = table.chunk_size
    resident = document.first_chunk(size)
    first = max(-(-segment.start // size), resident)
    stop = segment.stop if segment.stop == document.num_tokens else segment.stop - segment.stop % size
    rows = document.rows.values[first - resident : max(first, -(-stop // size)) - resident]
    return Stored(first, table.storage.select(rows), max(0, stop - first * size))


def vectors(chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Return keys and values as floats, (kv_heads, tokens, dim)."""
    return decode(chunks.keys).float().flatten(1, 2), decode(chunks.values).float().flatten(1, 2)


def draw_segments(targets: Targets, num_tokens: float, seed: int = 0) -> Targets:
    """Return segments drawn at random, at least one, with about so many tokens in all."""
    flat = [(document, each) for document, segments in targets for each in segments]
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: dict[int, tuple[Document, list[Segment]]] = {}
    left = num_tokens
    for number in order:
        document, segment = flat[number]
        if chosen and left < (segment.stop - segment.start) / 2:
            break
        chosen.setdefault(document.serial, (document, []))[1].append(segment)
        left -= segment.stop - segment.start
    return list(chosen.values())
