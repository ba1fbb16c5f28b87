"""System calls that fail while streams, models, checkpoints and evaluations are saved: the old stays, or the new is whole.

What is in memory is as it was, and the next save is as if nothing had been. Banks have tests of their own, in
`tests/memory/test_folder_faults.py`.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import failing_calls
import pytest
from kept_fast import fast

ERRORS = {name: getattr(errno, name) for name in ("EIO", "ENOSPC", "EMFILE", "EROFS")}
WRITERS = ("stream", "model", "checkpoint", "evaluation")
FOR_GOOD = 2**30
Fault = tuple[int, int, int]
Fail = Callable[[str, Sequence[Fault]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def fail(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fail]:
    """Return what makes calls of a writer fail, and says what came of it, after a check that nothing was wrong."""
    library, here = failing_calls.build(tmp_path_factory.mktemp("library")), Path(__file__).parent
    if library is None:
        pytest.skip("needs a C compiler")
    paths = os.pathsep.join([str(here), str(here.parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, here / "writer_faults.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "LD_PRELOAD": library},
    )

    def ask(writer: str, faults: Sequence[Fault]) -> list[dict[str, Any]]:
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps([writer, faults]), file=process.stdin, flush=True)
        reports: list[dict[str, Any]] = json.loads(process.stdout.readline())
        wrong = [(fault, each) for fault, each in zip(faults, reports, strict=True) if each["wrong"]]
        assert not wrong, f"{writer}: {wrong}"
        return reports

    yield ask
    process.communicate()


@pytest.mark.parametrize("writer", fast(1, ("checkpoint", "model", "evaluation", "stream")))
def test_a_call_of_the_system_that_fails(fail: Fail, writer: str) -> None:
    faults = [
        (3 + 4 * place + 7 * WRITERS.index(writer), error, (1, FOR_GOOD)[place % 2])
        for place, error in enumerate(ERRORS.values())
    ]
    reports = fail(writer, [*faults, (10**6, errno.EIO, 1)])
    assert sum(bool(each["call"]) for each in reports[:-1]) >= 3
    assert any(each["raised"] for each in reports)
    assert not reports[-1]["call"]
    assert not reports[-1]["raised"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, FOR_GOOD])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_call_of_the_system_that_fails(fail: Fail, writer: str, count: int) -> None:
    found: Counter[str] = Counter()
    for first in range(1, 10_000, 40):
        numbers = range(first, first + 40)
        reports = fail(writer, [(number, [*ERRORS.values()][number % 4], count) for number in numbers])
        found.update(key for each in reports if each["call"] for key in ("all", each["call"]))
        found["raised"] += sum(each["raised"] for each in reports)
        if not reports[-1]["call"]:  # there were no more calls
            break
    print(writer, count, dict(found))
    assert found["raised"]
    assert found["all"] > 20
