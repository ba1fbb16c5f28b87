"""Stopping between two steps: at a signal (Ctrl-C, or a cluster that wants its machine back) or when time is up."""

import signal
import threading
import time
from types import FrameType
from typing import Self


class Interruption:
    """Notice SIGINT and SIGTERM inside a `with` block, without raising; the second SIGINT raises as usual.

    Args:
        max_minutes: the time after which to stop, None for no limit.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.reason: str | None = None

    def __enter__(self) -> Self:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # signals are the main thread's business
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._noticed)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    @property
    def wanted(self) -> bool:
        """Return whether to stop before the next step."""
        if self.reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "max_minutes"
        return self.reason is not None
