"""Encode-ahead: a thread runs the frozen backbone on the next windows while the side network trains on this one.

What the backbone makes of a window depends on nothing but its tokens, so it can be computed at any time before it is needed.
It waits in a queue, which nothing reads but the training step of that very window: what enters a lane's memory, and when, is
the same as without.

How far the thread may run ahead is decided by `EncodeAheadGate`, the admission rule of AReaL (arXiv 2505.24298). For a frozen
backbone it bounds memory alone. For a writer that moves it bounds how old a writer may have encoded what is used.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.data import LaneBatch
from longmem.training.features import Features


class EncodeAheadGate:
    """Say how many more segments may be begun; safe to use from several threads.

    A segment is what is encoded at once. Segments are used in order, `segments_per_step` in each step, and `version` counts
    the steps done: number n is used when the version is `n // segments_per_step`. Begun under version v it has then
    `n // segments_per_step - v <= max_lag`.

    Args:
        max_lag: steps that may pass between the encoding of a segment and its use; 0: none, as if all was done in turn.
        segments_per_step: see above.
        max_inflight: segments that may be in work at one time.

    >>> gate = EncodeAheadGate(max_lag=1, segments_per_step=2, max_inflight=3)
    >>> gate.capacity  # four are used in this step and the next one, three may be in work
    3
    >>> gate.begin(), gate.begin(), gate.finish(), gate.capacity
    (None, None, None, 2)
    """

    def __init__(self, max_lag: int, segments_per_step: int, max_inflight: int) -> None:
        for name, value, least in (
            ("max_lag", max_lag, 0),
            ("segments_per_step", segments_per_step, 1),
            ("max_inflight", max_inflight, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        self.max_lag, self.segments_per_step, self.max_inflight = max_lag, segments_per_step, max_inflight
        self.version = self.accepted = self.running = 0
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Return how many segments may be begun now; negative where a bound was lowered by going back in versions."""
        with self._lock:
            begun = self.accepted + self.running
            lagging = (self.max_lag + self.version + 1) * self.segments_per_step - begun
            return min(self.max_inflight - self.running, lagging)

    def begin(self) -> None:
        """Count a segment as in work. Raises ValueError if the capacity is used up."""
        if self.capacity < 1:
            raise ValueError(
                f"`begin` needs a capacity of 1 or more, got {self.capacity} at version {self.version}; wait for "
                "`finish` or `on_version`."
            )
        with self._lock:
            self.running += 1

    def finish(self) -> None:
        """Count a segment as encoded."""
        with self._lock:
            self.running -= 1
            self.accepted += 1

    def on_version(self, version: int) -> None:
        """Take note that `version` steps are done."""
        with self._lock:
            self.version = version

    def on_version_recovered(self, version: int) -> None:
        """Begin again at a version, as after a restart: what the steps before used is done, nothing is in work.

        Without it, a run that goes on at version v could begin the segments of v steps at once.
        """
        with self._lock:
            self.version, self.accepted, self.running = version, version * self.segments_per_step, 0


class FeatureSource(Protocol):
    """What gives features of windows: `FrozenFeatures`, or something that behaves like it."""

    def of(self, input_ids: Int[Tensor, "lanes tokens"], lengths: Sequence[int]) -> Features:
        """Return the features of a batch of windows."""

    def losses_after(self, context: Int[Tensor, " context"], tokens: Int[Tensor, " tokens"]) -> Tensor:
        """Return the backbone's losses of tokens with others before them."""


@dataclasses.dataclass(frozen=True)
class _Ordered:
    """A batch that was handed to the thread, and what becomes of it."""

    batch: LaneBatch
    features: Future[Features]


