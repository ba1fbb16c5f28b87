"""Settings that come with the package, to be named without a path."""

from __future__ import annotations

from pathlib import Path

from longmem.errors import name_known


def shipped_settings(folder: Path) -> dict[str, Path]:
    """Return the YAML files in a folder of the package by their names, in alphabetical order."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def settings_file(folder: Path, named: str) -> Path:
    """Return the file of that name in a folder of the package or, if it has none, the file with that path.

    A file of yours that bears such a name is reached as `./name`.

    Raises:
        ValueError: there is neither.
    """
    shipped = shipped_settings(folder)
    path = shipped.get(named, Path(named))
    if not path.is_file():
        raise ValueError(
            f"`config` must be a YAML file, or the name of one that comes with the package, got {named!r}, which is no "
            f"file; {name_known(named, shipped)}"
        )
    return path
