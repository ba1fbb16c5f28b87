"""Files and folders that are on the disk as a whole or not at all, for their owner alone, and that are checked when read.

Whatever is written is made under a draft's name beside its place, synced, and moved there in one step, so a killed process or
a full disk leaves what was there before. The next write of the same name removes the drafts of processes that are gone.

`LONGMEM_ACCESS` says who may read what is written from then on: `private`, its owner alone (the default); `group`, the group
as well; `umask`, whom the process's umask lets.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # of another system, where nobody is kept out
    fcntl = None  # type: ignore[assignment]

ACCESS = "LONGMEM_ACCESS"
MODES = {"private": (0o600, 0o700), "group": (0o640, 0o750)}
MAX_BYTES = (
    1 << 28
)  # of a file that is read as a whole, such as a configuration; the largest that are written have a tenth
PENDING = ".longmem-new"
# With a word for the machine, a process of it, and the ending of the name, by which libraries know what to write.
DRAFT = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.draft(\.[^.]*)?")
# How safetensors, which raises its own kind of error, tells of the system's.
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
CHECKSUMS = "checksums.json"
DIGEST, ABOUT = "longmem_blake2b", "longmem"  # in the metadata of a file of tensors
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
        return 0o600 | 0o666 & ~mask, 0o700 | 0o777 & ~mask  # whatever it is, the owner reads what he wrote
    if access not in MODES:
        raise ValueError(f"{ACCESS} must be {', '.join(MODES)} or umask, got {access!r}; unset it for private.")
    return MODES[access]


def make_folder(path: str | os.PathLike[str], *, follow: bool = True) -> Path:
    """Make a folder, and those above it that are missing, on the disk and with `modes`; one that is there stays as it is.

    `follow`: whether it may be a link. One inside a folder that somebody else may have sent must not: raises ValueError.
    """
    path = Path(path)
    if not follow:
        refuse_link(path)
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process made it
            each.mkdir(mode=0o700)
            each.chmod(modes()[1])
            sync(each.parent)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is no folder", str(path))
    return path


def refuse_link(path: Path) -> None:
    """Raise ValueError if a part of a folder, which is about to be written to, leads elsewhere: who sent it could choose where.

    A file must have no second name either, by which it is somebody else's as well.
    """
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1):
            raise ValueError(
                f"{str(path)!r} must be of its own folder alone to be written to, but is a link or has another name elsewhere; "
                "put a copy there."
            )


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
        try:
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except OSError as error:  # told of the file that was asked for
            raise type(error)(error.errno, error.strerror, str(path)) from None
        yield draft
        draft.chmod(stat.S_IMODE(path.stat().st_mode) if path.is_file() and not path.is_symlink() else modes()[0])
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


@contextlib.contextmanager
def new_contents(folder: str | os.PathLike[str], stale: str = "") -> Iterator[Path]:
    """Yield the draft of files that belong together, to be filled; when the block ends all take their places in `folder`.

    The draft is finished under the name `PENDING` in the folder, which is the moment from which it counts (`current`); files
    are then linked, one by one, to their places, and `PENDING` goes. What a killed process has not linked the next call does.
    After an error in the block, or where there is no room, nothing has changed. Other files in the folder stay.

    Args:
        folder: made if missing.
        stale: pattern of names that are removed unless they are in the draft: of files that an earlier call wrote.
    """
    folder = make_folder(folder)
    _settle(folder, stale)
    with new_folder(folder / PENDING) as draft:
        yield draft
        _names_in(draft, folder)
    try:
        _settle(folder, stale)
    except OSError as error:  # what was written counts, and is found
        warnings.warn(
            f"what was saved to {folder} stays in {PENDING} there until the next time: {error}.", stacklevel=3
        )


def current(folder: Path) -> Path:
    """Return the folder to read from: `folder`, or what `new_contents` has finished there and not yet put in its place."""
    return folder / PENDING if (folder / PENDING).is_dir() else folder


def _settle(folder: Path, stale: str) -> None:
    """Put finished contents into their places."""
    pending = folder / PENDING
    refuse_link(pending)
    if not pending.is_dir():
        return
    names = _names_in(pending, folder)
    for name in names:
        status = os.lstat(pending / name)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(pending / name))
        make_folder((folder / name).parent)
        with new_file(folder / name) as draft:
            draft.unlink()
            # A second name may be elsewhere, for a file that is not to be changed; and some file systems have no links.
            with contextlib.suppress(OSError):
                if status.st_nlink == 1:
                    draft.hardlink_to(pending / name)
            if not draft.exists():
                shutil.copyfile(pending / name, draft)
    for path in folder.iterdir():
        if re.fullmatch(stale, path.name) and Path(path.name) not in names:
            remove(path)
    with _drafted(pending) as done:  # no longer under its name while it goes
        pending.rename(done)
    remove(done)


def _names_in(draft: Path, folder: Path) -> list[Path]:
    """Return the names of all files in a draft. Raises OSError; ValueError if their places in `folder` are behind a link."""
    # Not `Path.is_file`, which takes a file that can't be looked at for none: it would go with the folder.
    found = os.walk(draft, onerror=_refuse)
    names = [Path(root, name).relative_to(draft) for root, _, own in found for name in own]
    for part in sorted({part for name in names for part in name.parents if part.name}):
        refuse_link(folder / part)
    return names


def _refuse(error: OSError) -> None:
    raise error


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Put a file into its place in one step; text is written in UTF-8."""
    with new_file(path) as draft:
        draft.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def _end_of_lines(file: BinaryIO, block: int = 1 << 20) -> int:
    """Return the place behind the last line end of a file, in bytes."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = file.seek(max(0, end - block))
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to a text file, made if missing; they are on the disk when the call returns.

    What a killed process left of a line goes before, and after an error all lines do. Raises ValueError for a link.
    """
    refuse_link(path)
    is_new = not path.exists()
    content = "".join(lines).encode("utf-8", "surrogatepass")
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    # Without a buffer, which would write once more when it closes.
    with os.fdopen(os.open(path, flags, 0o600), "r+b", buffering=0) as file:
        start = file.seek(_end_of_lines(file))
        rest = memoryview(content)
        try:
            file.truncate()
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            os.ftruncate(file.fileno(), start)
            raise
    if is_new:
        path.chmod(modes()[0])
        sync(path.parent)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, made if missing, inside the block; others wait for it. Raises OSError.

    Whatever fails, the lock goes with the block.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), modes()[0])
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder if that is possible, and else leave it to the next time; a link is removed, not followed."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder; a process killed meanwhile leaves it whole, or a draft. Raises OSError where nothing may be removed."""
    with _drafted(folder) as draft:
        os.rename(folder, draft)
    remove(draft)


