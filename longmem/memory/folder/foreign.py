"""What is checked of files that somebody else may have written, before SQLite, torch or FAISS make anything of them.

A file is data: it is a plain file in the bank's own folder, it names no other file, and what it says about sizes is bounded by
how long it is. What a check refuses is damage, whoever did it; what the system refuses keeps its own cause.
"""

import contextlib
import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")  # of SQLite, at the start of a journal, and at its end behind a name
# A commit that is undone gives its file back the length that it had; all that was free there may be missing in the journal.
LARGEST_GROWTH, LEAST_GROWTH = 64, 2**30
MODEL_FILE, LARGEST_MODEL_FILE = "model.json", 65_536
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
# What Python and torch raise on the way through content that is not what it seems.
UNFIT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, SafetensorError)


def damaged(path: Path, problem: str) -> ValueError:
    """Return the error for a file of a bank that is not as it was written."""
    return ValueError(
        f"the bank needs {str(path)!r} as it was written, but the file {problem}; restore the folder from a copy, or "
        "memorize its documents again."
    )


def not_read(path: Path, error: Exception) -> ValueError:
    """Return the error for a file of a bank that the system does not open or read, with the system's own cause."""
    if isinstance(error, PermissionError):
        return denied(path, error)
    number = getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE):
        return ValueError(
            f"the bank in {str(path.parent.parent)!r} has more files than this process may open at once ({error}); nothing "
            "is damaged. Allow more (`ulimit -n 65536` in the shell), or close other banks."
        )
    if number in MISSING:
        return damaged(path, f"cannot be read ({error})")
    if number == errno.ENOMEM or "cannot allocate memory" in str(error).lower():
        return ValueError(
            f"the bank needs more memory for {str(path)!r} than there is ({error}); nothing is damaged. Free some, or open "
            "the bank with `mmap=False`."
        )
    return ValueError(
        f"the bank needs to read {str(path)!r}, and the system does not let it ({error}); that says nothing about damage. "
        "See who may read the file, and whether its disk is in order."
    )


def denied(path: Path, error: Exception) -> ValueError:
    """Return the error for a part of a bank that this user may not read."""
    return ValueError(
        f"this user may not read {str(path)!r} of a bank ({error}), and nothing is damaged: a bank is its owner's alone unless "
        "`LONGMEM_ACCESS` said otherwise when it was made; its owner can give access, for example by `chmod -R g+rX`."
    )


def validate_plain(path: Path) -> int:
    """Return the length of a file that is none of these: a link, a folder, a pipe, a device, or in a folder behind a link.

    Raises ValueError, which names the file, for any other; OSError where nothing is there.
    """
    if stat.S_ISLNK(os.lstat(path.parent).st_mode):
        raise damaged(path, "is in a folder that is a link to somewhere else")
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise damaged(path, "is a link to another file" if stat.S_ISLNK(found.st_mode) else "is no plain file")
    return found.st_size


def open_plain(path: Path) -> int:
    """Return a descriptor, to be read from, of a file that `validate_plain` allows; it neither waits nor follows a link."""
    validate_plain(path)
    flags = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))
    return os.open(path, os.O_RDONLY | sum(flags))


def model_in(folder: Path) -> str | None:
    """Return the name of the model that wrote a bank, which a file beside the bank's own says; None where that is not known."""
    try:
        with open(open_plain(folder.resolve() / MODEL_FILE), encoding="utf-8") as file:
            name = parse_json(file.read(LARGEST_MODEL_FILE))["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def read_journal(path: Path, database_bytes: int) -> int | None:
    """Return to how many pages SQLite would bring its file with the journal at `path`; None where it would do nothing.

    Raises ValueError for a journal that names another file, which SQLite would delete, or a length beyond all reason.
    """
    try:
        descriptor = open_plain(path)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        head = file.read(28)
        file.seek(max(0, size - 8))
        tail = file.read(8)
    if tail == JOURNAL_MAGIC and size > 8:
        raise damaged(
            path, "names another file, as no journal of a bank does; delete it where nobody is writing the bank"
        )
    if len(head) < 28 or not head.startswith(JOURNAL_MAGIC):
        return None
    num_pages, page_bytes = int.from_bytes(head[16:20]), int.from_bytes(head[24:28])
    if num_pages * min(page_bytes, 65_536) > LEAST_GROWTH + LARGEST_GROWTH * (database_bytes + size):
        raise damaged(path, f"asks for {num_pages} pages of {page_bytes} bytes, more than a bank of this size ever had")
    return num_pages


def parse_json(text: str) -> Any:
    """Return what a JSON text says. Raises ValueError for what is none, is nested without end, or has NaN for a number."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def fits(value: Any, form: Any) -> bool:
    """Return whether a value of JSON has a form: a type, [form of each item], {name: form}, or a tuple of choices.

    `int` means one from 0 to 2^62, `float` any number that is finite. A name with "?" may be missing; names that the form
    does not have are not looked at.

    >>> fits({"name": "a", "sizes": [1, 2]}, {"name": str, "sizes": [int], "date?": float}), fits([-1], [int])
    (True, False)
    """
    if isinstance(form, tuple):
        return any(fits(value, each) for each in form)
    if isinstance(form, list):
        return type(value) is list and all(fits(each, form[0]) for each in value)
    if isinstance(form, Mapping):
        if type(value) is not dict:
            return False
        known = ((name.removesuffix("?"), name.endswith("?"), each) for name, each in form.items())
        return all(fits(value[name], each) if name in value else optional for name, optional, each in known)
    if form is int:
        return type(value) is int and 0 <= value < 2**62
    if form is float:
        return type(value) in (int, float) and abs(value) < 2**62 and math.isfinite(value)
    return value is None if form is None else type(value) is form


@contextlib.contextmanager
def said_by(path: Path) -> Iterator[None]:
    """Make an error on the way through what a file says one that names the file."""
    try:
        yield
    except UNFIT as error:
        if isinstance(error, ValueError) and str(path.parent) in str(error):
            raise  # it names a file itself
        raise damaged(path, f"does not say what a bank can hold ({type(error).__name__}: {error})") from error
