"""Files and folders are written whole or not at all, private unless told otherwise, and what is no file is never waited for."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killing import kill_at_every_change
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from longmem import files
from longmem.evaluation.folder import RunFolder
from longmem.evaluation.perplexity.scoring import Cut, Window, WindowScores
from longmem.evaluation.perplexity.texts import Text, TextScores, file_of, load_scores, save_scores
from longmem.training.checkpoints import Checkpoints
from longmem.training.records import RunLog


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_an_error_while_a_file_is_written_leaves_the_old_one_and_no_draft(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    files.write_file(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            with pytest.raises(OSError, match="No space"):
                files.write_file(path, "new")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["config.json"]
    files.write_file(path, "new")
    assert path.read_text() == "new"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail():
        with files.new_folder(tmp_path / "above" / "run") as draft:
            (draft / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path / "above") == []
    with files.new_folder(tmp_path / "above" / "run") as draft:
        (draft / "inner").mkdir()
        (draft / "inner" / "whole").write_text("whole")
        assert not (tmp_path / "above" / "run").exists()
    assert (tmp_path / "above" / "run" / "inner" / "whole").read_text() == "whole"


@pytest.mark.parametrize(
    ("access", "file_mode", "folder_mode"),
    [
        (None, 0o600, 0o700),
        ("private", 0o600, 0o700),
        ("group", 0o640, 0o750),
        (0o002, 0o664, 0o775),
        (0o777, 0o600, 0o700),  # the owner reads, and enters, what he wrote under any umask
        (0o133, 0o644, 0o744),
    ],
)
def test_who_may_read(tmp_path, monkeypatch, access, file_mode, folder_mode):
    umask = access if isinstance(access, int) else 0o002
    if access is not None:
        monkeypatch.setenv(files.ACCESS, "umask" if access == umask else access)
    before = os.umask(umask)
    try:
        with files.new_folder(tmp_path / "a" / "b") as draft:
            (draft / "inner").mkdir()
            (draft / "inner" / "file").write_text("text")
        files.write_file(tmp_path / "a" / "file", "text")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert {mode(path) for path in (tmp_path / "a").rglob("*") if path.is_file()} == {file_mode}
    assert {mode(path) for path in (tmp_path / "a", *(tmp_path / "a").rglob("*")) if path.is_dir()} == {folder_mode}


@pytest.mark.parametrize("name", ["n" * 250 + ".json", "\u00e9" * 125 + ".txt", "n" * 255])
def test_any_name_that_the_system_takes_will_do(name, tmp_path):
    files.write_file(tmp_path / name, "text")
    with files.new_folder(tmp_path / "folder" / name) as draft:
        (draft / "file").touch()
    assert (tmp_path / name).read_text() == "text"
    assert (tmp_path / "folder" / name / "file").exists()


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    path = tmp_path / "file"
    files.write_file(path, "1")
    path.chmod(0o644)
    files.write_file(path, "2")
    assert mode(path) == 0o644


def test_an_unknown_access_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(files.ACCESS, "everybody")
    with pytest.raises(ValueError, match="LONGMEM_ACCESS must be private, group or umask, got 'everybody'"):
        files.write_file(tmp_path / "file", "text")
    assert os.listdir(tmp_path) == []


def test_drafts_of_processes_that_are_gone_are_removed_and_no_others(tmp_path):
    code = f"""
import os, signal
from longmem import files
with files.new_file({str(tmp_path / "file.json")!r}) as draft:
    draft.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = os.listdir(tmp_path)
    assert left.endswith(".draft.json")
    others = [left.replace(left.split("-")[1], str(number)) for number in (os.getppid(), os.getpid())]
    others += [left.replace(left.split("-")[0], ".file.00000000"), ".file.draft", ".notes.draft.json"]
    for name in others:
        (tmp_path / name).write_text("of a process that is there, of another machine, of somebody else")
    files.write_file(tmp_path / "file", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted(["file", *others])


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to("file")
    assert files.read_json(tmp_path / "link") == {"a": 1}
    for name, follow in (("pipe", True), (".", True), ("link", False), ("missing", True)):
        with pytest.raises(OSError):
            files.read_file(tmp_path / name, follow=follow)
    with pytest.raises(ValueError, match="at most 3 bytes"):
        files.read_file(tmp_path / "file", max_bytes=3)
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b"[]"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match="file can't be read, it is damaged or incomplete"):
            files.read_json(tmp_path / "file")