def remove_drafts(folder: Path) -> None:
    """Remove the drafts in a folder that processes of this machine left which are no longer there."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            found = DRAFT.fullmatch(name)
            if found and found[1] == _machine() and int(found[2]) != os.getpid() and not _runs(int(found[2])):
                remove(folder / name)


@contextlib.contextmanager
def _drafted(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` that nobody has; what bears it after an error is removed, else the change is synced."""
    remove_drafts(path.parent)
    name = f".{path.stem[:40]}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.draft{path.suffix}"
    draft = path.with_name(name)
    try:
        yield draft
    except BaseException as error:
        remove(draft)
        if (found := SYSTEM_ERROR.search(str(error))) and type(error).__name__ == "SafetensorError":
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise
    sync(path.parent)


def _runs(process: int) -> bool:
    import psutil  # it takes a while, and commands that write nothing need it not

    return bool(psutil.pid_exists(process))


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


def read_json(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file. Raises OSError if it can't be read; ValueError, which names it, if it is no object."""
    try:
        content = json.loads(read_file(path, max_bytes=max_bytes).decode("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it must hold an object, got {type(content).__name__}")
        return content
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def damaged(path: str | os.PathLike[str], problem: object) -> ValueError:
    """Return the error for a file that is not as it was written."""
    return ValueError(f"{os.fspath(path)} can't be read, it is damaged or incomplete: {problem}.")


def not_opened(path: str | os.PathLike[str], error: OSError) -> ValueError:
    """Return the error for a file that is missing, or that the system does not let this process read: that is no damage."""
    if isinstance(error, FileNotFoundError):
        return damaged(path, "it is missing")
    way_out = ""
    if isinstance(error, PermissionError):
        way_out = (
            f" It is not damaged: ask its owner to let you read it (`chmod`, or {ACCESS}=group when it is written)."
        )
    return ValueError(f"{os.fspath(path)} can't be opened: {error.strerror or error}.{way_out}")


def digest_of(path: str | os.PathLike[str]) -> str:
    """Return a hash of a file's bytes: 16 bytes of BLAKE2b, in hexadecimal. Raises OSError as `open_regular` does."""
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def seal_folder(folder: Path) -> None:
    """Write the digests of all files in a folder into one more."""
    found = {path.relative_to(folder).as_posix(): digest_of(path) for path in folder.rglob("*") if path.is_file()}
    (folder / CHECKSUMS).write_text(json.dumps({"files": found}, indent=1), encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Raise ValueError, which names the file, unless a folder holds all that `seal_folder` saw there, unchanged."""
    try:
        known = read_json(folder / CHECKSUMS)["files"]
        for name, digest in known.items():
            if not name.isprintable() or ".." in Path(name).parts or Path(name).is_absolute():
                raise damaged(folder / CHECKSUMS, f"it names {name!r}")
            if digest_of(folder / name) != digest:
                raise damaged(folder / name, "its bytes are not those that were written")
        refuse_pipes(folder)
    except OSError as error:
        raise not_opened(error.filename or folder, error) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(folder / CHECKSUMS, error) from error


def refuse_pipes(folder: Path) -> None:
    """Raise ValueError, which names it, if something in a folder is no file: whoever reads a pipe waits for ever."""
    for path in folder.rglob("*"):
        if path.exists() and not path.is_dir() and not path.is_file():
            raise damaged(path, "it is no regular file")


def seal_tensors(path: Path, about: Mapping[str, Any]) -> None:
    """Write into the header of a safetensors file, in its place, what it is about and a digest of that and of all tensors."""
    sealed = path.with_name(f"{path.name}.sealed")
    with path.open("rb") as file, sealed.open("wb") as copy:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        metadata = header.setdefault("__metadata__", {})
        metadata |= {ABOUT: json.dumps(about), DIGEST: ""}
        metadata[DIGEST] = _digest_of_tensors(header, file)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        copy.write(len(text).to_bytes(8, "little") + text)
        file.seek(start)
        shutil.copyfileobj(file, copy, 1 << 20)
    os.replace(sealed, path)


def check_tensors(path: Path) -> dict[str, Any] | None:
    """Return what a sealed safetensors file is about, None for one that other tools wrote.

    Raises OSError as `open_regular` does; ValueError, which names the file, if any bit of a sealed one has changed.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = dict(json.loads(file.read(min(length, os.fstat(file.fileno()).st_size))))
            metadata = header.get("__metadata__", {})
            known = metadata.get(DIGEST)
            # One whose name was damaged must not pass for none.
            is_sealed = known is not None or any(re.fullmatch("[0-9a-f]{32}", each) for each in metadata.values())
            about = json.loads(metadata[ABOUT]) if is_sealed else None
            if is_sealed and known != _digest_of_tensors({**header, "__metadata__": {**metadata, DIGEST: ""}}, file):
                raise ValueError("its bytes are not those that were written")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(path, error) from error
    return about


def _digest_of_tensors(header: Mapping[str, Any], rest: BinaryIO) -> str:
    digest = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    while block := rest.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
