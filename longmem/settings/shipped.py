"""Settings that come with the package: the files of `configs/` in a checkout, of `longmem/configs/` where it is installed."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from longmem.errors import name_known

PACKAGE = Path(__file__).parents[1]


def configs_folder() -> Path:
    """Return the folder of settings that come with the package."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def shipped_settings(group: str) -> dict[str, Path]:
    """Return the files of a group, "train" or "eval", by name.

    >>> list(shipped_settings("train"))
    ['books', 'python-manual', 'smollm2-books']
    """
    return {path.stem: path for path in sorted((configs_folder() / group).glob("*.yaml"))}


def settings_file(group: str, name_or_path: str | PathLike[str]) -> Path:
    """Return the file that comes with the package under this name or, if none does, the file with this path.

    A file of yours that bears such a name is reached as `./name`.

    Raises:
        ValueError: there is neither.
    """
    shipped = shipped_settings(group)
    path = shipped.get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        raise ValueError(
            f"`config` must be a YAML file with settings or come with the package, got {str(name_or_path)!r}, which is no "
            f"file; {name_known(str(name_or_path), shipped)}"
        )
    return path
