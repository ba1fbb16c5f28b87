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


def fail(workers, tmp_path, step, error, count, *, first, every, most):
    """Return what workers report of so many faults, after a check that nothing was wrong with any of them."""
    start, reports = tmp_path / "start", []
    if not start.exists():
        make_folder(start, step)
    while most > 0:  # a worker has its time
        part = {"first": first + every * len(reports), "every": every, "most": min(most, FAULTS_OF_A_WORKER)}
        told, status = workers.run("fail_calls", start=str(start), step=step, error=ERRORS[error], count=count, **part)
        if not workers.fails_calls:
            pytest.skip("needs a C compiler")
        assert status == 0, told
        reports += told
        most = most - len(told) if len(told) == part["most"] else 0
    wrong = [(report["number"], report["call"], report["wrong"]) for report in reports if report["wrong"]]
    assert not wrong, f"{step}, {error}, {count}: {wrong}"
    return reports


@pytest.mark.parametrize("step", STEPS)
def test_a_call_of_the_system_that_fails(workers, tmp_path, step):
    number = STEPS.index(step)
    reports = []
    for place, error in enumerate(ERRORS):
        options = {"first": 2 + 3 * number + 7 * place, "every": 31, "most": 2}
        reports += fail(workers, tmp_path, step, error, (1, FOR_GOOD)[place % 2], **options)
    assert reports


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, FOR_GOOD])
@pytest.mark.parametrize("step", STEPS)
def test_every_call_of_the_system_that_fails(workers, tmp_path, step, count):
    found = Counter()
    for place, error in enumerate(ERRORS):
        reports = fail(workers, tmp_path, step, error, count, first=1 + place, every=4, most=400)
        found.update(report["call"] for report in reports)
        found.update({"raised": sum(report["raised"] for report in reports), "all": len(reports)})
        found.update({"refused": sum(report["refuses"] for report in reports)})
    print(step, count, dict(found))
    assert found["raised"]
