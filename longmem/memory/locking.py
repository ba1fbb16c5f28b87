"""The lock of a bank: a read sees a segment as it was before a write, or as it is after it."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any


class BankLock:
    """Return a lock that a thread may take again while it holds it; a copy of it is a lock of its own, not taken."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._lock = threading.RLock()