class EncodeAhead:
    """Return a source of features that has the next ones computed, in a `with` block of `from_batch`; elsewhere a plain one.

    Only the thread that asks reads texts and hands batches over, so the lanes need not be safe for threads. One run of the
    backbone at a time: architectures may change their rotary frequencies with the length of what they read.

    Args:
        source: what computes, or reads, features.
        batch_at: the batch of a number.
        last: batches of the whole run.
        gate: how far to run ahead, in batches; see `for_frozen`.
        lock: held while the source computes; whoever else runs the backbone holds it, too.
    """

    def __init__(
        self,
        source: FeatureSource,
        batch_at: Callable[[int], LaneBatch],
        last: int,
        gate: EncodeAheadGate,
        lock: threading.Lock | None = None,
    ) -> None:
        self.source, self.gate = source, gate
        self._batch_at, self._last = batch_at, last
        self._next = last  # nothing is handed over outside of the block
        self._queue: deque[_Ordered] = deque()
        self._lock = lock or threading.Lock()
        self._thread: ThreadPoolExecutor | None = None

    @classmethod
    def for_frozen(
        cls,
        source: FeatureSource,
        batch_at: Callable[[int], LaneBatch],
        last: int,
        ahead: int,
        lock: threading.Lock | None = None,
    ) -> EncodeAhead:
        """Return a source for a backbone that never moves, where `ahead` batches in the queue bound nothing but memory."""
        # A version is then a batch that was asked for.
        return cls(source, batch_at, last, EncodeAheadGate(ahead, segments_per_step=1, max_inflight=ahead + 1), lock)

    def from_batch(self, first: int) -> Self:
        """Return this source, to be entered before the batch numbered `first` is asked for."""
        steps, rest = divmod(first, self.gate.segments_per_step)
        if rest:
            raise ValueError(
                f"`first` must be a multiple of the gate's `segments_per_step`, got {first} and "
                f"{self.gate.segments_per_step}; a run goes on between two steps."
            )
        self.gate.on_version_recovered(steps)
        self._next = first
        return self

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode-ahead")
        self._hand_over()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._thread is not None
        self._next = self._last
        self._thread.shutdown(wait=True, cancel_futures=True)  # at most one window is still being computed
        self._thread = None
        self._queue.clear()

    def of(self, input_ids: Int[Tensor, "lanes tokens"], lengths: Sequence[int]) -> Features:
        """Return the features of a batch of windows: those that wait if it is the next one, else computed now.

        Raises:
            Exception: what went wrong in the thread with this batch.
        """
        number = self._next - len(self._queue)
        if self._thread is None or number >= self._last or not self._is_number(number, input_ids, lengths):
            with self._lock:
                return self.source.of(input_ids, lengths)
        self.gate.on_version(number // self.gate.segments_per_step)
        self._hand_over()  # at least this batch, if nothing waited: all before it are encoded, and it is of this version
        return self._queue.popleft().features.result()

    def losses_after(
        self, context: Int[Tensor, " context"], tokens: Int[Tensor, " tokens"]
    ) -> Float[Tensor, " targets"]:
        """Return the backbone's losses of `tokens` but the first with `context` before them, computed now."""
        with self._lock:
            return self.source.losses_after(context, tokens)

    def _hand_over(self) -> None:
        """Give the thread as many of the next batches as the gate lets through."""
        assert self._thread is not None
        while self._next < self._last and self.gate.capacity > 0:
            batch = self._batch_at(self._next)
            self.gate.begin()
            self._queue.append(_Ordered(batch, self._thread.submit(self._encode, batch)))
            self._next += 1

    def _encode(self, batch: LaneBatch) -> Features:
        try:
            with self._lock:
                return self.source.of(batch.input_ids, batch.lengths)
        finally:
            self.gate.finish()

    def _is_number(self, number: int, input_ids: Tensor, lengths: Sequence[int]) -> bool:
        """Return whether these are the windows of the batch of a number, the next one."""
        batch = self._queue[0].batch if self._queue else self._batch_at(number)
        return batch.lengths == tuple(lengths) and torch.equal(batch.input_ids, input_ids)
