"""The directory that a bank is written in: the very one that was opened, whatever its path leads to later.

Files are made and removed in it by their names, and no link is followed. The process that opened it to write holds its
lock, and a forked copy of that process can do nothing in it. All its files get the permissions of its catalogue.
"""

import contextlib
import hashlib
import os
import re
import secrets
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # a system without it cannot hold a directory either
    fcntl = None  # type: ignore[assignment]

from longmem.files import make_folder, modes
from longmem.memory.folder.catalogue import CATALOGUE, INDEX_FOLDER, NAMES, SEGMENT_FOLDER

LOCK = "lock"
WORD = re.compile(r"[0-9a-f]{8}")
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
FOLDER = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)

_places: "weakref.WeakSet[Place]" = weakref.WeakSet()


class Place:
    """The directory `path`, made where it is missing, opened and locked by this process until `close`.

    `word`: stands in the names of all files that the writers of this bank make, by which they know them.

    Raises OSError if that is not possible, BlockingIOError if another process has locked it, and ValueError if a link, or what
    is no file, bears the name of something that the bank writes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._pid = path, os.getpid()
        self._descriptors: dict[str, int] = {}
        weakref.finalize(self, _let_go, self._descriptors, self._pid)
        _places.add(self)
        make_folder(path)
        try:
            self._descriptors[""] = os.open(path, os.O_RDONLY | FOLDER)
            self._refuse_links()
            self.word = self._lock()
            self._tighten()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the directory, and of its lock, which a forked copy of the process does not."""
        _let_go(self._descriptors, self._pid)

    @property
    def is_here(self) -> bool:
        """Return whether this is the process that opened the directory."""
        return os.getpid() == self._pid

    def refuse_changed(self) -> None:
        """Raise ValueError in a forked copy of the process, and where the path does not lead to this directory any longer."""
        if not self.is_here:
            raise ValueError(
                f"the bank in {str(self.path)!r} was opened to write by process {self._pid}, of which this one is a copy (a "
                "fork), and only that one may change it; open the bank again here, with `read_only=True` beside the other."
            )
        refuse_moved(self.path, os.fstat(self._descriptors[""]))

    # Files.

    def make_catalogue(self) -> None:
        """Make an empty catalogue where there is none, so that SQLite does not choose its permissions."""
        if self._status(CATALOGUE) is None:
            with self._new(CATALOGUE, "", modes()[0]):
                pass

    def new_name(self, start: str, end: str) -> str:
        """Return a name that nothing has, between these two ends."""
        return f"{start}-{self.word}{secrets.token_hex(4)}{end}"

    @contextlib.contextmanager
    def new_file(self, folder: str, name: str) -> Iterator[BinaryIO]:
        """Yield a new file, on the disk when the block ends; after an error there is none. Raises OSError."""
        assert NAMES[folder].fullmatch(name)
        with self._new(name, folder, self._file_mode) as file:
            yield file

    def sync(self, folder: str = "") -> None:
        """Wait until the names in a folder are on the disk."""
        os.fsync(self._folder(folder))

    def remove(self, folder: str, name: str) -> None:
        """Remove a file if that is possible: one that is still mapped, where the system forbids it, goes the next time."""
        assert NAMES[folder].fullmatch(name)
        with contextlib.suppress(OSError):
            if self._status(folder) is not None:
                os.unlink(name, dir_fd=self._folder(folder))

    def sweep(self, folder: str, known: set[str]) -> None:
        """Remove what writers of this directory have made and left: files with its word in their names that are not known."""
        with contextlib.suppress(OSError):
            if self._status(folder) is None:
                return
            own = (NAMES[folder].fullmatch(name) for name in os.listdir(self._folder(folder)))
            strangers = [match[0] for match in own if match and match[1] == self.word and match[0] not in known]
            if strangers:
                self.sync()  # before this, a commit that names none of them could still be undone by a power failure
            for name in strangers:
                self.remove(folder, name)

    @contextlib.contextmanager
    def _new(self, name: str, folder: str, mode: int) -> Iterator[BinaryIO]:
        where, made = self._folder(folder), []

        def make(name: str, _: int) -> int:
            made.append(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o600, dir_fd=where))
            return made[0]

        try:
            with open(name, "wb", opener=make) as file:
                os.fchmod(file.fileno(), mode)
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=where)
            raise

    def _folder(self, name: str) -> int:
        """Return the descriptor of a folder in this one, which is made where it is missing."""
        if name not in self._descriptors:
            is_new = self._status(name) is None
            if is_new:
                os.mkdir(name, 0o700, dir_fd=self._descriptors[""])
            self._descriptors[name] = os.open(name, os.O_RDONLY | FOLDER | NO_LINK, dir_fd=self._descriptors[""])
            if is_new:
                file_mode = self._file_mode
                os.fchmod(self._descriptors[name], file_mode | (file_mode & 0o444) >> 2)
        return self._descriptors[name]

    @property
    def _file_mode(self) -> int:
        """Return the permissions of the bank's files: those of its catalogue."""
        found = self._status(CATALOGUE)
        return modes()[0] if found is None else stat.S_IMODE(found.st_mode) & 0o666

    def _status(self, name: str) -> os.stat_result | None:
        """Return what the system says of a name in the directory; None if there is nothing of that name."""
        with contextlib.suppress(FileNotFoundError):
            return os.stat(name, dir_fd=self._descriptors[""], follow_symlinks=False)
        return None

    def _refuse_links(self) -> None:
        """Raise ValueError unless all that will be written to is the bank's own."""
        for name in (CATALOGUE, f"{CATALOGUE}-journal", LOCK, SEGMENT_FOLDER, INDEX_FOLDER):
            is_right = stat.S_ISDIR if name in NAMES else stat.S_ISREG
            found = self._status(name)
            if found is not None and not is_right(found.st_mode):
                raise self._not_own(name, "is a link, or no such thing")
            if found is not None and name == CATALOGUE and found.st_nlink > 1:
                raise self._not_own(name, "has another name elsewhere (a hard link), where it would be changed as well")

    def _not_own(self, name: str, problem: str) -> ValueError:
        kind = "folder" if name in NAMES else "file"
        return ValueError(
            f"`folder` must have a {kind} {name!r} of its own to be written, but that of {str(self.path)!r} {problem}; open "
            "the bank with `read_only=True`, or write a copy of it."
        )

    def _lock(self) -> str:
        """Take the lock; return a word that follows from its file, the same for all that try to make a bank here."""
        descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT | NO_LINK, self._file_mode, dir_fd=self._descriptors[""])
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)  # another's lock, not to be opened
            raise
        self._descriptors[LOCK] = descriptor
        if self._status(CATALOGUE) is None:
            os.fchmod(descriptor, self._file_mode)
        found = os.fstat(descriptor)
        return hashlib.blake2b(f"{found.st_ino} {found.st_mtime_ns}".encode(), digest_size=4).hexdigest()

    def _tighten(self) -> None:
        """Give the catalogue of an earlier version of longmem, which others could read, the permissions of its segments."""
        is_there = self._status(CATALOGUE) and self._status(SEGMENT_FOLDER)
        names = os.listdir(self._folder(SEGMENT_FOLDER)) if is_there else []
        for match in filter(None, map(NAMES[SEGMENT_FOLDER].fullmatch, names)):
            if match[1] is None:
                mode = os.stat(match[0], dir_fd=self._descriptors[SEGMENT_FOLDER], follow_symlinks=False).st_mode
                with contextlib.suppress(PermissionError):
                    os.chmod(CATALOGUE, mode & self._file_mode, dir_fd=self._descriptors[""])
                return


def refuse_moved(path: Path, opened: os.stat_result, *, may_be_gone: bool = False) -> None:
    """Raise ValueError unless a path leads to the folder, or file, that was opened there. Raises OSError."""
    try:
        if os.path.samestat(os.stat(path), opened):
            return
    except (FileNotFoundError, NotADirectoryError):
        if may_be_gone:
            return
    raise ValueError(
        f"the bank whose {str(path)!r} was opened is no longer there: it was moved or replaced; nothing was changed, open the "
        "bank again where it is now."
    )


def _let_go(descriptors: dict[str, int], pid: int) -> None:
    """Close descriptors; the lock is of all that share its descriptor, so only the process that took it opens it."""
    # The lock first, while it can be found again: Ctrl-C here may leave a descriptor open, but keeps nobody out.
    if LOCK in descriptors and fcntl is not None and os.getpid() == pid:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptors[LOCK], fcntl.LOCK_UN)
    while descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptors.popitem()[1])


def _let_go_in_child() -> None:
    for place in _places:
        place.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
