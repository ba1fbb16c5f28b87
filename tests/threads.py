"""Calls in threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_a_thread(call: Callable[[], object]) -> None:
    """Run a call in a thread of its own, to its end; raise what it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
