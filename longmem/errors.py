"""Wording shared by error messages, and the error of a stale memory."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class StaleMemoryError(ValueError):
    """What a bank holds was not made by the encoder that wants to read it, or the encoder is about to change."""
