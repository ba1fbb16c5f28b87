"""What PyPI shows of README.md; all else of the build stands in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
RELATIVE_IMAGE = re.compile(r"!\[([^\]]*)\]\((?![a-z]+:)([^)\s]+)\)\n*")
RELATIVE_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)")


def description(readme: str, source: str | None) -> str:
    """Return the text with every relative link made whole: below `source`, or named as a file of the source distribution.

    Pictures without a `source` are left out.
    """

    def whole(match: re.Match[str]) -> str:
        text, path = match.groups()
        if source is not None:
            return f"[{text}]({source.rstrip('/')}/blob/main/{path})"
        return f"`{path}`" if text == path else f"{text} (`{path}`)"

    picture = "" if source is None else rf"![\1]({source.rstrip('/')}/raw/main/\2)\n\n"
    return RELATIVE_LINK.sub(whole, RELATIVE_IMAGE.sub(picture, readme))


if __name__ == "__main__":
    urls = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    setup(
        long_description=description((HERE / "README.md").read_text(encoding="utf-8"), urls.get("Source")),
        long_description_content_type="text/markdown",
    )