# What a folder from somebody else may hold in the place of something that is written to, and who writes it.
TRAPS = {
    "link": lambda path, outside: path.symlink_to(outside),
    "link to nothing": lambda path, outside: path.symlink_to(outside / "none"),
    "second name": lambda path, outside: path.hardlink_to(outside / "file"),
    "pipe": lambda path, outside: os.mkfifo(path),
}
WRITERS = {
    "lines": ("log.jsonl", lambda folder: files.append_lines(folder / "log.jsonl", ["line\n"])),
    "predictions": ("predictions.jsonl", lambda folder: RunFolder(folder, {"a": 1}).write([{"id": "1"}])),
    "sessions": ("sessions.jsonl", lambda folder: RunFolder(folder, {"a": 1}).__exit__(None)),
    "contents": (files.PENDING, lambda folder: finish(folder)),
    "a part of contents": (f"{files.PENDING}/part", lambda folder: finish(folder)),
    "a folder of contents": ("inner", lambda folder: finish(folder)),
    "scores": ("documents", lambda folder: save_scores(file_of(folder, 0, "file"), TEXT, SCORES)),
    "checkpoints": ("checkpoints", lambda folder: Checkpoints(folder, 1)),
    "tensorboard": ("tensorboard", lambda folder: RunLog(folder)),
}


ONE = torch.ones(1, dtype=torch.int64)
SCORED = WindowScores((torch.ones(1),), 1.0)
TEXT = Text("file", torch.arange(3), "other", torch.arange(3))
SCORES = {Cut(2, 2): TextScores("file", 3, (Window(0, 1, 2),), (ONE,), ONE, {"off": SCORED})}


OF_SCORES = {"name": "a", "num_tokens": 3, "cuts": ["2/2"], "systems": ["off"]}


@pytest.mark.parametrize(
    "told",
    [
        None,
        "{",
        "[]",
        *(json.dumps(OF_SCORES | other) for other in ({}, {"cuts": 3}, {"cuts": ["x"]}, {"systems": [3]})),
    ],
)
def test_a_file_that_holds_no_scores_is_refused_by_name(told, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path, None if told is None else {"text": told})
    files.seal_tensors(path, {})
    with pytest.raises(ValueError, match=r"a\.safetensors can't be read.*it holds no scores"):
        load_scores(path)


def finish(folder):
    with files.new_contents(folder) as draft:
        (draft / "inner").mkdir()
        for name in ("part", "inner/file"):
            (draft / name).write_text("part")


