"""What PyPI shows of README.md; all else of the build stands in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
RELATIVE_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)")


def description(readme: str, source: str | None) -> str:
    """Return the text with every relative link made whole: below `source`, or named as a file of the source distribution."""

    def whole(match: re.Match[str]) -> str:
        text, path = match.groups()
        if source is not None:
            return f"[{text}]({source.rstrip('/')}/blob/main/{path})"
        return f"`{path}`" if text == path else f"{text} (`{path}`)"

    return RELATIVE_LINK.sub(whole, readme)


if __name__ == "__main__":
    urls = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    setup(
        long_description=description((HERE / "README.md").read_text(encoding="utf-8"), urls.get("Source")),
        long_description_content_type="text/markdown",
    )
