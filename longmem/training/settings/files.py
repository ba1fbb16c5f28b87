"""Training settings in YAML files, and what a run that goes on may change of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from os import PathLike
from typing import TypeVar

from longmem.settings import read_settings
from longmem.settings.nested import leaves
from longmem.training.settings.checks import config_fields, validate_settings
from longmem.training.settings.sections import TrainingSettings

Settings = TypeVar("Settings", bound=TrainingSettings)

# Settings that a run which goes on may get anew: they change nothing of what it computes.
MAY_CHANGE = (
    *("output", "logging.", "checkpoints.", "validation."),
    *("features.ahead", "features.max_gigabytes", "optimization.max_minutes"),
)


def load_settings(
    path: str | PathLike[str],
    overrides: Sequence[str] = (),
    kind: type[Settings] = TrainingSettings,  # type: ignore[assignment]
) -> Settings:
    """Return the settings in a YAML file, changed by overrides and checked; see `longmem.settings.read_settings`.

    An override may also set a field of `LongMemConfig`, as in `model.config.chunk_size=8`. `kind`: the class of settings,
    which may have more sections.

    Raises:
        ValueError: the file is missing or no YAML, or a setting is unknown, missing, of another type or out of range.
    """
    settings = read_settings(kind, path, overrides, free={"model.config": config_fields()})
    validate_settings(settings)
    return settings


def refuse_changed_settings(settings: TrainingSettings, path: str | PathLike[str]) -> None:
    """Raise ValueError if a run that is to go on would get other settings than it began with, naming them.

    What decides only how long a run lasts, what it writes down and where may change.
    """
    changes = []
    runs = (dataclasses.asdict(each) for each in (load_settings(path, kind=type(settings)), settings))
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
