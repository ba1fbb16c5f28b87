"""Plug-ins by name: one registry for kinds of index, policies of eviction and refresh, age priors, systems and tasks.

    @register("eviction", "largest")
    class LargestFirst(EvictionPolicy): ...

From then on `eviction="largest"` names it, with settings behind a colon: `"ivf:probed_share=0.06"`, `"ttl:seconds=3600"`.
A package brings its own by an entry point in the group `longmem.plugins`: the name of a module that registers them when it
is imported. These modules are imported once, when a name is looked for that is not known.
"""

import functools
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from longmem.errors import did_you_mean, name_known

KINDS = ("index", "eviction", "refresh", "age_prior", "system", "task")
ENTRY_POINTS = "longmem.plugins"
# All that is known: by kind, then by name. Add by `register`, look up by `find`.
PLUGINS: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}

Plugin = TypeVar("Plugin")


@dataclass(frozen=True)
class Setting:
    """One setting of a plug-in: a number between two others, or one of several words.

    `default` has the type that values have: int, float or str.
    """

    default: int | float | str
    meaning: str
    lowest: float = 0.0
    highest: float = 1.0
    words: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """What a value must be, as the middle of a sentence."""
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


class HasSettings(Protocol):
    """A plug-in whose name may be followed by settings."""

    settings: Mapping[str, Setting]


def register(kind: str, name: str) -> Callable[[Plugin], Plugin]:
    """Return a decorator that makes a plug-in known by a name.

    Args:
        kind: one of `KINDS`, each the name of the argument that takes such names.
        name: new among those of its kind, and without a colon.

    Raises:
        ValueError: there is no such kind, or the name is taken.
    """
    if kind not in PLUGINS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.{did_you_mean(kind, KINDS)}")
    if not name or ":" in name:
        raise ValueError(f"`name` must be a word without a colon, since settings follow one, got {name!r}.")

    def put(plugin: Plugin) -> Plugin:
        if name in PLUGINS[kind]:
            raise ValueError(f"`name` must be new, got {name!r}, which is {PLUGINS[kind][name]}; choose another one.")
        PLUGINS[kind][name] = plugin
        return plugin

    return put


def find(kind: str, name: object) -> Any:
    """Return the plug-in of this kind and name, also one that another package brings. Raises ValueError if there is none."""
    known = PLUGINS[kind]
    if isinstance(name, str) and name not in known:
        import_plugins_of_packages()
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"`{kind}` must be one of the known kinds, got {name!r}; {name_known(name, known)} "
            'Settings follow a colon, as in "kind:setting=value".'
        )
    return known[name]


def parse_name(kind: str, name: object) -> tuple[Any, dict[str, Any]]:
    """Return the plug-in that `name` names, and the settings it gives. Raises ValueError for what is not known.

    Args:
        kind: of plug-in, such as "index".
        name: that of the plug-in or, with settings, "name:setting=value,setting=value".
    """
    word, colon, text = name.partition(":") if isinstance(name, str) else (name, "", "")
    plugin: HasSettings = find(kind, word)
    settings, chosen = plugin.settings, {}
    for part in text.split(",") if colon else ():
        key, equals, written = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(
                f"`{kind}` must give settings as name=value, separated by commas, got {part!r} in {name!r}; "
                f"{_known_settings(word, key, settings)}"
            )
        if key not in settings:
            raise ValueError(
                f"`{kind}` must name settings of {word!r}, got {key!r} in {name!r}; "
                f"{_known_settings(word, key, settings)}"
            )
        if key in chosen:
            raise ValueError(f"`{kind}` must give each setting once, got {key!r} twice in {name!r}; leave out one.")
        value = settings[key].read(written)
        if value is None:
            raise ValueError(
                f"`{key}` of {kind} {word!r} must be {settings[key].rule}, got {written!r} in {name!r}; it is "
                f"{settings[key].meaning}, {settings[key].default} by default."
            )
        chosen[key] = value
    return plugin, chosen


@functools.cache
def import_plugins_of_packages() -> None:
    """Import, once, the modules that installed packages name in the group `longmem.plugins`; warn of those that fail."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist is not None else "a package"
            warnings.warn(f"the plug-ins of {package} can't be imported from {entry.value}: {error!r}", stacklevel=3)


def _known_settings(word: object, name: str, settings: Mapping[str, Setting]) -> str:
    return name_known(name, settings) if settings else f"{word!r} has no settings: leave out the colon."
