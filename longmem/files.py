"""Files and folders that are on the disk as a whole or not at all, for their owner alone, and that are checked when read.

Whatever is written is made under a draft's name beside its place, synced, and moved there in one step, so a killed process or
a full disk leaves what was there before. The next write of the same name removes the drafts of processes that are gone.

`LONGMEM_ACCESS` says who may read what is written from then on: `private`, its owner alone (the default); `group`, the group
as well; `umask`, whom the process's umask lets.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ACCESS = "LONGMEM_ACCESS"
MODES = {"private": (0o600, 0o700), "group": (0o640, 0o750)}
MAX_BYTES = (
    1 << 28
)  # of a file that is read as a whole, such as a configuration; the largest that are written have a tenth
_umask_lock = threading.Lock()


def modes() -> tuple[int, int]:
    """Return the permissions of new files and of new folders.

    Raises ValueError if `LONGMEM_ACCESS` is none of its values.
    """
    access = os.environ.get(ACCESS) or "private"
    if access == "umask":
        with _umask_lock:  # it can't be read without being set; another thread's file may come out private meanwhile
            mask = os.umask(0o077)
            os.umask(mask)
        return 0o666 & ~mask, 0o777 & ~mask
    if access not in MODES:
        raise ValueError(f"{ACCESS} must be {', '.join(MODES)} or umask, got {access!r}; unset it for private.")
    return MODES[access]


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder, and those above it that are missing, on the disk and with `modes`; one that is there stays as it is."""
    path = Path(path)
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process made it
            each.mkdir(mode=0o700)
            each.chmod(modes()[1])
            sync(each.parent)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is no folder", str(path))
    return path


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere a folder cannot be opened, and needs no sync
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Give everything in a folder, and the folder, its permissions, and wait until all of it is on the disk."""
    file_mode, folder_mode = modes()
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (path := Path(root, name)).is_symlink():
                path.chmod(file_mode)
                sync(path)
        os.chmod(root, folder_mode)
        sync(Path(root))


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the draft of a file, empty, to be written or replaced; when the block ends it takes the place of `path`.

    A file that is there keeps its permissions. After an error in the block, or where there is no room, nothing has changed.
    """
    path = Path(path)
    with _drafted(path) as draft:
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield draft
        draft.chmod(stat.S_IMODE(path.stat().st_mode) if path.is_file() else modes()[0])
        sync(draft)
        os.replace(draft, path)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the draft of a folder, empty, to be filled; when the block ends it gets the name `path`, which must be free.

    Folders above it are made. After an error in the block, or where there is no room, nothing has changed.
    """
    path = Path(path)
    make_folder(path.parent)
    with _drafted(path) as draft:
        draft.mkdir(mode=0o700)
        yield draft
        sync_all(draft)
        draft.rename(path)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Put a file into its place in one step; text is written in UTF-8."""
    with new_file(path) as draft:
        draft.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def remove(path: Path) -> None:
    """Remove a file or a folder if that is possible, and else leave it to the next time; a link is removed, not followed."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_drafts(path: Path) -> None:
    """Remove the drafts of a file or a folder that processes of this machine left which are no longer there."""
    import psutil  # it takes a while, and commands that write nothing need it not

    start, end = f".{path.name}.{_machine()}-", ".draft"
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(start) and name.endswith(end):
                process = name.removeprefix(start).split("-")[0]
                if process.isdigit() and not psutil.pid_exists(int(process)):
                    remove(path.with_name(name))


@contextlib.contextmanager
def _drafted(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` that nobody has; what bears it after an error is removed, else the change is synced."""
    remove_drafts(path)
    draft = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.draft")
    try:
        yield draft
    except BaseException:
        remove(draft)
        raise
    sync(path.parent)


def _machine() -> str:
    """Return a word for this machine: a process number means nothing on another one that sees the same folder."""
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


def open_regular(path: str | os.PathLike[str], *, follow: bool = True) -> int:
    """Return a descriptor for reading a file. It never waits, as at a pipe.

    Args:
        path: of the file.
        follow: whether the name may be that of a link.

    Raises OSError if there is none, it can't be read, or it is something else than a file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", os.fspath(path))
    return descriptor


def read_file(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, follow: bool = True) -> bytes:
    """Return what a file holds. Raises OSError as `open_regular` does; ValueError if it is larger than `max_bytes`."""
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{os.fspath(path)!r} must have at most {max_bytes:,} bytes, but has more.")
    return content


def read_json(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Any:
    """Return what a JSON file says. Raises OSError if it can't be read; ValueError, which names it, if it is no JSON."""
    try:
        return json.loads(read_file(path, max_bytes=max_bytes).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged or incomplete: {error}.") from error


def digest_of(path: str | os.PathLike[str]) -> str:
    """Return a hash of a file's bytes: 16 bytes of BLAKE2b, in hexadecimal. Raises OSError as `open_regular` does."""
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
