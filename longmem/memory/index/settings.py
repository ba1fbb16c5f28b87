"""The settings of an index kind, and their place in its name: `"ivf:probed_share=0.06"`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longmem.memory.checks import name_known


@dataclass(frozen=True)
class Setting:
    """Return one setting of an index kind: a number between two others, or one of several words.

    `default` has the type that values have: int, float or str.
    """

    default: int | float | str
    meaning: str
    lowest: float = 0.0
    highest: float = 1.0
    words: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """Return what a value must be, as the middle of a sentence."""
        if self.words:
            return "one of " + ", ".join(self.words)
        number = "an integer" if isinstance(self.default, int) else "a number"
        return f"{number} from {self.lowest:g} to {self.highest:g}"

    def read(self, text: str) -> int | float | str | None:
        """Return the value that is written there, None if it is not allowed."""
        if self.words:
            return text if text in self.words else None
        try:
            value = type(self.default)(text)
        except ValueError:
            return None
        return value if self.lowest <= float(value) <= self.highest else None  # NaN is in no range


def parse_index(index: object, kinds: Mapping[str, Mapping[str, Setting]]) -> tuple[str, dict[str, Any]]:
    """Return the kind that `index` names and the settings it gives. Raises ValueError for what is not known.

    `kinds`: the settings of every kind.

    >>> parse_index("ivf:probed_share=0.5", {"ivf": {"probed_share": Setting(0.1, "share of clusters")}})
    ('ivf', {'probed_share': 0.5})
    """
    kind, colon, text = index.partition(":") if isinstance(index, str) else (index, "", "")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"`index` must be one of the known kinds, got {index!r}; {name_known(kind, kinds)} "
            'Settings follow a colon: "ivf:probed_share=0.06".'
        )
    settings, chosen = kinds[kind], {}
    for part in text.split(",") if colon else ():
        name, equals, written = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(
                f"`index` must give settings as name=value, separated by commas, got {part!r} in {index!r}; "
                f"{_known_settings(kind, name, settings)}"
            )
        if name not in settings:
            raise ValueError(
                f"`index` must name settings of {kind!r}, got {name!r} in {index!r}; "
                f"{_known_settings(kind, name, settings)}"
            )
        if name in chosen:
            raise ValueError(f"`index` must give each setting once, got {name!r} twice in {index!r}; leave out one.")
        value = settings[name].read(written)
        if value is None:
            raise ValueError(
                f"`{name}` of index kind {kind!r} must be {settings[name].rule}, got {written!r} in {index!r}; it is "
                f"{settings[name].meaning}, {settings[name].default} by default."
            )
        chosen[name] = value
    return kind, chosen


def _known_settings(kind: str, name: str, settings: Mapping[str, Setting]) -> str:
    return name_known(name, settings) if settings else f"{kind!r} has no settings: leave out the colon."
