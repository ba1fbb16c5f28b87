"""A process that is killed while it refreshes a folder leaves every document whole; readers see whole commits."""

import os
import shutil
import signal
import time

import pytest
import torch
from fake_encoder import FakeModel, make_bank, stored, write

from longmem import MemoryBank

DOCUMENTS = {"one": [8, 8, 5], "two": [12, 3], "three": [7, 9, 8], "four": [16]}


def make_folder(folder):
    model, start = FakeModel("a"), 0
    bank = make_bank(model, refresh="bounded:max_lag=1000000")
    for name, lengths in DOCUMENTS.items():
        for length in lengths:
            write(bank, model, name, list(range(start, start + length)))
            start += length
    bank.save(folder)


def encoders_of(bank) -> dict[str, str]:
    """Return which encoder has written each document, after a check that it is one alone."""
    found = {}
    for name, lengths in DOCUMENTS.items():
        ids = bank.token_ids(name).tolist()
        parts = [tuple(ids[sum(lengths[:n]) : sum(lengths[: n + 1])]) for n in range(len(lengths))]
        made = {each: torch.cat([FakeModel(each).numbers(part) for part in parts], dim=3) for each in "ab"}
        held = stored(bank, name)
        matching = [each for each, numbers in made.items() if torch.equal(held, numbers)]
        assert matching, name
        versions = {bank.encoders.versions[segment.version].stamp.weights for segment in bank.segments(name)}
        assert versions == set(matching), "and its versions say so"
        found[name] = matching[0]
    return found


@pytest.mark.parametrize("every", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_an_exit_at_any_point_of_a_refresh_leaves_each_document_old_or_new(workers, tmp_path, every):
    make_folder(tmp_path / "start")
    outcomes = []
    for count in range(1, 1000, every):
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "start", folder)
        reports, status = workers.run("change_and_exit", folder=str(folder), change="refresh", count=count)
        if reports == ["done"]:
            break
        assert os.waitstatus_to_exitcode(status) == 77, reports
        with MemoryBank.open(folder) as bank:
            bank.folder.verify()
            found = encoders_of(bank)
            outcomes.append(sum(each == "b" for each in found.values()))
            other = FakeModel("b")
            bank.freshness.reencode(other)  # the next call does the rest, and no more
            left = [name for name, each in found.items() if each == "a"]
            assert other.num_encoded == sum(sum(DOCUMENTS[name]) for name in left)
            assert set(encoders_of(bank).values()) == {"b"}
    assert outcomes == sorted(outcomes)
    assert len(set(outcomes)) > (3 if every == 1 else 1)


def test_a_killed_refresh_is_finished_by_the_next_process_that_opens_the_bank(workers, tmp_path):
    for number, delay in enumerate((0.05, 0.15, 0.3)):
        folder = tmp_path / str(number)
        make_folder(folder)
        reports, status = workers.run("refresh_for_ever", delay, folder=str(folder))
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, reports
        model = FakeModel("b")
        with MemoryBank.open(folder, model, refresh="eager") as bank:
            bank.folder.verify()
            assert set(encoders_of(bank).values()) == {"b"}
            assert bank.freshness.mask() is None


def test_a_reader_process_sees_whole_commits_of_a_refresh(workers, tmp_path):
    """While a process encodes a folder again and again, each reload shows documents of one encoder each."""
    make_folder(tmp_path / "bank")
    wait = workers.start("refresh_for_ever", 1.5, folder=str(tmp_path / "bank"))
    seen, stop = set(), time.monotonic() + 1.2
    with MemoryBank.open(tmp_path / "bank", read_only=True) as reader:
        while time.monotonic() < stop:
            reader.folder.reload()
            seen.add(tuple(encoders_of(reader).values()))
    _, status = wait()
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert len(seen) > 1
