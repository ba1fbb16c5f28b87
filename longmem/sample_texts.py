"""Long real texts that come with every Python: for demonstrations without a download."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path


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
        for docstring in docstrings(path):
            new = docstring.split("\n\n")
            paragraphs += new
            length += len(docstring) + 2
        if length >= num_characters * 1.25:  # some paragraphs will turn out to be repeats
            break
    return "\n\n".join(without_repeats(paragraphs))


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file; none if it cannot be read or parsed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


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
