"""A bank and the encoder that reads it: what is stale is refused, encoded again, moved or masked, as its policy says."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from longmem.encoder.checks import refuse_other_recipe
from longmem.encoder.history import UNKNOWN, Encoders
from longmem.encoder.stamp import EncoderStamp
from longmem.memory.index import Found
from longmem.memory.locking import BankLock
from longmem.memory.persistence import PersistentBank
from longmem.memory.refresh import (
    Lags,
    Refresher,
    RefreshPolicy,
    RefreshReport,
    StalenessReport,
    make_policy,
    readable_as_is,
    refresh_name,
    report_staleness,
)
from longmem.memory.rows.ledger import Ledger
from longmem.memory.rows.table import BankContents


class KeptFresh(PersistentBank):
    """The half of `MemoryBank` that knows its encoder.

    `refreshed` counts all that was encoded again since the bank was made or opened; `probed` holds what the clock "probe" has
    measured; `wanted` the stale rows that a read has found and could not have encoded again there and then.
    """

    refresh: str
    chunk_size: int
    fingerprint: Any  # digest of the current encoder, None if it is not known
    refreshed: RefreshReport
    probed: dict[int, float]
    wanted: set[int]
    encoders: Encoders
    _ledger: Ledger
    _contents: BankContents
    _lock: BankLock
    _reader: weakref.ref[Any] | None

    def _start_fresh(self) -> None:
        self.refreshed, self.probed, self.wanted, self._reader = RefreshReport(), {}, set(), None
        self._named_policy = self.refresh, make_policy(self.refresh)
        self._masked_at: tuple[object, Tensor | None] | None = None
        self._agreed: EncoderStamp | None = None
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickled bank takes along: not the model that reads this one."""
        return {**self.__dict__, "_reader": None}

    @property
    def refresh_policy(self) -> RefreshPolicy:
        """Return the policy that `refresh` names."""
        if self._named_policy[0] != self.refresh:
            self._named_policy = self.refresh, make_policy(self.refresh)
        return self._named_policy[1]

    def use_refresh(self, refresh: str | Mapping[str, Any]) -> None:
        """Follow another refresh policy from now on, named as for the class."""
        name = refresh_name(refresh)
        with self.transaction():
            self.refresh = name
            self._ledger.note_change()
        self.probed, self.wanted = {}, set()

    def read_by(self, model: Any) -> None:
        """Make ready to be read by a model, as the refresh policy says if its encoder is not the one that wrote the bank.

        Called by the model before every read; costs next to nothing while nothing has changed.

        Raises:
            StaleMemoryError: the encoder is another one and the policy is "frozen", its tokenizer or its sizes are others, a
                bound is exceeded, or the encoder is not frozen.
        """
        known = self.encoders.stamp
        if known is None:
            return
        # Before the stamp: to make one anew the backbone is run, which freezes it, and nobody would hear of it.
        model.encoder.refuse_trainable()
        stamp = model.encoder_stamp()
        model.encoder.refuse_trainable()
        if stamp.digest != known.digest:
            self._change_encoder(model, stamp)
        elif stamp is not self._agreed:
            refuse_other_recipe(known, stamp)  # the tokenizer is no part of the digest
            if self.encoders.versions[-1].sketch is None:
                self._enter_sketched(model, stamp)
        self._agreed = stamp
        self._reader = weakref.ref(model)
        self.refresh_policy.on_open(Refresher(self, [model]))  # type: ignore[arg-type]

    def read_as_is(self, model: Any) -> None:
        """Read with this model's encoder all that another one wrote, as it is: its encoder is unknown from now on."""
        with self.transaction(), self._lock:
            self.encoders.enter(model.encoder_stamp())
            lags = self.encoders.lags()
            for document in self._ledger.documents.values():
                foreign = [each for each in document.segments if each.version < 0 or lags[each.version]]
                for segment in foreign:
                    segment.version, segment.mapped_to = UNKNOWN, -1
                if foreign:
                    self._ledger.note_encoding(document)

    def reencode(
        self,
        model: Any,
        *,
        workers: Sequence[Any] = (),
        budget_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> RefreshReport:
        """Encode again, with this model, all that another encoder wrote, as it was written; return what was done.

        Each document changes at one stroke, in a transaction of its own, so a process killed on the way leaves every document
        whole, old or new, and the next call does the rest. Readers may go on meanwhile.

        Args:
            model: the encoder.
            workers: equal models (for instance one for each GPU) that help; each is given work when it is free.
            budget_tokens: stop before more tokens than that; None: do it all.
            progress: called with (tokens done, tokens in all).
        """
        self._enter(model)
        refresher = Refresher(self, [model, *workers])  # type: ignore[arg-type]
        return refresher.reencode(refresher.stale(), budget_tokens, progress)

    def sweep(self, model: Any, budget_tokens: int | None = None) -> RefreshReport:
        """Do what the refresh policy does in idle time, up to so many tokens; return what was done."""
        before = RefreshReport(**vars(self.refreshed))
        stamp = model.encoder_stamp()
        if self.encoders.stamp is None:
            self._enter(model)
        elif stamp.digest != self.encoders.stamp.digest:
            self._change_encoder(model, stamp)
        self.refresh_policy.on_idle(Refresher(self, [model]), budget_tokens)  # type: ignore[arg-type]
        return RefreshReport(**{name: value - getattr(before, name) for name, value in vars(self.refreshed).items()})

    def lags(self, clock: str = "version") -> Lags:
        """Return how far each version of the encoder is behind, on a clock."""
        return Lags(self.encoders, clock, self.probed)

    @property
    def is_empty(self) -> bool:
        """Return whether a search can find nothing, also because nothing that is there may be read."""
        with self._lock:
            if not self._ledger.num_rows:
                return True
            masked = self._masked()
        return masked is not None and not self.refresh_policy.encodes_on_read and not bool(masked.any())

    @property
    def may_write(self) -> bool:
        """Return whether the bank can be written to, so that something can be encoded again; else what is stale is masked."""
        return self._folder is None or self._folder.is_writable

    @property
    def has_stale(self) -> bool:
        """Return whether the refresh policy does not let some chunk be read as it is."""
        with self._lock:
            return self._masked() is not None

    def readable_now(self) -> Bool[Tensor, " rows"]:
        """Return for each live row whether the refresh policy lets it be read as it is."""
        return readable_as_is(self.refresh_policy, self.lags(), self._ledger.versions)

    def warn_once(self, about: str, message: str) -> None:
        """Warn of something, once in the life of this object."""
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, stacklevel=3)

    def staleness(self, model: Any = None, *, probe: bool = False) -> StalenessReport:
        """Return how much of the bank is stale, in total, for each encoder and for each document; nothing changes.

        Args:
            model: say what would be stale if this model read the bank; None: compare with the bank's current encoder.
            probe: also measure how far keys have moved, by encoding about 64 tokens of each earlier encoder with `model`.

        Raises:
            ValueError: `probe` without a model.
            StaleMemoryError: `probe` with a model that can't encode what the bank holds.
        """
        return report_staleness(self, model, probe=probe)  # type: ignore[arg-type]

    # Inside.

    def _find(self, search: Callable[[Tensor | None], Found], rows: Tensor | None) -> Found:
        """Return what a search finds, by way of the policy if some rows may not be read as they are."""
        readable = self._masked()
        if readable is None:
            return search(rows)
        model = None if self._reader is None else self._reader()
        # The model may have changed since it said that it reads: then nobody is there to encode again.
        can_encode = model is not None and self.may_write and model.encoder_stamp().digest == self.fingerprint
        refresher = Refresher(self, [model]) if can_encode else None  # type: ignore[arg-type]
        return self.refresh_policy.on_read(refresher, search, rows, readable)

    def _masked(self) -> Tensor | None:
        """Return which live rows are readable, None if all of them are; looked up again when something has changed."""
        state = self._ledger.version, self.refresh, *self.probed.items()
        if self._masked_at is None or self._masked_at[0] != state:
            one_version = len(self.encoders.versions) <= 1 and bool(self.refresh_policy.readable(self.lags()).all())
            readable = None if one_version else self.readable_now()
            self._masked_at = state, None if readable is None or readable.all() else readable
        return self._masked_at[1]

    def _enter(self, model: Any) -> None:
        """Make a model's encoder the current one, and say nothing to the policy."""
        stamp = model.encoder_stamp()
        refuse_other_recipe(self.encoders.stamp, stamp)
        with self.transaction(), self._lock:
            if self.encoders.stamp is None or self.encoders.stamp.digest != stamp.digest:
                self._ledger.note_change()
            self._enter_sketched(model, stamp)

    def _enter_sketched(self, model: Any, stamp: EncoderStamp) -> None:
        # A moving encoder is sketched only where a clock asks for it: it moves at every step.
        sketch = model.encoder.sketch() if self.refresh_policy.needs_sketch or not model.encoder.is_moving else None
        self.encoders.enter(stamp, sketch)

    def _change_encoder(self, model: Any, stamp: EncoderStamp) -> None:
        assert self.encoders.stamp is not None
        self.refresh_policy.admit(self.encoders.stamp, stamp)
        self._enter(model)
        self.refresh_policy.on_encoder_change(Refresher(self, [model]))  # type: ignore[arg-type]
        if self.has_stale and (lost := self._tokens_lost()):
            self.warn_once(
                "lost",
                f"{lost} tokens in the bank were written by an earlier encoder and can't be encoded again, because the ids of "
                "their tokens or the borders of their segments are not known; they are no longer read. Memorize their "
                "documents again.",
            )

    def _tokens_lost(self) -> int:
        """Return how many resident tokens may not be read and can't be encoded again."""
        readable = self.refresh_policy.readable(self.lags()).tolist()
        return sum(
            segment.stop - max(segment.start, document.first_chunk(self.chunk_size) * self.chunk_size)
            for document in self._ledger.documents.values()
            for segment in document.segments
            if not readable[segment.version] and not (segment.is_known and document.source_or_reader is not None)
        )
