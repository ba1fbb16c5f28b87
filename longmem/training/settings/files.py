"""Training settings in YAML files, and changes to them from a command line."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from longmem.nested import leaves
from longmem.training.settings.checks import config_fields, validate_settings
from longmem.training.settings.reading import dotted_names, read_section, refuse_unknown
from longmem.training.settings.sections import TrainingSettings

# Settings that a run which goes on may get anew: they change nothing of what it computes.
MAY_CHANGE = ("output", "logging.", "checkpoints.", "validation.", "features.max_gigabytes", "optimization.max_minutes")
FREE_SECTION = "model.config"  # its names are checked against LongMemConfig


class SettingsLoader(yaml.SafeLoader):
    """Read YAML as `yaml.safe_load` does, but take `1e-4` for a number and refuse a key that is given twice.

    PyYAML follows YAML 1.1, in which a number needs a dot, and takes the last of two values in silence.
    """

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


for each in (SettingsLoader, SettingsDumper):
    each.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def load_settings(path: str | PathLike[str], overrides: Sequence[str] = ()) -> TrainingSettings:
    """Return the settings in a YAML file, changed by overrides and checked.

    Relative paths in it are taken from the current directory, as those on a command line are.

    Args:
        path: YAML file whose keys are the fields of `TrainingSettings`; what it leaves out has its default.
        overrides: each `section.key=value`, the value in YAML, as in `data.lanes=8` or `model.config.chunk_size=8`;
            the last of the same name counts.

    Raises:
        ValueError: the file is missing or no YAML, or a setting is unknown, missing, of another type or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`path` must be a YAML file with settings, got {str(path)!r}, which is no file.")
    with path.open(encoding="utf-8") as file:
        values = _parse(file, str(path))
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} must hold sections of settings, name: value, got {type(values).__name__}.")
    values = values or {}
    for override in overrides:
        _apply_override(values, override)
    settings = read_section(TrainingSettings, values)
    validate_settings(settings)
    return settings


def save_settings(settings: TrainingSettings, path: str | PathLike[str]) -> None:
    """Write every field, defaults included, to a YAML file that `load_settings` reads back as equal settings."""
    text = yaml.dump(dataclasses.asdict(settings), Dumper=SettingsDumper, sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def refuse_changed_settings(settings: TrainingSettings, path: str | PathLike[str]) -> None:
    """Raise ValueError if a run that is to go on would get other settings than it began with, naming them.

    What decides only how long a run lasts, what it writes down and where may change.
    """
    changes = []
    runs = (dataclasses.asdict(each) for each in (load_settings(path), settings))
    before, now = ({name: value for name, value in leaves(run) if value != {}} for run in runs)
    for name in sorted(before.keys() | now.keys()):
        free = name.startswith(MAY_CHANGE)
        if not free and before.get(name) != now.get(name):
            changes.append(f"`{name}` was {before.get(name)!r} and is {now.get(name)!r}")
    if changes:
        raise ValueError(
            f"a run with checkpoints goes on with the settings it began with, in {path}, but {', '.join(changes)}; "
            "take them back, or give another `output`."
        )


def _parse(text: Any, source: str) -> Any:
    """Return what YAML text says. A file is read under its own name, which errors then give."""
    try:
        return yaml.load(text, SettingsLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source!r} must be YAML, which it is not: {error}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set one value of nested mappings, in place."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals:
        raise ValueError(f"`overrides` must have the form section.key=value, got {override!r}.")
    known = list(dotted_names(TrainingSettings))
    if name not in known:
        free = name.startswith(FREE_SECTION + ".")
        if not free or name.split(".")[2] not in config_fields():
            refuse_unknown(name, known + [f"{FREE_SECTION}.{each}" for each in config_fields()])
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
