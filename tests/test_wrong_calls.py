"""Wrong calls of everything public: each is refused by one sentence with name, rule, value and way out; nothing is written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
from wrong_values import CALLS, WRONG, World, make_world, rows

# What a refusal may call an argument, where it is that of another function that the call is made of.
CALLED = {
    ("MemoryBank.add", "keys"): "keys",
    ("MemoryBank.supersede", "by"): "by",
    ("LongMemForCausalLM.from_backbone", "backbone_options"): "options",
    ("LongMemForCausalLM.from_pretrained", "backbone_options"): "options",
    ("LongMemForCausalLM.forward", "past_key_values"): "cache",
    ("MemoryStream.read", "text_or_ids"): "text_or_ids",
}


@pytest.fixture(autouse=True)
def no_shape_checks() -> Iterator[None]:
    """Let calls come to the package's own checks: those that test runs put in stand before them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def problem_of(world: World, name: str, argument: str, value: object) -> str | None:
    """Return what is wrong with the answer to a wrong call, None if it is a good refusal."""
    before = world.bank.documents()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CALLS[name][0](world, **{argument: value})
    except (ValueError, OSError) as error:
        text = str(error)
        called = CALLED.get((name, argument), argument)
        found = {
            "names the argument": called in text,
            "says what it got": "got" in text,
            "says a rule": any(word in text for word in ("must", "needs", "has the keys", "is not a")),
            "is one sentence": "\n" not in text,
            "changes nothing": world.bank.documents() == before and not os.listdir(),
        }
        missing = [words for words, holds in found.items() if not holds]
        return f"{missing}: {type(error).__name__}: {text}" if missing else None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it was accepted"


def problems(world: World, every: bool) -> list[str]:
    answers = [(row, problem_of(world, *row)) for row in rows(every)]
    return [f"{name}({argument}={value!r}): {said}" for (name, argument, value), said in answers if said is not None]


def test_wrong_calls_are_refused_at_the_door(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(list(rows(every=False))) > 100
    assert problems(world, every=False) == []


@pytest.mark.slow
def test_every_wrong_call_is_refused_at_the_door(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(list(rows(every=True))) > 500
    assert problems(world, every=True) == []


def test_the_kinds_are_used() -> None:
    used = {kind for _, arguments in CALLS.values() for kind in arguments.values()}
    assert used == set(WRONG)
