"""A process that forks workers, some of them to be killed: torch is imported once, and a worker costs a fork.

`python folder_worker.py` reads lines of JSON, [function, arguments, seconds until the worker is killed or null], and
answers each with a line: [what the worker reported, its exit status as `os.waitpid` gives it].
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fake_encoder import FakeModel
from folder_banks import RandomSteps, write

from longmem.memory import MemoryBank
from longmem.memory.folder import tensor_file
from longmem.memory.folder.catalogue import Catalogue

Report = Callable[[Any], None]
EXIT_AT = 77


def do_random_steps(report: Report, folder: str, seed: int) -> None:
    """Make a bank and change it for ever; report each step that is done."""
    steps = RandomSteps(seed, folder)
    for number in range(1_000_000):
        report(number)
        steps.step()


def exit_at(count: int) -> None:
    """Let this process end at the `count`-th point where something is about to be on the disk, or just got there."""
    left = [count]

    def tick(*_: object) -> None:
        left[0] -= 1
        if not left[0]:
            os._exit(EXIT_AT)

    def between_ticks(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            tick()
            result = function(*arguments, **options)
            tick()
            return result

        return call

    connect = Catalogue._connect

    def traced(catalogue: Any, modes: Any) -> Any:
        connection = connect(catalogue, modes)
        # With so little room SQLite writes pages of an unfinished transaction to its file: there is something to undo.
        connection.execute("PRAGMA cache_size = 1")
        connection.set_trace_callback(tick)  # called before each statement
        return connection

    Catalogue._connect = traced  # type: ignore[method-assign]
    tensor_file.save_file = between_ticks(tensor_file.save_file)
    os.fsync = between_ticks(os.fsync)
    Path.unlink = between_ticks(Path.unlink)  # type: ignore[method-assign]


def change_and_exit(report: Report, folder: str, change: str, count: int) -> None:
    """Do one change of `CHANGES`, and exit on the way; report if that point was never reached."""
    exit_at(count)
    CHANGES[change](folder)
    report("done")


def _transaction(folder: str) -> None:
    with MemoryBank.open(folder) as bank, bank.transaction():
        bank.delete("a")
        write(bank, "a", range(500, 511))
        write(bank, "b", range(511, 520))
        bank.rename("c", "renamed")


def _compact(folder: str) -> None:
    with MemoryBank.open(folder) as bank:
        bank.folder.compact()


def _save_over(folder: str) -> None:
    with MemoryBank.open(folder, read_only=True) as bank:
        other = bank.empty_like()
    write(other, "b", range(600, 613))
    other.save(folder)


def _create(folder: str) -> None:
    with MemoryBank.create(Path(folder) / "new", memory_layers=[1], chunk_size=4):
        pass


def _refresh(folder: str) -> None:
    with MemoryBank.open(folder) as bank:
        bank.freshness.reencode(FakeModel("b"))


CHANGES = {
    "refresh": _refresh,
    "transaction": _transaction,
    "compact": _compact,
    "save over": _save_over,
    "create": _create,
}


def refresh_for_ever(report: Report, folder: str) -> None:
    """Encode a bank again and again, with encoders in turn; report each time that it is done."""
    with MemoryBank.open(folder) as bank:
        for number in range(1_000_000):
            bank.freshness.reencode(FakeModel("ba"[number % 2]))
            report(number)


def write_versions(report: Report, folder: str, seconds: float, enough: str) -> None:
    """Keep two documents of one version each, and a log; the ids of version n start at 1000 n, those of "twin" at 500 more.

    For `seconds` and until the file `enough` is there, for half a minute more at most: readers may be slow on a busy machine.
    """
    with MemoryBank.open(folder) as bank:
        stop, version = time.monotonic() + seconds, 1
        while (now := time.monotonic()) < stop or (now < stop + 30 and not Path(enough).exists()):
            with bank.transaction():
                for name, offset in (("one", 0), ("twin", 500)):
                    bank.delete(name)
                    write(bank, name, range(1000 * version + offset, 1000 * version + offset + 5 + version % 17))
            write(bank, "log", [version])
            if version % 10 == 0:
                with bank.transaction():
                    bank.delete("log")
                    write(bank, "log", range(5))
            if version % 7 == 0:
                bank.folder.compact()
            version += 1
    report(version)


def fill_under_quota(report: Report, folder: str, max_bytes: int) -> None:
    """Write until no file may grow any more; report the error, and what is then in memory and on disk."""
    with MemoryBank.open(folder) as bank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, resource.RLIM_INFINITY))
        try:
            for number in range(1000):
                write(bank, f"big {number}", range(100_000 * (number + 1), 100_000 * (number + 1) + 37 * (number + 1)))
        except ValueError as error:
            report([str(error), [info.document_id for info in bank.documents()]])
        with MemoryBank.open(folder, read_only=True) as reader:
            report([info.document_id for info in reader.documents()])
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        write(bank, "after", range(10**9, 10**9 + 100))
        report([info.document_id for info in bank.documents()])


def run(function: str, arguments: dict[str, Any], kill_after: float | None) -> tuple[list[Any], int]:
    """Return what a forked worker reported, and its exit status."""
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(300)  # a worker that waits for ever fails its test instead
        code = 1
        try:
            globals()[function](lambda message: os.write(writable, json.dumps(message).encode() + b"\n"), **arguments)
            code = 0
        except BaseException:
            os.write(writable, json.dumps(traceback.format_exc()).encode() + b"\n")
        finally:
            os._exit(code)
    os.close(writable)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    with open(readable, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    status = os.waitpid(pid, 0)[1]
    return [json.loads(line) for line in lines if line.endswith(b"\n")], status


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)
