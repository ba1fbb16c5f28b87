"""Wording shared by error messages, text that is safe to show, and the errors of a memory that is stale or has changed."""

import difflib
from collections.abc import Collection, Iterable

# Line ends, and the joiners, marks and spaces that scripts need.
KEPT = frozenset("\n\t\u00a0\u00ad\u200b\u200c\u200d\u200e\u200f\u2028\u2029\u3000")


def printable(text: str) -> str:
    """Return a text, such as a name that somebody else gave, that a terminal shows and does not obey.

    Control characters, those that turn the direction of writing, and halves of characters are written as escapes; line ends
    and tabs stay.

    >>> print(printable("a\\x1b[2Jb\\u202ec"))
    a\\x1b[2Jb\\u202ec
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in KEPT else ascii(each)[1:-1] for each in text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that offers the known name closest to `name`, or nothing when none is close.

    The sentence starts with a space, so that it can follow any message. Capitals do not count.

    >>> did_you_mean("chunksize", ["chunk_size", "segment_length"])
    ' Did you mean `chunk_size`?'
    >>> did_you_mean("colour", ["chunk_size", "segment_length"])
    ''
    """
    by_letters = {each.casefold(): each for each in known}
    close = difflib.get_close_matches(name.casefold(), by_letters, n=1)
    return f" Did you mean `{by_letters[close[0]]}`?" if close else ""


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


class MissingShardError(RuntimeError):
    """A shard of a bank on several machines did not answer in time."""


class ChangedMemoryError(RuntimeError):
    """Chunks that a search found have moved, or were overwritten or encoded again, before they were read.

    A model that reads never meets it: its forward pass, and the backward pass, read one state of the bank.
    """

    def __init__(self) -> None:
        super().__init__(
            "the memory bank moved, overwrote or encoded again chunks after they had been found; search again, and read before "
            "writing to the bank, or read with a model, which keeps what it has found."
        )
