"""Ctrl-C at any line of a change of a bank on disk: what is in memory, and in the folder, is of before or of after it."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from folder_banks import SETTINGS, contents, write

from longmem.memory import MemoryBank
from longmem.memory.rows import ledger

SECONDS = 3600
TTL = {"eviction": f"ttl:seconds={SECONDS}", "capacity_tokens": 64}


def several(bank: MemoryBank) -> None:
    with bank.transaction():
        bank.delete("c")
        write(bank, "new", range(400, 406))
        bank.tag("b", ["other"])


# What is done; "expire" is a mere read, of a bank whose documents have outlived their time.
CHANGES: dict[str, Callable[[MemoryBank], Any]] = {
    "add": lambda bank: write(bank, "new", range(400, 409)),
    "add to a full bank": lambda bank: write(bank, "new", range(400, 430)),
    "append": lambda bank: write(bank, "b", range(500, 506)),
    "delete": lambda bank: bank.delete("b"),
    "several": several,
    "clear": lambda bank: bank.clear(),
    "compact": lambda bank: bank.folder.compact(),
    "close": lambda bank: bank.close(),
    "expire": lambda bank: bank.documents(),
}


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(late=0.0)
    monkeypatch.setattr(ledger, "time", SimpleNamespace(time=lambda: time.time() + clock.late))
    return clock


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("banks") / "bank"
    with MemoryBank.create(folder, **SETTINGS, **TTL) as bank:
        for number, name in enumerate("abcde"):
            write(bank, name, range(20 * number, 20 * number + 5 + number))
        bank.pin("d")
    return folder


def state(bank: MemoryBank) -> dict[str, Any]:
    """Return all that can be read, but how often it was."""
    found = contents(bank)
    return {name: [dataclasses.replace(info, num_reads=0), *rest] for name, (info, *rest) in found.items()}


def cut_at(line: int, change: Callable[[], Any]) -> bool:
    """Make a change, and raise KeyboardInterrupt at the n-th line of this package that it comes to; return whether it did."""
    left = line

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        if "/longmem/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if not left:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        change()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left <= 0


def outcomes(name: str, folder: Path, work: Path, clock: SimpleNamespace, lines: range) -> int:
    """Cut a change short at each of these lines, up to its last; return at how many."""
    shutil.copytree(folder, work)
    with MemoryBank.open(work) as bank:
        before = state(bank)
        clock.late = 2 * SECONDS if name == "expire" else 0.0
        CHANGES[name](bank)
        bank.close()
    with MemoryBank.open(work) as bank:
        after = state(bank)
    right = [after] if name == "expire" else [before, after]
    for line in lines:
        clock.late = 0.0
        shutil.rmtree(work)
        shutil.copytree(folder, work)
        bank = MemoryBank.open(work)
        state(bank)
        clock.late = 2 * SECONDS if name == "expire" else 0.0
        if not cut_at(line, functools.partial(CHANGES[name], bank)):
            bank.close()
            return line
        now, written, refused = None, False, ""
        try:
            now = state(bank)
            if name != "add to a full bank":  # what is written would let go of more
                write(bank, "later", [1, 2, 3])
                written = True
            bank.close()
        except ValueError as error:
            refused = str(error)
        assert not refused or re.search("open (it|the bank) again", refused), line
        assert now is None or now in right, line
        with MemoryBank.open(work) as again:
            again.folder.verify()
            assert ("later" in again) == written, line  # what a call has written stays
            if written:
                again.delete("later")
            assert state(again) in right if now is None else state(again) == now, line
    return len(lines)


ALL = [pytest.param(name, range(1, 9999), marks=pytest.mark.slow) for name in CHANGES]


@pytest.mark.parametrize(("name", "lines"), [("expire", range(60, 240, 60)), *ALL])
def test_an_interrupted_change_is_made_or_not(name, lines, folder, tmp_path, clock):
    assert outcomes(name, folder, tmp_path / "bank", clock, lines) >= 3


def delete_and_go_on(bank: MemoryBank) -> None:
    with bank.transaction():
        with pytest.raises(ZeroDivisionError):
            bank.delete("b")
        write(bank, "c", [7, 8])


@pytest.mark.parametrize("is_open", [True, False])
def test_half_of_a_change_is_never_committed_by_who_goes_on(is_open, folder, tmp_path, clock, monkeypatch):
    shutil.copytree(folder, tmp_path / "bank")
    with MemoryBank.open(tmp_path / "bank") as bank:
        before = state(bank)
        forget = type(bank._table.ledger).forget_names
        monkeypatch.setattr(type(bank._table.ledger), "forget_names", lambda *given: 1 / 0)
        if is_open:
            with pytest.raises(ValueError, match="must not be committed"):
                delete_and_go_on(bank)
        else:
            clock.late = 2 * SECONDS
            with pytest.raises(ZeroDivisionError):
                bank.documents()
            clock.late = 0.0
        monkeypatch.setattr(type(bank._table.ledger), "forget_names", forget)
        assert state(bank) == before
        write(bank, "later", [1, 2, 3])
    with MemoryBank.open(tmp_path / "bank") as bank:
        bank.folder.verify()
        assert list(state(bank)) == [*before, "later"]
