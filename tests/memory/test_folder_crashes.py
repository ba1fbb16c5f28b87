"""A process that is killed, or whose disk is full, leaves the last commit or the one in progress, whole."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from folder_banks import SETTINGS, RandomSteps, contents, segment_files, write

from longmem.memory import MemoryBank
from longmem.memory.folder.bank_folder import has_bank

KILLED = signal.SIGKILL


def names_of_segments(bank: MemoryBank) -> set[str]:
    return {segment.file.path.name for segment in bank._table.storage.segments}


def check_after_a_kill(folder: Path, seed: int, reports: list[int]) -> str:
    """Check what a killed worker left; return which of the two allowed commits it is."""
    steps = RandomSteps(seed)
    if not reports and not has_bank(folder):
        RandomSteps(seed, folder).bank.close()  # nothing is in the way of another try
        return "none"
    for _ in range(reports[-1] if reports else 0):
        steps.step()
    last = contents(steps.bank)
    steps.step()
    in_progress = contents(steps.bank)
    if seed % 2:  # whoever comes first must undo what was cut short
        with MemoryBank.open(folder, read_only=True) as reader:
            assert contents(reader) in (last, in_progress)
    with MemoryBank.open(folder) as bank:
        bank.folder.verify()
        found = contents(bank)
        assert found in (last, in_progress)
        assert list(found) in (list(last), list(in_progress))
        assert segment_files(folder) == names_of_segments(bank)
        write(bank, "after", range(10**6, 10**6 + 9))
        bank.folder.compact()
        # SQLite leaves a journal that was not begun in earnest until the next commit.
        assert {path.name for path in folder.iterdir()} <= {"catalogue.sqlite", "segments", "lock"}
        bank.folder.verify()
    return "last" if found == last else "in progress"


def kill_many(workers, tmp_path: Path, seeds: range) -> dict[str, int]:
    outcomes = {"none": 0, "last": 0, "in progress": 0}
    for seed in seeds:
        # Every fourth is killed early, so that some die while they make the bank.
        delay = random.Random(seed).uniform(0, 0.04 if seed % 4 == 0 else 0.45)
        folder = tmp_path / str(seed)
        reports, status = workers.run("do_random_steps", delay, folder=str(folder), seed=seed)
        assert os.waitstatus_to_exitcode(status) == -KILLED, reports
        assert reports == list(range(len(reports)))
        outcomes[check_after_a_kill(folder, seed, reports)] += 1
        shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def test_a_killed_process_leaves_the_last_commit_or_the_one_in_progress(workers, tmp_path):
    assert kill_many(workers, tmp_path, range(12))["last"]


@pytest.mark.slow
def test_many_killed_processes(workers, tmp_path):
    outcomes = kill_many(workers, tmp_path, range(1000, 1220))
    print(outcomes)
    assert min(outcomes.values()) > 0


def make_bank(folder: Path) -> None:
    """Make a bank with several segments, a deleted and an evicted part, and short chunks."""
    with MemoryBank.create(folder, **SETTINGS, capacity_tokens=80) as bank:
        for position, name in enumerate("abcd"):
            write(bank, name, range(100 * position, 100 * position + 18))
        write(bank, "c", range(218, 226))
        bank.delete("d")


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", ["transaction", "compact", "save over", "create"])
def test_an_exit_at_any_point_of_a_change_leaves_the_old_or_the_new(workers, tmp_path, change, every):
    make_bank(tmp_path / "start")
    shutil.copytree(tmp_path / "start", tmp_path / "end")
    reports, status = workers.run("change_and_exit", folder=str(tmp_path / "end"), change=change, count=-1)
    assert reports == ["done"], (reports, status)
    with MemoryBank.load(tmp_path / "start") as old, MemoryBank.load(tmp_path / "end") as new:
        allowed = [contents(old), contents(new)]
    outcomes = []

    def exits_at(count: int) -> bool:
        """Note what an exit at this point leaves; return whether there is such a point."""
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "start", folder)
        reports, status = workers.run("change_and_exit", folder=str(folder), change=change, count=count)
        if reports == ["done"]:
            return False
        assert os.waitstatus_to_exitcode(status) == 77, reports
        with MemoryBank.open(folder) as bank:
            bank.folder.verify()
            outcomes.append(allowed.index(contents(bank)))
            assert segment_files(folder) == names_of_segments(bank)
        return True

    end = next(count for count in range(1, 1000, every) if not exits_at(count))
    for count in range(end - every + 1, end):  # the last points, some of them behind the commit
        exits_at(count)
    assert sorted(outcomes) == outcomes
    assert len(outcomes) * every > 15
    assert change in ("compact", "create") or set(outcomes) == {0, 1}
