"""Plug-ins by name: "lru", or with settings of their own, "ttl:seconds=3600"."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from longmem.errors import did_you_mean

Plugin = TypeVar("Plugin")


def make_plugin(argument: str, spec: object, known: Mapping[str, type[Plugin]]) -> Plugin:
    """Return the plug-in that `spec` names: a dataclass in `known`, whose fields are its settings.

    Raises ValueError, which names `argument`, for an unknown name or setting, or a value that the plug-in refuses.
    """
    if not isinstance(spec, str):
        raise ValueError(f'`{argument}` must be a name such as "{next(iter(known))}", got {spec!r}.')
    name, _, settings = spec.partition(":")
    if name not in known:
        names = ", ".join(f'"{each}"' for each in known)
        raise ValueError(f"`{argument}` must be one of {names}, got {spec!r}.{did_you_mean(name, known)}")
    plugin = known[name]
    types = typing.get_type_hints(plugin)
    fields = {field.name: field for field in dataclasses.fields(plugin)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, text = (part.strip() for part in setting.partition("="))
        if key not in fields:
            offered = ", ".join(fields) or "none"
            raise ValueError(
                f"`{argument}` {name!r} has no setting {key!r}, got {spec!r}; its settings: {offered}."
                f"{did_you_mean(key, fields)}"
            )
        values[key] = _number(argument, spec, key, text, types[key])
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in values]
    if missing:
        raise ValueError(f'`{argument}` {name!r} needs {missing[0]}, got {spec!r}; write "{name}:{missing[0]}=...".')
    try:
        return plugin(**values)
    except ValueError as error:
        raise ValueError(f"`{argument}` {spec!r}: {error}") from error


def _number(argument: str, spec: str, key: str, text: str, kind: type) -> int | float:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        wanted = "an integer" if kind is int else "a number"
        raise ValueError(f"`{argument}`: {key} must be {wanted}, got {text!r} in {spec!r}.")
    return number
