"""Evaluations give the results that are recorded: every kind of them, on a tiny model and tiny data.

Where a change of results is meant, `python tests/evaluation/recorded_runs.py --write KIND` records them anew.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from recorded_form import RELATIVE, RELATIVE_OF, differences, file_of, read, same_text
from recorded_runs import ADAPTERS, SETTINGS, result_of

SHOWN = 12  # lines of what differs
LARGEST = 60_000  # bytes of a record


@pytest.mark.filterwarnings("ignore:`budget_tokens")  # some policies are made to leave stale entries
@pytest.mark.parametrize("kind", ADAPTERS)
def test_results_are_those_on_record(kind):
    if kind == "harness":
        pytest.importorskip("lm_eval")
    found = list(differences(result_of(kind), read(kind), relative=RELATIVE_OF.get(kind, RELATIVE)))
    shown = "\n".join(found[:SHOWN])
    assert not found, f"{len(found)} values of {kind} differ from {file_of(kind).name}, the first of them:\n{shown}"


def test_every_kind_is_recorded_and_no_other():
    assert set(ADAPTERS) == set(SETTINGS) == {path.stem for path in file_of("").parent.glob("*.json")}
    assert all(file_of(kind).stat().st_size < LARGEST for kind in ADAPTERS)


def leaves(content: Any, place: tuple[Any, ...] = ()) -> Any:
    """Yield the place of every value that holds no others."""
    if isinstance(content, (dict, list)):
        for name, each in content.items() if isinstance(content, dict) else enumerate(content):
            yield from leaves(each, (*place, name))
    else:
        yield place


def other_than(value: Any) -> Any:
    """Return a value that is another."""
    if isinstance(value, bool) or value is None:
        return not value
    return value * 1.001 + 0.001 if isinstance(value, float) else value + (1 if isinstance(value, int) else "!")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_no_value_can_change_unseen(kind):
    recorded = read(kind)
    assert not list(differences(copy.deepcopy(recorded), recorded))
    places = list(leaves(recorded))
    for place in places[:: max(1, len(places) // 20)]:
        *way, last = place
        inside = changed = copy.deepcopy(recorded)
        for name in way:
            inside = inside[name]
        inside[last] = other_than(inside[last])
        assert len(list(differences(changed, recorded))) == 1, place


def test_what_is_missing_or_new_is_a_difference():
    recorded = {"records": [{"system": "on", "right": True}], "metrics": {"loss": 1.0}}
    assert list(differences({**recorded, "records": []}, recorded)) == ["/records: 0 values instead of 1"]
    assert list(differences({"records": recorded["records"]}, recorded)) == ["/metrics: missing"]
    assert list(differences({**recorded, "more": 1}, recorded)) == ["/more: new"]
    for value in (1, "1.0", None, True):
        assert len(list(differences({**recorded, "metrics": {"loss": value}}, recorded))) == (
            value != 1 or value is True
        )


def test_texts_for_people_may_differ_by_the_last_decimal_alone():
    assert same_text("2.34 (-0.01 to 3.10)", "2.35 (+0.00 to 3.10)")
    for other in ("2.37 (-0.01 to 3.10)", "2.34 (-0.01 to 3.10)!", "2.3 (-0.01 to 3.10)", "2.34"):
        assert not same_text(other, "2.34 (-0.01 to 3.10)")
    assert not same_text("7 of 8", "6 of 8")
