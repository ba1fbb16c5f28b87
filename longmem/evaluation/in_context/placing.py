"""Where demonstrations go: whole ones into the window, as many as fit, and the others into what each system reads."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence

from longmem.evaluation.systems import BackboneSystem, RetrievalSystem, System

Line = list[int]


@dataclasses.dataclass(frozen=True)
class Shots:
    """Token ids of one draw of demonstrations: for the window, for memory, and of another task for the wrong memory."""

    window: list[Line]
    memory: list[Line]
    wrong: list[Line]


def never_cut(systems: Iterable[System]) -> None:
    """Have systems that look for passages take a demonstration for one, and look with the question alone."""
    for system in systems:
        if isinstance(system, RetrievalSystem):
            system.passage_tokens = sys.maxsize
            system.query_tokens = None


def window_lines(system: System, shots: Shots, room: int) -> list[Line]:
    """Return the demonstrations that stand right before a question.

    Args:
        system: one that pastes passages keeps a share of its window for them.
        shots: the last of `window` that fit.
        room: tokens of the question and what follows it.
    """
    size = system.window
    if isinstance(system, RetrievalSystem):
        size -= int(system.pasted_share * system.window)
    return last_that_fit(shots.window, size - room)


def read_lines(system: System, shots: Shots, room: int) -> list[Line]:
    """Have a system read the demonstrations for memory, each a passage, and return those that it can use.

    The backbone with a longer window gets as many as fit before those for the window, the last ones.
    """
    memory = shots.memory
    if isinstance(system, BackboneSystem):
        lines = window_lines(system, shots, room)
        has_room = system.local_tokens and len(lines) == len(shots.window)
        memory = last_that_fit(memory, system.window - room - len(joined(lines))) if has_room else []
    system.read(memory, instead=shots.wrong)
    return {"off": [], "wrong": shots.wrong}.get(system.name, memory)


def last_that_fit(lines: Sequence[Line], size: int) -> list[Line]:
    """Return as many whole lines from the end as `size` tokens hold.

    >>> last_that_fit([[1], [2, 2], [3, 3, 3]], 5)
    [[2, 2], [3, 3, 3]]
    """
    start = len(lines)
    while start and len(lines[start - 1]) <= size:
        start -= 1
        size -= len(lines[start])
    return list(lines[start:])


def joined(lines: Iterable[Line]) -> Line:
    """Return the tokens of lines one after the other."""
    return [token for line in lines for token in line]
