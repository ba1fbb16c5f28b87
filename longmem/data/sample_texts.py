"""Long real texts that come with every Python: for demonstrations without a download."""

import ast
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class SplitTexts(NamedTuple):
    """Token ids of one text, its `past` and the `rest` that follows, and as much of a `wrong` text as of the past."""

    past: Int[Tensor, " past"]
    rest: Int[Tensor, " rest"]
    wrong: Int[Tensor, " past"]
    name: str
    wrong_name: str


def split_texts(
    tokenizer: PreTrainedTokenizerBase, file: Path | None, past_tokens: int, rest_tokens: int
) -> SplitTexts:
    """Return the start of a text file and of Python's manual; without a file, of the manual and the library's docstrings.

    Raises ValueError if a text is too short.
    """
    manual = python_manual(), "Python's reference manual"
    if file is None:
        right, other = manual, (standard_library_docstrings(8 * past_tokens), "docstrings of its standard library")
    else:
        right, other = (file.read_text(encoding="utf-8"), file.name), manual
    past, rest = first_tokens(tokenizer, *right, past_tokens, rest_tokens)
    wrong, _ = first_tokens(tokenizer, *other, past_tokens, 0)
    return SplitTexts(past, rest, wrong, right[1], other[1])


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, name: str, past_tokens: int, rest_tokens: int
) -> tuple[Int[Tensor, " past"], Int[Tensor, " rest"]]:
    """Return the ids of the first `past_tokens` of a text and of the `rest_tokens` that follow."""
    needed = past_tokens + rest_tokens
    for num_characters in (8 * needed, len(text)):  # most texts have fewer characters per token; then the rest can wait
        options = {"return_tensors": "pt", "add_special_tokens": False, "verbose": False}
        ids = tokenizer(text[:num_characters], **options)["input_ids"][0]
        if len(ids) >= needed:
            return ids[:past_tokens], ids[past_tokens:needed]
    more = f" and score {rest_tokens:,} more" if rest_tokens else ""
    raise ValueError(
        f"{name} must have {needed:,} tokens, to memorize {past_tokens:,}{more}, got {len(ids):,}; "
        "take a longer text, or fewer tokens."
    )


def python_manual() -> str:
    """Return the part of Python's reference manual that `help()` shows, about 370 kB, each paragraph once.

    The topics repeat whole sections of one another (a fifth of the text). A memory that is asked to copy them would
    look better than it is, so a paragraph counts where it stands first.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(without_repeats(paragraph for topic in topics.values() for paragraph in topic.split("\n\n")))


def standard_library_docstrings(num_characters: int) -> str:
    """Return docstrings of Python's standard library, module by module, at least so many characters if there are.

    It is prose and code about the same subject as the manual: the hardest memory to tell from the right one.
    """
    paragraphs: list[str] = []
    length = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for docstring in docstrings_of(path):
            paragraphs += docstring.split("\n\n")
            length += len(docstring) + 2
        if length >= num_characters * 1.25:  # some paragraphs will turn out to be repeats
            break
    return "\n\n".join(without_repeats(paragraphs))


def docstrings_of(path: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file; none if it cannot be read or parsed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    yield from filter(None, (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)))


def without_repeats(paragraphs: Iterable[str]) -> Iterator[str]:
    """Yield paragraphs that differ from all before in more than white space.

    >>> list(without_repeats(["One.", "Two.", " One.", ""]))
    ['One.', 'Two.']
    """
    seen = set()
    for paragraph in paragraphs:
        words = " ".join(paragraph.split())
        if words and words not in seen:
            seen.add(words)
            yield paragraph
