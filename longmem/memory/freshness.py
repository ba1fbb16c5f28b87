"""A bank and the encoder that reads it: what is stale is refused, encoded again or masked, as its refresh policy says."""

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from longmem.encoder.history import UNKNOWN, Encoders
from longmem.encoder.stamp import EncoderStamp, refuse_other_recipe
from longmem.errors import StaleMemoryError
from longmem.memory.checks import checked_methods
from longmem.memory.index import Ranked
from longmem.memory.protocols import EncodingModel, Writer
from longmem.memory.refresh import (
    Lags,
    Refresher,
    RefreshPolicy,
    RefreshReport,
    RefreshState,
    StalenessReport,
    make_policy,
    refresh_name,
    report_staleness,
)
from longmem.memory.rows.table import Edition, Table


@dataclasses.dataclass(eq=False)
class Reader:
    """What a bank knows of one model that reads it: its encoder, as it was found last."""

    writer: weakref.ref[Writer]
    stamp: EncoderStamp


@checked_methods("ready_for", "read_by", "mask", "search")
class Freshness:
    """What a bank knows of its encoders, and what it does when they change; `refresh` names the policy, with its settings.

    Each model that reads the bank has a `Reader`. A thread reads and writes as the model that it last made the bank ready for.
    """

    def __init__(self, table: Table, refresh: str | Mapping[str, Any]) -> None:
        self._table = table
        self.name = refresh_name(refresh)
        self.policy: RefreshPolicy = make_policy(self.name)
        self.state = RefreshState(table, self.policy.reads_mapped())
        # Of each encoder that reads, by its digest: the version of the ledger, and what may be read.
        self._masked: dict[str | None, tuple[int, Tensor | None]] = {}
        self._reads_all: dict[int, bool] = {}  # whether the policy reads all, by the number of encoders
        self._forget_readers()

    def _forget_readers(self) -> None:
        self._readers: weakref.WeakKeyDictionary[Writer, Reader] = weakref.WeakKeyDictionary()
        self._latest: Reader | None = None
        self._of_thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickled bank takes along: not the models that read this one."""
        return {name: each for name, each in self.__dict__.items() if name not in ("_readers", "_latest", "_of_thread")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_readers()

    @property
    def reader(self) -> Reader | None:
        """Return whom this thread reads and writes as, by default the last for whom the bank was made ready; None: nobody."""
        return getattr(self._of_thread, "reader", self._latest)

    def read_by(self, model: EncodingModel | None) -> tuple[Reader | None, Bool[Tensor, " rows"] | None]:
        """Return what the bank knows of a model (None: of the one that this thread reads as), and what it may read: `mask`."""
        reader = self.reader if model is None else self._readers.get(model.encoder)
        return reader, self.mask(reader)

    def version_written(self) -> int:
        """Return the version of what this thread writes: that of its model's encoder, also when another one is current."""
        reader = self.reader
        return self.encoders.current if reader is None else self.encoders.version_of(reader.stamp.digest)

    def write_as(self, writer: Writer) -> int:
        """Write in this thread as an encoder that is, or once was, the current one, and return its version.

        What is current stays so. Raises StaleMemoryError for an encoder that never was.
        """
        stamp = writer.stamp()
        if all(each.stamp.digest != stamp.digest for each in self.encoders.versions):
            raise StaleMemoryError(
                f"what is written must be of an encoder that the bank was made ready for, got {stamp.digest}; call "
                "`bank.ready_for(model)` with its model first."
            )
        self._read_as(writer, stamp)
        return self.encoders.version_of(stamp.digest)

    @property
    def encoders(self) -> Encoders:
        return self._table.encoders

    @property
    def refreshed(self) -> RefreshReport:
        return self.state.refreshed

    @property
    def may_write(self) -> bool:
        return self.state.may_write

    def use(self, refresh: str | Mapping[str, Any]) -> None:
        """Follow another refresh policy from now on, named as for `MemoryBank`."""
        name = refresh_name(refresh)
        with self._table.change():
            self.adopt(name)
            self._table.ledger.note_change()
        self.state.probed, self.state.wanted = {}, set()

    def adopt(self, name: str) -> None:
        """Follow the policy that the bank's folder names."""
        if name != self.name:
            self.name, self.policy = name, make_policy(name)
            self._masked, self._reads_all = {}, {}
            self.state.reads_mapped = self.policy.reads_mapped()

    # Before reading.

    def ready_for(self, model: EncodingModel) -> None:
        """Make ready to be read by a model, as the refresh policy says if its encoder is not the one that wrote the bank.

        Raises StaleMemoryError if the encoder is another one and the policy is "frozen", its tokenizer or its sizes are
        others, a bound is exceeded, or the encoder is not frozen.
        """
        versions = self._table.encoders.versions
        if not versions:
            return
        known, writer = versions[-1].stamp, model.encoder
        stamp, reader = writer.stamp_for_reading(), self._readers.get(writer)
        if stamp.digest != known.digest:
            self._change_encoder(writer, stamp)
        elif reader is None or stamp is not reader.stamp:
            refuse_other_recipe(known, stamp)  # the tokenizer is no part of the digest
            if versions[-1].sketch is None:
                self._enter_sketched(writer, stamp)
        self._read_as(writer, stamp)
        if self.state.wanted or self.has_stale:
            with self._unless_another(stamp):
                self.policy.on_open(self.refresher(writer))

    def open_for(self, model: EncodingModel, *, strict: bool) -> None:
        """Make a bank that was opened ready for a model; not `strict`: read what another encoder wrote as it is.

        Raises StaleMemoryError if the bank names no encoder, or as `ready_for` does.
        """
        if self.encoders.stamp is None:
            raise StaleMemoryError(
                "the bank names no encoder, so nobody knows whether this model can read it; open it without `model`, or make "
                "one with `MemoryBank.for_model(model)`."
            )
        if strict:
            self.ready_for(model)
        else:
            self.read_as_is(model)

    def read_as_is(self, model: EncodingModel) -> None:
        """Read with this model's encoder all that another one wrote, as it is: its encoder is unknown from now on."""
        with self._table.change():
            stamp = model.encoder.stamp()
            self._enter_sketched(model.encoder, stamp)
            self._read_as(model.encoder, stamp)
            lags = self.encoders.lags()
            for document in self._table.ledger.documents.values():
                foreign = [each for each in document.segments if each.version < 0 or lags[each.version]]
                for segment in foreign:
                    segment.version, segment.mapped_to = UNKNOWN, -1
                if foreign:
                    self._table.ledger.note_encoding(document)

    # Encoding again.

    def reencode(
        self,
        model: EncodingModel,
        *,
        workers: Sequence[EncodingModel] = (),
        budget_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> RefreshReport:
        """Encode again, with this model, all that another encoder wrote, as it was written; return what was done.

        Each document changes in a transaction of its own: a process killed on the way leaves every document whole, old or
        new, and the next call does the rest. Readers may go on meanwhile.

        Args:
            model: whose encoder it is.
            workers: equal models (for instance one for each GPU) that help; each is given work when it is free.
            budget_tokens: stop before more tokens than that; None: do it all.
            progress: called with (tokens done, tokens in all).
        """
        self._enter(model.encoder)
        refresher = self.refresher(model.encoder, *(worker.encoder for worker in workers))
        return refresher.reencode(refresher.stale(), budget_tokens, progress)

    def sweep(self, model: EncodingModel, budget_tokens: int | None = None) -> RefreshReport:
        """Do what the refresh policy does in idle time, up to so many tokens; return what was done."""
        before, writer = RefreshReport(**vars(self.refreshed)), model.encoder
        stamp = writer.stamp()
        if self.encoders.stamp is None:
            self._enter(writer)
        elif stamp.digest != self.encoders.stamp.digest:
            self._change_encoder(writer, stamp)
        self.policy.on_idle(self.refresher(writer), budget_tokens)
        return self.refreshed.since(before)

    def refresher(self, *writers: Writer) -> Refresher:
        return Refresher(self.state, writers)

    # What is stale.

    @property
    def has_stale(self) -> bool:
        """Return whether the refresh policy does not let some chunk be read as it is."""
        return self.mask() is not None

    def mask(self, reader: Reader | None = None) -> Bool[Tensor, " rows"] | None:
        """Return for each live row whether the policy lets it be read as it is, None if it does so for all of them.

        `reader`: the model that reads, None for one with the current encoder. Where the encoder of another model has become
        current meanwhile, what this one has written counts as fresh all the same, and what the other one has written as stale.
        """
        with self._table.lock:
            version, encoders = self._table.ledger.version, len(self._table.encoders.versions)
            if encoders <= 1 and self._reads_all.get(encoders):
                return None
            known = self.encoders.stamp
            digest = (
                None if reader is None or known is None or reader.stamp.digest == known.digest else reader.stamp.digest
            )
            found = self._masked.get(digest)
            if found is None or found[0] != version:
                if reader is None or digest is None:
                    mask = self.policy.mask(self.state)
                else:
                    own = self.encoders.copy()
                    own.enter(reader.stamp)
                    mask = self.policy.readable_as_is(Lags(own), self._table.ledger.versions)
                self._masked = {each: known for each, known in self._masked.items() if known[0] == version}
                found = self._masked[digest] = version, mask
                if encoders <= 1:  # then it is a matter of the policy, whatever was written
                    self._reads_all[encoders] = bool(self.policy.readable(self.lags()).all())
            return found[1]

    def lags(self, clock: str = "version") -> Lags:
        return self.state.lags(clock)

    def report(self, model: EncodingModel | None = None, *, probe: bool = False) -> StalenessReport:
        """Return how much of the bank is stale, in total, for each encoder and for each document; nothing changes.

        `model`: say what would be stale if this model read the bank; None: compare with the bank's current encoder. `probe`:
        also measure how far keys have moved, by encoding about 64 tokens of each earlier encoder with `model`; raises
        ValueError without one, StaleMemoryError for one that can't encode what the bank holds.
        """
        return report_staleness(self.state, self.policy, None if model is None else model.encoder, probe=probe)

    def search(
        self,
        search: Callable[[Tensor | None], Ranked],
        rows: Tensor | None,
        readable: Bool[Tensor, " rows"],
        reader: Reader | None,
        edition: Edition | None,
    ) -> Ranked:
        """Return what a search of some rows finds where some may not be read as they are: the policy's business.

        `edition`: what is read, and must stay as it is; None: nothing was read yet, so the policy may encode what is found.
        """
        writer = None if reader is None else reader.writer()
        known = self.encoders.stamp
        # The encoder may have changed since it said that it reads: then nobody is there to encode again.
        can_encode = writer is not None and self.may_write and known is not None
        can_encode = can_encode and writer.stamp().digest == known.digest  # type: ignore[union-attr]
        if can_encode and self.policy.encodes_on_read and edition is not None:
            hits = search(rows)[1].flatten().cpu().unique()
            hits = hits[edition.is_there(hits)]
            serials, places = self._table.ledger.positions(hits[~readable[hits]])
            stale = zip(serials.tolist(), places.tolist(), strict=True)
            self.state.wanted.update((known.digest, *each) for each in stale)  # type: ignore[union-attr]
            can_encode = False
        return self.policy.on_read(self.refresher(writer) if can_encode else None, search, rows, readable)  # type: ignore[arg-type]

    def _enter(self, writer: Writer) -> None:
        """Make an encoder the current one, and say nothing to the policy."""
        stamp = writer.stamp()
        refuse_other_recipe(self.encoders.stamp, stamp)
        with self._table.change():
            if self.encoders.stamp is None or self.encoders.stamp.digest != stamp.digest:
                self._table.ledger.note_change()
            self._enter_sketched(writer, stamp)
            self._read_as(writer, stamp)

    def _read_as(self, writer: Writer, stamp: EncoderStamp) -> None:
        """Read and write in this thread as this model from now on."""
        reader = self._readers.setdefault(writer, Reader(weakref.ref(writer), stamp))
        reader.stamp = stamp
        self._of_thread.reader = self._latest = reader

    def _enter_sketched(self, writer: Writer, stamp: EncoderStamp) -> None:
        # A moving encoder is sketched only where a clock asks for it: it moves at every step.
        sketch = writer.sketch() if self.policy.needs_sketch or not writer.is_moving else None
        self.encoders.enter(stamp, sketch)

    def _change_encoder(self, writer: Writer, stamp: EncoderStamp) -> None:
        assert self.encoders.stamp is not None
        self.policy.admit(self.encoders.stamp, stamp)
        self._enter(writer)
        with self._unless_another(stamp):
            self.policy.on_encoder_change(self.refresher(writer))
        if self.has_stale and (lost := self._tokens_lost()):
            self.state.warn_once(
                "lost",
                f"{lost} tokens in the bank were written by an earlier encoder and can't be encoded again, because the ids of "
                "their tokens or the borders of their segments are not known; they are no longer read. Memorize their "
                "documents again.",
            )

    @contextlib.contextmanager
    def _unless_another(self, stamp: EncoderStamp) -> Iterator[None]:
        """Let the policy act for an encoder, up to where another model makes its own the current one: then there is a mask."""
        try:
            yield
        except StaleMemoryError:
            if self.encoders.stamp is None or self.encoders.stamp.digest == stamp.digest:
                raise

    def _tokens_lost(self) -> int:
        """Return how many resident tokens may not be read and can't be encoded again."""
        with self._table.lock:
            readable = self.policy.readable(self.lags()).tolist()
            size = self._table.chunk_size
            return sum(
                segment.stop - max(segment.start, document.first_chunk(size) * size)
                for document in self._table.ledger.documents.values()
                for segment in document.segments
                if not readable[segment.version] and not (segment.is_known and document.source_or_stored is not None)
            )
