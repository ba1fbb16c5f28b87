"""Wording shared by error messages, and the errors of a memory that is stale or has changed."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that offers the known name closest to `name`, or nothing when none is close.

    The sentence starts with a space, so that it can follow any message.

    >>> did_you_mean("chunksize", ["chunk_size", "segment_length"])
    ' Did you mean `chunk_size`?'
    >>> did_you_mean("colour", ["chunk_size", "segment_length"])
    ''
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean `{close[0]}`?" if close else ""


def name_known(name: object, known: Collection[str], limit: int = 8) -> str:
    """Return the end of an error message: the known names, and the one that was probably meant.

    >>> name_known("moby", ["moby-dick", "emma"])
    'known: "moby-dick", "emma". Did you mean `moby-dick`?'
    """
    shown = ", ".join(f'"{each}"' for each in list(known)[:limit]) or "none"
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return f"known: {shown}{more}.{did_you_mean(str(name), known)}"


class WrongArgumentsError(ValueError, TypeError):
    """A call has an argument that the function does not take, or lacks one that it needs."""


class StaleMemoryError(ValueError):
    """What a bank holds was not made by the encoder that wants to read it, or the encoder is about to change."""


class ChangedMemoryError(RuntimeError):
    """Chunks that a search found have moved, or were overwritten or encoded again, before they were read."""

    def __init__(self) -> None:
        super().__init__(
            "the memory bank moved, overwrote or encoded again chunks after they had been found; search again, and in training "
            "call `backward()` before writing to the bank."
        )
