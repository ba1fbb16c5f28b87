"""Encode-ahead: a thread runs the frozen backbone on the next windows while the side network trains on this one.

What the backbone makes of a window depends on nothing but its tokens, so it can be computed at any time before it is needed.
It waits in a queue, which nothing reads but the training step of that very window: what enters a lane's memory, and when, is
the same as without.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.data import LaneBatch
from longmem.training.features import Features, FrozenFeatures


class EncodeAhead:
    """A source of features that has the next ones computed, in a `with` block; elsewhere a plain one.

    Only the thread that asks reads texts and hands batches over, so the lanes need not be safe for threads. One run of the
    backbone at a time: architectures may change their rotary frequencies with the length of what they read.

    Args:
        first, last: the number of the batch that is asked for first in the block, and that behind the last of the run.
        ahead: batches that may be computed, or wait, beside the one that is asked for; at least 1.
        lock: held while the source computes; whoever else runs the backbone holds it, too.
    """

    def __init__(
        self,
        source: FrozenFeatures,
        batch_at: Callable[[int], LaneBatch],
        *,
        first: int,
        last: int,
        ahead: int,
        lock: "threading.Lock | None" = None,  # a function until Python 3.13
    ) -> None:
        self.source, self.ahead = source, ahead
        self._batch_at, self._next, self._last = batch_at, first, last
        self._queue: deque[tuple[LaneBatch, Future[Features]]] = deque()
        self._lock = lock or threading.Lock()

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode-ahead")
        self._hand_over()
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)  # at most one window is still being computed
        self._queue.clear()

    def of(self, input_ids: Int[Tensor, "lanes tokens"], lengths: Sequence[int]) -> Features:
        """Return the features of a batch of windows: those that wait if it is the next one, else computed now.

        Raises what went wrong in the thread with this batch.
        """
        batch = self._queue[0][0] if self._queue else None
        if batch is None or batch.lengths != tuple(lengths) or not torch.equal(batch.input_ids, input_ids):
            return self._computed(input_ids, lengths)
        self._hand_over()
        return self._queue.popleft()[1].result()

    def losses_after(
        self, context: Int[Tensor, " context"], tokens: Int[Tensor, " tokens"]
    ) -> Float[Tensor, " targets"]:
        """Return the backbone's losses of `tokens` but the first with `context` before them, computed now."""
        with self._lock:
            return self.source.losses_after(context, tokens)

    def _hand_over(self) -> None:
        """Give the thread the next batches, so that it never runs dry while the oldest one is used."""
        while self._next < self._last and len(self._queue) <= self.ahead:
            batch = self._batch_at(self._next)
            self._queue.append((batch, self._thread.submit(self._computed, batch.input_ids, batch.lengths)))
            self._next += 1

    def _computed(self, input_ids: Tensor, lengths: Sequence[int]) -> Features:
        with self._lock:
            return self.source.of(input_ids, lengths)