@pytest.mark.filterwarnings("ignore:what was saved to")  # a pipe in the place of a folder
@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_outside_a_folder_is_written_to(writer, trap, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    (outside / "file").write_text("somebody's, without an end")
    (outside / "step-1").mkdir()
    (outside / "file").chmod(0o640)
    (name, write), is_folder = WRITERS[writer], writer not in ("lines", "predictions", "sessions", "a part of contents")
    (folder / name).parent.mkdir(parents=True)
    target = outside if is_folder or trap in ("link to nothing", "second name") else outside / "file"
    TRAPS[trap](folder / name, target)
    before = {path: (mode(path), path.is_dir() or path.read_bytes()) for path in outside.rglob("*")}
    signal.alarm(20)  # a pipe is not waited for
    try:
        write(folder)
    except (ValueError, OSError) as error:
        assert str(folder / name) in str(error) or "llegal seek" in str(error)  # noqa: PT017
    else:
        assert is_folder or trap == "second name", "it was written through"
    finally:
        signal.alarm(0)
    assert {path: (mode(path), path.is_dir() or path.read_bytes()) for path in outside.rglob("*")} == before


@pytest.mark.parametrize("line", ["[]", "{}", '{"id": 1}', '[["id", "1"]]', "[" * 100_000, "null"])
def test_lines_that_are_none_of_a_run_are_named(line, tmp_path):
    RunFolder(tmp_path, {"a": 1}).write([{"id": "0"}])
    with (tmp_path / "predictions.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"line 2 of .*predictions\.jsonl' must be an object"):
        RunFolder(tmp_path, {"a": 1})


def test_lines_that_had_no_room_are_not_there_later(tmp_path, monkeypatch):
    class Full(io.FileIO):
        """A file on a disk that is full for a moment, in the middle of a line."""

        is_full = True

        def write(self, data):
            if not Full.is_full:
                return super().write(data)
            Full.is_full = False
            super().write(data[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(descriptor, mode, buffering=-1):
        return Full(descriptor, "r+") if buffering == 0 else io.BufferedRandom(Full(descriptor, "r+"))

    path = tmp_path / "log.jsonl"
    files.append_lines(path, ["one\n"])
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdopen", opened)
        with pytest.raises(OSError, match="No space left"):
            files.append_lines(path, ["two\n"])
    assert path.read_text() == "one\n"
    files.append_lines(path, ["three\n"])
    assert path.read_text() == "one\nthree\n"


@pytest.mark.parametrize("size", [3, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 << 19])
def test_lines_of_any_length_stay(tmp_path, size):
    path = tmp_path / "log.jsonl"
    files.append_lines(path, ["a" * size + "\n"])
    files.append_lines(path, ["b" * size + "\n"])
    with path.open("a") as file:
        file.write("c" * size)  # what a killed process left
    files.append_lines(path, ["d\n"])
    assert [(line[0], len(line)) for line in path.read_text().splitlines()] == [("a", size), ("b", size), ("d", 1)]


def test_a_folder_is_removed_at_one_stroke(tmp_path):
    folder = files.make_folder(tmp_path / "folder")
    for name in ("one", "two"):
        files.write_file(folder / name, name)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "remove", lambda path: None)  # as if killed in the middle
        files.discard(folder)
    (left,) = tmp_path.iterdir()
    assert files.DRAFT.fullmatch(left.name)
    assert len(list(left.iterdir())) == 2
    with pytest.raises(FileNotFoundError):
        files.discard(folder)


@pytest.mark.parametrize(
    "name", ["step-²", "step-٣", "step-007", "step-", "step-+1", "step-" + "9" * 5000, "step-1.old"]
)
def test_only_what_bears_the_name_of_a_checkpoint_is_one(name, tmp_path):
    with contextlib.suppress(OSError):  # a name too long for this system
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-12").mkdir(parents=True)
    assert Checkpoints(tmp_path, 1).steps() == [12]


def test_a_sealed_folder_holds_no_pipe(tmp_path):
    (tmp_path / "file").write_text("text")
    files.seal_folder(tmp_path)
    files.check_folder(tmp_path)
    os.mkfifo(tmp_path / "more")
    with pytest.raises(ValueError, match="more can't be read.*no regular file"):
        files.check_folder(tmp_path)


def test_a_folder_that_is_there_stays_as_it_is(tmp_path):
    tmp_path.chmod(0o755)
    assert files.make_folder(tmp_path) == tmp_path
    assert mode(tmp_path) == 0o755
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        files.make_folder(tmp_path / "file")


@pytest.mark.slow
def test_contents_are_of_one_call_wherever_its_process_is_killed(tmp_path):
    folder = tmp_path / "model"
    (tmp_path / "model").mkdir()
    (folder / "notes.txt").write_text("mine")

    def save(version: str, shards: int) -> None:
        with files.new_contents(folder, r"part-\d") as draft:
            for number in range(shards):
                (draft / f"part-{number}").write_text(version)
            (draft / "inner").mkdir()
            (draft / "inner" / "config").write_text(version)

    def found() -> tuple[str, int]:
        place = files.current(folder)
        parts = {path.name: path.read_text() for path in place.glob("part-*")}
        (version,) = {*parts.values(), (place / "inner" / "config").read_text()}
        return version, len(parts)

    save("old", 3)
    seen = []
    killed = kill_at_every_change(folder, lambda: save("new", 2), lambda: seen.append(found()))
    assert killed > 30
    assert set(seen) == {("old", 3), ("new", 2)}
    assert seen[0] == ("old", 3)
    save("last", 1)
    assert found() == ("last", 1)
    assert {path.name for path in folder.iterdir()} == {"part-0", "inner", "notes.txt"}
    assert (folder / "notes.txt").read_text() == "mine"


def test_every_bit_of_a_sealed_file_counts(tmp_path):
    path = tmp_path / "weights.safetensors"
    tensors = {"a": torch.arange(5.0), "b": torch.ones(2, dtype=torch.int8)}
    save_file(tensors, path, {"format": "pt"})
    assert files.check_tensors(path) is None  # another tool's
    files.seal_tensors(path, {"name": "x"})
    assert files.check_tensors(path) == {"name": "x"}
    assert all(torch.equal(each, tensors[name]) for name, each in load_file(path).items())
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises((ValueError, SafetensorError), match="weights|eader"):
            files.check_tensors(path) or load_file(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"weights\.safetensors can't be read, it is damaged"):
        files.check_tensors(path)
