"""Files of benchmarks: what is read, and one form of the error for what has another format."""

import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path


def read_text(path: Path) -> str:
    """Return the text of a file, which may be gzipped. Raises ValueError if there is none, or it is empty."""
    if not path.is_file():
        raise ValueError(f"`data` must be the file of the benchmark, got {str(path)!r}, which is no file.")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        text = str(file.read())
    if not text.strip():
        raise ValueError(f"`data` must hold something, {path} is empty.")
    return text


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file that are not blank."""
    return [line for line in read_text(path).split("\n") if line.strip()]  # a text may hold other line ends


@contextlib.contextmanager
def in_format(wanted: str, place: str | Path) -> Iterator[None]:
    """Raise ValueError, which says what was wanted in which place, where the block meets something else."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{place} must be {wanted}, got {error!r}.") from error
