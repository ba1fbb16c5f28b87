"""Plain values, as YAML gives them, into dataclasses: every key known, every value of its type and in its range."""

import copy
import dataclasses
import functools
import math
import operator
import os
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from longmem.errors import did_you_mean

Section = TypeVar("Section")


class Limit(NamedTuple):
    """What a number must be compared with a limit, and how that is worded."""

    words: str
    holds: Callable[[float, float], bool]
    limit: float

    def __str__(self) -> str:
        return f"{self.words} {self.limit:,}"


From = functools.partial(Limit, "of at least", operator.ge)
UpTo = functools.partial(Limit, "at most", operator.le)
Above = functools.partial(Limit, "above", operator.gt)
Below = functools.partial(Limit, "below", operator.lt)


def read_section(section: type[Section], values: object, *, place: str = "", known: Iterable[str] = ()) -> Section:
    """Return a dataclass from a mapping; fields that are dataclasses are read from mappings inside it.

    Args:
        section: its annotations say what is allowed: `str`, `int`, `float`, `bool`, `Literal`, a free `dict`, another
            dataclass, each of them `| None` or, if a number, `Annotated` with limits; `tuple[..., ...]` of one of them
            takes a list.
        place: dotted name of the section, empty for the whole.
        known: dotted names to offer when a key is unknown.

    Raises ValueError if a key is unknown, a required one is missing, or a value has another type or is out of its range.
    """
    known = list(known) or list(dotted_names(section))
    fields = {field.name: field for field in dataclasses.fields(section)}  # type: ignore[arg-type]
    if values is None:  # `data:` with nothing below it
        values = {}
    if not isinstance(values, Mapping):
        raise ValueError(
            f"`{place or 'settings'}` must be a section of settings, name: value, got {values!r}; it has "
            f"{', '.join(fields)}."
        )
    for key in values:
        if key not in fields:
            refuse_unknown(_join(place, str(key)), known)
    hints = get_type_hints(section, include_extras=True)
    read: dict[str, Any] = {}
    for name, field in fields.items():
        dotted = _join(place, name)
        if dataclasses.is_dataclass(hints[name]):
            read[name] = read_section(hints[name], values.get(name), place=dotted, known=known)
        elif name in values:
            read[name] = _read_value(hints[name], values[name], dotted, field)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(
                f"`{dotted}` must be given, it has no default; write it into the file or add {dotted}=VALUE."
            )
    return section(**read)


def dotted_names(section: type, place: str = "") -> Iterable[str]:
    """Yield the dotted name of every setting, those of inner sections included.

    >>> inner = dataclasses.make_dataclass("Inner", [("lanes", int)])
    >>> list(dotted_names(dataclasses.make_dataclass("Outer", [("output", str), ("data", inner)])))
    ['output', 'data.lanes']
    """
    for name, hint in get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            yield from dotted_names(hint, _join(place, name))  # type: ignore[arg-type]
        else:
            yield _join(place, name)


def refuse_unknown(name: str, known: Iterable[str]) -> None:
    """Raise ValueError for a dotted name that is no setting; offer the same name of another section, or a close one."""
    known = list(known)
    last = name.rpartition(".")[2]
    elsewhere = [each for each in known if each.rpartition(".")[2] == last]
    offer = f" Did you mean `{elsewhere[0]}`?" if elsewhere else did_you_mean(name, known) or did_you_mean(last, known)
    raise ValueError(f"`{name}` is not a setting of this run.{offer}")


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _read_value(hint: Any, value: Any, name: str, field: dataclasses.Field[Any]) -> Any:
    """Return the value in the type of the annotation."""
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional:
        if value is None:
            return None
        (hint,) = (part for part in get_args(hint) if part is not types.NoneType)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"`{name}` must be a list, got {value!r}; write it as [..., ...].")
        return tuple(_read_value(get_args(hint)[0], each, name, field) for each in value)
    limits: list[Any] = []
    if get_origin(hint) is Annotated:
        hint, *limits = get_args(hint)
    converted = _convert(hint, value)
    if converted is None or not all(each.holds(converted, each.limit) for each in limits):
        raise ValueError(f"`{name}` must be {_rule(hint, limits, optional)}, got {value!r}; {_way_out(hint, field)}")
    return converted


def _convert(hint: Any, value: Any) -> Any:
    """Return `value` in the type `hint`, None where it has another."""
    if get_origin(hint) is Literal:
        return value if isinstance(value, str) and value in get_args(hint) else None
    if hint is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if is_number else None
    if get_origin(hint) is dict:
        return copy.deepcopy(dict(value)) if isinstance(value, Mapping) else None
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        return None
    if isinstance(value, str):  # "~" is the home folder wherever a setting names a place
        return os.path.expanduser(value) or None
    return value


def _rule(hint: Any, limits: list[Any], optional: bool) -> str:
    names = {str: "text that is not empty", int: "an integer", float: "a number", bool: "true or false"}
    if get_origin(hint) is Literal:
        rule = "one of " + ", ".join(get_args(hint))
    else:
        rule = names.get(hint, "a section, name: value")
    return " ".join([rule, " and ".join(map(str, limits))] if limits else [rule]) + (", or null" if optional else "")


def in_words(hint: Any) -> str:
    """Return what a value of a type is called in an error message.

    >>> in_words(int | None), in_words(Literal["a", "b"]), in_words(list[int])
    ('an integer, or None', 'one of a, b', 'a list of integers')
    """
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [part for part in parts if part is not types.NoneType]
    hint = float if float in kinds else kinds[0]
    if get_origin(hint) is list:
        words = "a list of integers" if get_args(hint) == (int,) else "a list of lists of integers"
    else:
        words = "a dictionary with names for keys" if get_origin(hint) is dict else _rule(hint, [], False)
    return words.replace("true or false", "True or False") + (", or None" if len(kinds) < len(parts) else "")


def _way_out(hint: Any, field: dataclasses.Field[Any]) -> str:
    if hint is str:
        return "put quotes around what YAML would read as a number, a date or true and false."
    if field.default is dataclasses.MISSING:
        return "leave it out for none."
    return f"the default is {'null' if field.default is None else field.default}."
