"""System calls that fail on purpose: a library to be preloaded (`failing_calls.c`), and how a process that has it uses it."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


def build(folder: Path) -> str | None:
    """Return the path of the library, made in a folder, for LD_PRELOAD.

    None where it cannot be made: there is no compiler, or no Linux.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "failing_calls.so"
    source = Path(__file__).with_suffix(".c")
    options = ["-O1", "-shared", "-fPIC", "-D_LARGEFILE64_SOURCE", "-o", str(library), str(source), "-ldl"]
    done = subprocess.run([compiler, *options], capture_output=True)
    return str(library) if done.returncode == 0 else None


class FailingCalls:
    """The calls of this process on what is below `folder`, some of which fail inside `failing`.

    Raises RuntimeError if the library is not loaded.
    """

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(None)
        if not hasattr(self._library, "faults_arm"):
            raise RuntimeError("the library of failing calls is not loaded")
        self._library.faults_name.restype = ctypes.c_char_p
        self._library.faults_watch(str(folder).encode())

    @contextlib.contextmanager
    def failing(self, number: int, error: int, count: int) -> Iterator[None]:
        """Let `count` calls fail with an error number inside the block, from this one on, counted from 1."""
        self._library.faults_arm(ctypes.c_long(number), ctypes.c_int(error), ctypes.c_long(count))
        try:
            yield
        finally:
            self.num_failed, self.name = self._library.faults_failed(), self._library.faults_name().decode()
            self._library.faults_arm(ctypes.c_long(-1), 0, ctypes.c_long(0))
