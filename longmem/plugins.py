"""The settings of a plug-in, and their place in its name: `"ivf:probed_share=0.06"`, `"ttl:seconds=3600"`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longmem.errors import name_known


@dataclass(frozen=True)
class Setting:
    """Return one setting of a plug-in: a number between two others, or one of several words.

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


def parse_name(argument: str, name: object, kinds: Mapping[str, Mapping[str, Setting]]) -> tuple[str, dict[str, Any]]:
    """Return the kind that `name` names and the settings it gives. Raises ValueError for what is not known.

    Args:
        argument: that `name` was given as, for error messages.
        name: a kind or, with settings, "kind:setting=value,setting=value".
        kinds: the settings of every kind.

    >>> parse_name("index", "ivf:probed_share=0.5", {"ivf": {"probed_share": Setting(0.1, "share of clusters")}})
    ('ivf', {'probed_share': 0.5})
    """
    kind, colon, text = name.partition(":") if isinstance(name, str) else (name, "", "")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"`{argument}` must be one of the known kinds, got {name!r}; {name_known(kind, kinds)} "
            'Settings follow a colon, as in "kind:setting=value".'
        )
    settings, chosen = kinds[kind], {}
    for part in text.split(",") if colon else ():
        key, equals, written = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(
                f"`{argument}` must give settings as name=value, separated by commas, got {part!r} in {name!r}; "
                f"{_known_settings(kind, key, settings)}"
            )
        if key not in settings:
            raise ValueError(
                f"`{argument}` must name settings of {kind!r}, got {key!r} in {name!r}; "
                f"{_known_settings(kind, key, settings)}"
            )
        if key in chosen:
            raise ValueError(f"`{argument}` must give each setting once, got {key!r} twice in {name!r}; leave out one.")
        value = settings[key].read(written)
        if value is None:
            raise ValueError(
                f"`{key}` of {argument} {kind!r} must be {settings[key].rule}, got {written!r} in {name!r}; it is "
                f"{settings[key].meaning}, {settings[key].default} by default."
            )
        chosen[key] = value
    return kind, chosen


def _known_settings(kind: str, name: str, settings: Mapping[str, Setting]) -> str:
    return name_known(name, settings) if settings else f"{kind!r} has no settings: leave out the colon."
