"""An extension of griffe, which reads docstrings for the site: examples stand in code blocks."""

from typing import Any

from griffe import Extension, Object


def fenced(text: str) -> str:
    """Return a docstring whose doctest examples are fenced code; an example ends at an empty line.

    >>> fenced("Add.\\n\\n>>> 1 + 1\\n2\\n\\nMore.").splitlines()
    ['Add.', '', '```pycon', '>>> 1 + 1', '2', '```', '', 'More.']
    """
    lines: list[str] = []
    indent = None  # of the example that has begun
    for line in [*text.splitlines(), ""]:
        if indent is None and line.lstrip().startswith(">>> "):
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f"{indent}```pycon")
        elif indent is not None and not line.strip():
            lines.append(f"{indent}```")
            indent = None
        lines.append(line)
    return "\n".join(lines[:-1])


class DoctestBlocks(Extension):
    """Put the examples of every docstring into code blocks."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring of a class, function or module."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
