"""A process that forks workers, some of them to be killed: torch is imported once, and a worker costs a fork.

`python folder_worker.py` reads lines of JSON, [function, arguments, seconds until the worker is killed or null], and
answers each with a line: [what the worker reported, its exit status as `os.waitpid` gives it].
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from failing_calls import FailingCalls
from fake_encoder import FakeModel, stored
from fake_encoder import make_bank as make_fake_bank
from fake_encoder import write as write_segment
from folder_banks import RandomSteps, write

from longmem.memory import MemoryBank, has_bank
from longmem.memory.folder import disk_storage
from longmem.memory.folder.catalogue import Catalogue
from longmem.memory.index import approximate

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
    disk_storage.write_tensors = between_ticks(disk_storage.write_tensors)
    os.fsync = between_ticks(os.fsync)
    os.unlink = between_ticks(os.unlink)


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


def read_as_nobody(report: Report, folder: str) -> None:
    """Report what another user is told about a bank."""
    os.setgid(65534)
    os.setuid(65534)
    for use in (has_bank, MemoryBank.load, MemoryBank.open, lambda folder: MemoryBank.open(folder, read_only=True)):
        try:
            report(str(use(folder)))
        except Exception as error:
            report(f"{type(error).__name__}: {error}")


STEPS = {
    "add": lambda bank: write_segment(bank, FakeModel("a"), "new", list(range(900, 923))),
    "append": lambda bank: write_segment(bank, FakeModel("a"), "one", list(range(900, 917))),
    "update": lambda bank: _replace(bank),
    "delete": lambda bank: bank.delete("one"),
    "compact": lambda bank: bank.folder.compact(),
    "refresh": lambda bank: bank.freshness.reencode(FakeModel("b")),
    "merge": lambda bank: write_segment(bank, FakeModel("a"), "new", list(range(900, 908))),
    "close": lambda bank: bank.close(),
}


def _replace(bank: MemoryBank) -> None:
    with bank.transaction():
        bank.delete("one")
        write_segment(bank, FakeModel("a"), "one", list(range(900, 917)))


def state(bank: MemoryBank) -> dict[str, Any]:
    """Return all that can be read of a bank of `fake_encoder`."""
    found: dict[str, Any] = {}
    for info in bank.documents():
        name = info.document_id
        ids = bank.token_ids(name)
        numbers = stored(bank, name).tolist() if info.num_chunks else []
        found[name] = [info, bank.segments(name), None if ids is None else ids.tolist(), numbers]
    return found


def state_or_refusal(bank: MemoryBank) -> dict[str, Any] | str:
    """Return all that can be read or, from a bank that refuses everything, what it says."""
    refusals = set()
    asked = (bank.documents, lambda: bank.search(1, torch.ones(2, 1, 6), 2), lambda: "one" in bank, bank.folder.reload)
    for ask in (*asked, lambda: write_segment(bank, FakeModel("a"), "never", [1])):
        try:
            if ask is asked[0]:
                return state(bank)
            ask()
        except ValueError as error:
            refusals.add(str(error))
    assert len(refusals) == 1, refusals
    assert "open the bank again" in (refusal := refusals.pop()), refusal
    return refusal


def fail_calls(report: Report, start: str, step: str, faults: list[tuple[int, int, int]]) -> None:
    """Do one step on copies of a bank, with other system calls that fail each time; report what came out of each.

    Args:
        report: is told, for each fault, the name of the first call that failed, empty if none did; whether the step raised;
            whether the bank then refused everything; and all that was not as it must be.
        start: folder of the bank.
        step: of `STEPS`, "open", "save" or "create".
        faults: the first call that fails, counted from 1, the number of its error, and how many calls fail from there on.
    """
    disk_storage.SEGMENTS_TO_MERGE = 3 if step == "merge" else 8
    approximate.EXACT_BELOW = 4
    place = Path(start).parent / "copies"
    outcomes = _outcomes(Path(start), place, step)
    calls = FailingCalls(place)
    for fault in faults:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place / "bank")
        descriptors = len(os.listdir("/proc/self/fd"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told = _fail_call(place, step, outcomes, calls, fault)
        gc.collect()
        # When a file cannot be mapped, torch leaves it open.
        if len(os.listdir("/proc/self/fd")) > descriptors and not calls.name.startswith("mmap"):
            told["wrong"].append("a file is left open")
        report({"call": calls.name, "number": fault[0], **told})
    shutil.rmtree(place, ignore_errors=True)


def _outcomes(start: Path, place: Path, step: str) -> list[Any]:
    """Return what a bank may hold after a step that was not done, and after one that was."""
    found = []
    for is_done in (False, True):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place / "bank")
        if is_done:
            _do(place, step)
        if step == "create" and not is_done:
            found.append({})
            continue
        with MemoryBank.open(place / ("new" if step == "create" else "bank"), read_only=True) as bank:
            found.append(state(bank))
    return found


def _other_bank() -> MemoryBank:
    bank = make_fake_bank(FakeModel("a"))
    write_segment(bank, FakeModel("a"), "other", list(range(700, 721)))
    return bank


def _do(place: Path, step: str) -> None:
    if step == "save":
        _other_bank().save(place / "bank")
    elif step == "create":
        MemoryBank.create(place / "new", memory_layers=[1, 4], chunk_size=4).close()
    elif step == "open":
        MemoryBank.open(place / "bank").close()
    else:
        with MemoryBank.open(place / "bank") as bank:
            _prepare(bank, step)
            STEPS[step](bank)


def _prepare(bank: MemoryBank, step: str) -> None:
    """Do what must not fail: what is read is counted when the bank is closed, and an index is saved then."""
    if step == "close":
        bank.search(1, torch.ones(2, 1, 6), 2)


def _is_one_of(found: dict[str, Any], allowed: list[dict[str, Any]], step: str) -> bool:
    """Return whether a state is allowed; a refresh commits document by document, so each may be old or new."""
    if step != "refresh":
        return found in allowed
    return all(found.keys() == one.keys() for one in allowed) and all(
        found[name] in [one[name] for one in allowed] for name in found
    )


def _fail_call(
    place: Path, step: str, outcomes: list[Any], calls: FailingCalls, fault: tuple[int, int, int]
) -> dict[str, Any]:
    raised, refuses, wrong = None, False, []
    folder = place / ("new" if step == "create" else "bank")
    bank = MemoryBank.open(folder) if step in STEPS else None
    other = _other_bank() if step == "save" else None
    if bank is not None:
        _prepare(bank, step)
    with calls.failing(*fault):
        try:
            if bank is not None:
                STEPS[step](bank)
            elif other is not None:
                other.save(folder)
            else:
                _do(place, step)
        except Exception as error:
            raised = error
    if raised is not None and type(raised) is not ValueError:
        wrong.append(f"raised {raised!r}")
    allowed = outcomes
    if bank is not None and step != "close":
        found = state_or_refusal(bank)
        refuses = isinstance(found, str)
        if not refuses:
            allowed = outcomes[:1] if raised else outcomes[1:]
            if not _is_one_of(found, outcomes if step == "refresh" else allowed, step):
                wrong.append("the bank was changed by a call that failed" if raised else "the bank was not changed")
            bank.rename("two", "zwei")
            allowed = outcomes if step == "refresh" else allowed
            allowed = [{"zwei" if name == "two" else name: each for name, each in one.items()} for one in allowed]
            for one in allowed:
                one["zwei"] = [dataclasses.replace(one["zwei"][0], document_id="zwei"), *one["zwei"][1:]]
        elif not raised:
            allowed = outcomes[1:]
    if bank is not None:
        bank.close()
    if step == "create" and not has_bank(folder):
        if not raised:
            wrong.append("no bank was made")
        return {"raised": raised is not None, "refuses": refuses, "wrong": wrong}
    try:
        with MemoryBank.open(folder, read_only=True) as reader:
            reader.folder.verify()
            if not _is_one_of(state(reader), allowed, step):
                wrong.append(f"on the disk is another state: {sorted(state(reader))}")
        with MemoryBank.open(folder) as writer:
            left = {path.name for path in (folder / "segments").glob("*")}
            if left != {segment.file.path.name for segment in writer._table.storage.segments}:
                wrong.append(f"files are left: {left}")
            writer.folder.verify()
    except ValueError as error:
        wrong.append(f"the bank is lost: {error}")
    return {"raised": raised is not None, "refuses": refuses, "wrong": wrong}


def run(function: str, arguments: dict[str, Any], kill_after: float | None) -> tuple[list[Any], int]:
    """Return what a forked worker reported, and its exit status."""
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:

        def report(message: Any) -> None:
            signal.alarm(300)
            os.write(writable, json.dumps(message).encode() + b"\n")

        signal.alarm(300)  # a worker that waits for ever, and says nothing more, fails its test instead
        code = 1
        try:
            globals()[function](report, **arguments)
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
