"""Settings in YAML files, those that come with the package among them, and changes to them from a command line."""

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from longmem.errors import name_known
from longmem.files import read_file, write_file
from longmem.settings.reading import Section, dotted_names, read_section, refuse_unknown

MAX_BYTES = 1 << 20


class SettingsLoader(yaml.SafeLoader):
    """Read YAML as `yaml.safe_load` does, but take `1e-4` for a number, `on`, `off`, `yes` and `no` for words, and refuse
    a key that is given twice, numbers such as 010 and 1:30, and aliases: a few lines of them make a value of any size.

    PyYAML follows YAML 1.1, in which a number needs a dot, those words are true and false, and those numbers 8 and 90, and
    takes the last of two values in silence.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return one value."""
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep=deep)
        mark = node.start_mark
        if node.tag.endswith((":int", ":float")) and OTHER_BASE.fullmatch(node.value):
            raise ValueError(
                f"settings must have plain decimal numbers, got {node.value} in line {mark.line + 1} of {mark.name!r}; leave "
                "out leading zeros and colons, or put quotes around what is text."
            )
        try:
            return super().construct_object(node, deep=deep)
        except (
            ArithmeticError,
            AttributeError,
            TypeError,
            ValueError,
        ) as error:  # of a value that its tag does not fit
            raise yaml.constructor.ConstructorError(None, None, f"{node.value!r:.80}: {error}", mark) from error

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the node that comes next."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ValueError(
                f"settings must be written out, got the alias `*{event.anchor}` in line {event.start_mark.line + 1} of "
                f"{event.start_mark.name!r}; put there what it stands for."
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return one mapping."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ValueError(
                    f"`{key.value}` must be given once, got it again in line {key.start_mark.line + 1} of "
                    f"{key.start_mark.name!r}; leave out one."
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class SettingsDumper(yaml.SafeDumper):
    """Put quotes around text that `SettingsLoader` would take for a number."""


OTHER_BASE = re.compile(r"[-+]?0[0-9_]+|.*:.*")
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
for each in (SettingsLoader, SettingsDumper):
    each.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))

# Only of the loader: what is saved keeps the quotes that other programs need.
BOOLEAN = "tag:yaml.org,2002:bool"
SettingsLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != BOOLEAN]
    for letter, resolvers in SettingsLoader.yaml_implicit_resolvers.items()
}
SettingsLoader.add_implicit_resolver(BOOLEAN, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_settings(
    kind: type[Section],
    path: str | PathLike[str] | None,
    overrides: Sequence[str] = (),
    *,
    free: Mapping[str, Iterable[str]] | None = None,
) -> Section:
    """Return the settings in a YAML file, changed by overrides; types and ranges are checked.

    Args:
        kind: dataclass whose fields are the keys of the file; what it leaves out has its default.
        path: YAML file, whose relative paths are taken from the current directory; None: there are the overrides alone.
        overrides: each `section.key=value`, the value in YAML, as in `data.lanes=8`; the last of the same name counts.
        free: dotted names of free sections, such as `model.config`, with the names that an override may set in them.

    Raises ValueError if the file is missing or no YAML, or a setting is unknown, missing, of another type or out of range.
    """
    values = None
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"`path` must be a YAML file with settings, got {str(path)!r}, which is no file.")
        values = _parse(read_file(path, max_bytes=MAX_BYTES), str(path))
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} must hold sections of settings, name: value, got {type(values).__name__}.")
    values = values or {}
    known = [*dotted_names(kind), *(f"{section}.{name}" for section, names in (free or {}).items() for name in names)]
    for override in overrides:
        _apply_override(values, override, known, tuple(free or ()))
    return read_section(kind, values)


def shipped_settings(folder: Path) -> dict[str, Path]:
    """Return the YAML files in a folder of the package by their names, in alphabetical order."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def settings_file(folder: Path, named: str) -> Path:
    """Return the file of that name in a folder of the package or, if it has none, the file with that path.

    A file of yours that bears such a name is reached as `./name`.

    Raises ValueError if there is neither.
    """
    shipped = shipped_settings(folder)
    path = shipped.get(named, Path(named))
    if not path.is_file():
        raise ValueError(
            f"`config` must be a YAML file, or the name of one that comes with the package, got {named!r}, which is no "
            f"file; {name_known(named, shipped)}"
        )
    return path


def save_settings(settings: Any, path: str | PathLike[str]) -> None:
    """Write every field, defaults included, to a YAML file that `read_settings` reads back as equal settings."""
    write_file(path, settings_text(settings))


def settings_text(settings: Any) -> str:
    """Return the YAML of every field, defaults included."""
    return yaml.dump(dataclasses.asdict(settings), Dumper=SettingsDumper, sort_keys=False, allow_unicode=True)


def _parse(text: Any, source: str) -> Any:
    """Return what YAML text says, under a name that errors then give."""
    try:
        loader = SettingsLoader(text)
        loader.name = source
        return loader.get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{source!r} must be YAML, which it is not: {error}") from error


def _apply_override(values: dict[str, Any], override: str, known: Sequence[str], free: Sequence[str]) -> None:
    """Set one value of nested mappings, in place; below a known name of a free section any name will do."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals:
        raise ValueError(f"`overrides` must have the form section.key=value, got {override!r}.")
    is_inside = any(name.startswith(f"{each}.") for each in known if each.rpartition(".")[0] in free)
    if name not in known and not is_inside:
        refuse_unknown(name, known)
    *sections, key = name.split(".")
    inner = values
    for section in sections:
        if inner.get(section) is None:  # left out, or a heading with nothing below it
            inner[section] = {}
        inner = inner[section]
        if not isinstance(inner, dict):
            raise ValueError(
                f"`{section}` must be a section of settings, name: value, got {inner!r}, where `{name}` cannot be set."
            )
    inner[key] = copy.deepcopy(_parse(text, override))
