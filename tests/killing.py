"""Killing a process at every change that it makes to a folder, or at any moment, to see what it leaves."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.rmdir", "os.chmod")


def forked(action: Callable[[], None]) -> int:
    """Start a child that does something and then ends without a trace of it here; return its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # those of this process are not there
        action()
        code = 0
    finally:
        os._exit(code)


def kill_at_every_change(folder: Path, action: Callable[[], None], check: Callable[[], None], every: int = 1) -> int:
    """Do `action` in children that are killed before their 1st, 2nd, ... change to `folder`; return how many were.

    `check` is called after each, and once more after a child that came to its end. `every`: leave out all but every n-th.
    """
    killed = 0
    while True:

        def until_killed(number: int = killed * every) -> None:
            count = 0

            def audit(event: str, arguments: tuple[object, ...]) -> None:
                nonlocal count
                if event in CHANGES and any(str(each).startswith(str(folder)) for each in arguments[:2]):
                    if count == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count += 1

            sys.addaudithook(audit)
            action()

        _, status = os.waitpid(forked(until_killed), 0)
        check()
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return killed
        killed += 1


def kill_at_any_time(action: Callable[[], None], check: Callable[[], None], kills: int, seconds: float) -> None:
    """Do `action` again and again in children that are killed within so many seconds, and `check` after each."""
    draw = random.Random(0)

    def for_ever() -> None:
        while True:
            action()

    for _ in range(kills):
        child = forked(for_ever)
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check()
