"""Wrong values of every setting of training and of every evaluation, by the setting's own type and range: each is refused."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

from longmem.evaluation.registry import TASKS, task_class
from longmem.settings import read_settings
from longmem.settings.reading import Limit
from longmem.training.settings import TrainingSettings

# As they are written in YAML.
WRONG: dict[Any, tuple[str, ...]] = {
    str: ("5", "2.5", "true", "[a]", "{a: 1}", "''", "2001-01-01"),
    int: ("x", "2.5", "true", "[1]", "'4'", "''", "{a: 1}"),
    float: ("x", "true", ".nan", ".inf", "-.inf", "[1]", "'0.5'"),
    bool: ("yes", "off", "1", "0", "x", "''", "[true]"),
    dict: ("5", "x", "[1]", "true"),
}


def settings_of(kind: type, place: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield dotted name and type of every setting that is no section, and whether it must be given."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        dotted = f"{place}.{name}" if place else name
        if dataclasses.is_dataclass(hint):
            yield from settings_of(hint, dotted)
        else:
            yield dotted, hint, fields[name].default is fields[name].default_factory  # both are missing


def wrong_values(hint: Any) -> Iterator[str]:
    """Yield values, as YAML, that a type must refuse."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not types.NoneType)
    else:
        yield "null"
    limits: list[Limit] = []
    if get_origin(hint) is Annotated:
        hint, *limits = get_args(hint)
    if get_origin(hint) is tuple:
        yield from ("5", "{a: 1}", "[null]", *(f"[{each}]" for each in wrong_values(get_args(hint)[0])))
        return
    for limit in limits:
        step = {"of at least": -1, "at most": 1}.get(limit.words, 0)  # the others exclude the limit itself
        yield str(limit.limit + step)
    if get_origin(hint) is Literal:
        yield from (f"{get_args(hint)[0]}x", *WRONG[str])
    else:
        yield from WRONG[get_origin(hint) or hint]


def problem_of(kind: type, given: list[str], name: str, value: str) -> str | None:
    """Return what is wrong with the answer to a wrong value, None if it is a good refusal."""
    try:
        read_settings(kind, None, [*given, f"{name}={value}"])
    except ValueError as error:
        text = str(error)
        is_good = text.startswith(f"`{name}` must be ") and ", got " in text and ";" in text and text.endswith(".")
        return None if is_good and "\n" not in text else text
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it was accepted"


KINDS = {name: task_class(name).kind for name in TASKS} | {"train": TrainingSettings}


def what_must_be_given(kind: type) -> list[str]:
    return [f"{name}={'[a]' if get_origin(hint) is tuple else 'a'}" for name, hint, must in settings_of(kind) if must]


@pytest.mark.parametrize("name", KINDS)
def test_wrong_values_of_every_setting_are_refused(name: str) -> None:
    kind, given = KINDS[name], what_must_be_given(KINDS[name])
    rows = [(setting, value) for setting, hint, _ in settings_of(kind) for value in dict.fromkeys(wrong_values(hint))]
    answers = {f"{setting}={value}": problem_of(kind, given, setting, value) for setting, value in rows}
    assert {row: said for row, said in answers.items() if said is not None} == {}
    assert len(answers) > 50


@pytest.mark.parametrize("name", KINDS)
def test_names_that_are_no_setting_and_sections_that_are_none_are_refused(name: str, tmp_path: Any) -> None:
    kind, given = KINDS[name], what_must_be_given(KINDS[name])
    for setting, _, _ in settings_of(kind):
        with pytest.raises(ValueError, match=f"^`{setting}x` is not a setting of this run. Did you mean `"):
            read_settings(kind, None, [*given, f"{setting}x=1"])
    sections = [key for key, hint in get_type_hints(kind).items() if dataclasses.is_dataclass(hint)]
    path = tmp_path / "settings.yaml"
    for section in sections:
        for value in (5, "x", [1], True):
            path.write_text(yaml.safe_dump({section: value}))
            others = [each for each in given if not each.startswith(f"{section}.")]
            with pytest.raises(ValueError, match=f"^`{section}` must be a section of settings, name: value, got"):
                read_settings(kind, path, others)
