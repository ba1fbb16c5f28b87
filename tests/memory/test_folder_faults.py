"""System calls that fail: a call that fails leaves nothing behind, on the disk or in the object, now or with a later commit.

The object is as it was, or refuses everything until the bank is opened again; the bank on the disk is whole in any case.
"""

import errno
from collections import Counter

import pytest
from fake_encoder import FakeModel, make_bank, write

ERRORS = {name: getattr(errno, name) for name in ("EIO", "ENOSPC", "EMFILE", "EROFS")}
STEPS = ("add", "append", "update", "delete", "compact", "refresh", "merge", "close", "save", "create", "open")
FOR_GOOD = 2**30
FAULTS_OF_A_WORKER = 40


def make_folder(folder, step):
    """Make a bank of several segments, with something deleted and tails that wait."""
    bank = make_bank(FakeModel("a"), index="hnsw" if step == "close" else "exact", refresh="lazy")
    write(bank, FakeModel("a"), "two", list(range(100, 119)))
    bank.save(folder)
    with type(bank).open(folder) as bank:
        for position, name in enumerate(["one", "gone", "three"]):
            write(bank, FakeModel("a"), name, list(range(200 * position, 200 * position + 21)))
        bank.delete("gone")


def fail(workers, tmp_path, step, faults):
    """Return what a worker reports of faults, after a check that nothing was wrong with any of them."""
    start = tmp_path / "start"
    if not start.exists():
        make_folder(start, step)
    reports, status = workers.run("fail_calls", start=str(start), step=step, faults=faults)
    if not workers.fails_calls:
        pytest.skip("needs a C compiler")
    assert status == 0, reports
    wrong = [
        (fault, report["call"], report["wrong"])
        for fault, report in zip(faults, reports, strict=True)
        if report["wrong"]
    ]
    assert not wrong, f"{step}: {wrong}"
    return reports


@pytest.mark.parametrize("step", STEPS)
def test_a_call_of_the_system_that_fails(workers, tmp_path, step):
    number = STEPS.index(step)
    faults = [
        (2 + number + 5 * place + 23 * again, error, (1, FOR_GOOD)[(place + number + again) % 2])
        for place, error in enumerate(ERRORS.values())
        for again in range(2)
        if place != number % 4
    ]
    reports = fail(workers, tmp_path, step, faults)
    assert sum(bool(report["call"]) for report in reports) >= 5
    assert any(report["raised"] for report in reports)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, FOR_GOOD])
@pytest.mark.parametrize("step", STEPS)
def test_every_call_of_the_system_that_fails(workers, tmp_path, step, count):
    found = Counter()
    for place, error in enumerate(ERRORS.values()):
        numbers = range(1 + place, 1000, 4)
        for first in range(0, len(numbers), FAULTS_OF_A_WORKER):
            part = numbers[first : first + FAULTS_OF_A_WORKER]
            reports = fail(workers, tmp_path, step, [(number, error, count) for number in part])
            found.update(key for report in reports if report["call"] for key in ("all", report["call"]))
            found.update({key: sum(report[key] for report in reports) for key in ("raised", "refuses")})
            if not reports[-1]["call"]:  # there were no more calls
                break
    print(step, count, dict(found))
    assert found["raised"]
