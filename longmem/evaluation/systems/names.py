"""What the systems are called."""

from __future__ import annotations

from collections.abc import Sequence

from longmem.errors import did_you_mean
from longmem.plugins import PLUGINS, import_plugins_of_packages

TITLES = {
    "backbone": "backbone, same window",
    "bm25": "backbone, passages by BM25",
    "hidden": "backbone, passages by hidden states",
    "off": "LongMem, memory off",
    "on": "LongMem, memory on",
    "wrong": "LongMem, wrong memory",
}
SYSTEM_NAMES = (*TITLES, "context-N")


def title_of_system(name: str) -> str:
    """Return what a system is called in tables and figures; one that is not known is called by its name.

    >>> title_of_system("context-8192")
    'backbone, window 8,192'
    """
    kind, _, size = name.partition("-")
    return f"backbone, window {int(size):,}" if kind == "context" and size.isdecimal() else TITLES.get(name, name)


def context_size(name: str) -> int:
    """Return the N of "context-N". Raises ValueError if it is no number."""
    size = name.partition("-")[2]
    if not size.isdecimal() or not int(size):
        raise ValueError(f"`systems` must write a longer window as context-N, such as context-4096, got {name!r}.")
    return int(size)


def validate_systems(names: Sequence[str]) -> None:
    """Raise ValueError unless these are names of different systems, at least one."""
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`systems` must be at least one, and none twice, got {list(names)}.")
    for name in names:
        if name.startswith("context-"):
            context_size(name)
        elif name not in TITLES:
            import_plugins_of_packages()
            known = (*SYSTEM_NAMES, *PLUGINS["system"])
            if name not in PLUGINS["system"]:
                raise ValueError(
                    f"`systems` must be among {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}"
                )
