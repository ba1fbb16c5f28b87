"""Exact match and F1 against what the official SQuAD v1.1 script gave for the same answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longmem.evaluation.tasks.squad import exact_match, f1

PAIRS = json.loads((Path(__file__).parent / "squad_pairs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("pair", PAIRS, ids=[f"{pair['prediction']!a}" for pair in PAIRS])
def test_scores_are_those_of_the_official_script(pair):
    assert exact_match(pair["prediction"], pair["golds"]) == pair["exact_match"]
    assert f1(pair["prediction"], pair["golds"]) == pair["f1"]


def test_the_recorded_pairs_tell_scorers_apart():
    assert len(PAIRS) >= 60
    assert {pair["exact_match"] for pair in PAIRS} == {0.0, 1.0}
    assert len({pair["f1"] for pair in PAIRS}) >= 5


@pytest.mark.parametrize("golds", [[], "Paris"])
def test_gold_answers_are_a_list(golds):
    for measure in (exact_match, f1):
        with pytest.raises(ValueError, match="at least one answer"):
            measure("Paris", golds)
