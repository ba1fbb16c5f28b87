"""Files and folders are written whole or not at all, private unless told otherwise, and what is no file is never waited for."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from longmem import files


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
    [(None, 0o600, 0o700), ("private", 0o600, 0o700), ("group", 0o640, 0o750), ("umask", 0o664, 0o775)],
)
def test_who_may_read(tmp_path, monkeypatch, access, file_mode, folder_mode):
    if access is not None:
        monkeypatch.setenv(files.ACCESS, access)
    before = os.umask(0o002)
    try:
        with files.new_folder(tmp_path / "a" / "b") as draft:
            (draft / "inner").mkdir()
            (draft / "inner" / "file").write_text("text")
        files.write_file(tmp_path / "a" / "file", "text")
        assert os.umask(0o002) == 0o002
    finally:
        os.umask(before)
    assert {mode(path) for path in (tmp_path / "a").rglob("*") if path.is_file()} == {file_mode}
    assert {mode(path) for path in (tmp_path / "a", *(tmp_path / "a").rglob("*")) if path.is_dir()} == {folder_mode}


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
with files.new_file({str(tmp_path / "file")!r}) as draft:
    draft.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = os.listdir(tmp_path)
    other = left.replace(left.split("-")[1], str(os.getppid()))
    (tmp_path / other).write_text("of a process that is there")
    (tmp_path / ".file.draft").write_text("of somebody else")
    files.write_file(tmp_path / "file", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted(["file", other, ".file.draft"])


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
    for content in (b"", b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match="file' is damaged or incomplete"):
            files.read_json(tmp_path / "file")


def test_a_folder_that_is_there_stays_as_it_is(tmp_path):
    tmp_path.chmod(0o755)
    assert files.make_folder(tmp_path) == tmp_path
    assert mode(tmp_path) == 0o755
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        files.make_folder(tmp_path / "file")
