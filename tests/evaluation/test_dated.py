"""Dated texts: what is found in them, what is flagged, the same questions from the same texts, and what of memory was read."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from longmem.evaluation.runner import evaluate
from longmem.evaluation.tasks import dated
from longmem.evaluation.tasks.dated import Dated, DatedSettings, dated_text, read_texts

CHANGES = (
    "stopped losing the last line of a file",
    "added a way to read many files at once",
    "dropped support for tapes",
)
ALPHA = f"""# Alpha

Alpha needs numbers 1.2 and more.

## 2.1 (2026-03-02)

- Alpha {CHANGES[0]}. Thanks to all.
- Short.

## 2.0 - March 1, 2025

* Alpha {CHANGES[1]}, as
  was asked (#12, [notes](https://example.org))

## 1.1 (2020-05-06)

- Alpha {CHANGES[2]}

## 1.0

- Alpha began with what was there before it
"""
BETA = f"""3.0 (released 2026-02-01)
-------------------------

- Beta {CHANGES[0]}

2.5
===

*(2021-01-09)*

- Beta {CHANGES[1]}
"""
WORDS = "The rain fell on the old house while a dog sat in it. "


@pytest.fixture(scope="module")
def model(backbone_folder: str) -> Any:
    """What questions are made with: a tokenizer alone."""
    return SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(backbone_folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "alpha.md").write_text(ALPHA)
    (folder / "beta.rst").write_text(BETA)
    (folder / "2026-01-05-letter.txt").write_text(WORDS * 20)
    (folder / "story.txt").write_text("Updated: 3 May 2019\n" + WORDS * 20)
    (folder / "tale.txt").write_text(WORDS[::-1] * 20)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def settings(folder: Path, backbone_folder: str, tmp_path: Path) -> DatedSettings:
    return DatedSettings(
        output=str(tmp_path / "run"),
        data=str(folder),
        model=backbone_folder,
        config={"segment_length": 64, "num_retrieved_tokens": 8},
        systems=("backbone", "on", "wrong"),
        window=512,
        max_new_tokens=4,
        num_choices=3,
        continuation_tokens=16,
        local_tokens=32,
        tokens_per_text=400,
    )


def test_lists_of_changes_are_found_with_their_dates(folder):
    found = {each.name: each for each in read_texts(str(folder))}
    assert list(found) == ["2026-01-05-letter", "alpha", "beta", "story", "tale"]
    assert [(each.version, each.date) for each in found["alpha"].releases] == [
        ("2.1", "2026-03-02"),
        ("2.0", "2025-03-01"),
        ("1.1", "2020-05-06"),
        ("1.0", ""),
    ]
    assert [each.date for each in found["beta"].releases] == ["2026-02-01", "2021-01-09"]
    assert [each.changes for each in found["alpha"].releases[:2]] == [
        (f"Alpha {c}",) for c in (CHANGES[0], CHANGES[1] + ", as was asked")
    ]
    assert [found[name].date for name in ("2026-01-05-letter", "story", "tale")] == ["2026-01-05", "2019-05-03", ""]


@pytest.mark.parametrize(
    "text",
    [
        "version 1.0 of this is older than 0.9, which was better\n\n    version 2.0\n",  # sentences and examples
        "3.11 and 3.12 are supported.\n1.5\n",
        "- 1.2.3.4 is an address (since 2020)\n- 5.6 is a number of notes\n",
        "## 1.0 (2020-01-01)\n- one release alone\n",
        "## 1.0 (2020-01-01)\n- the same\n## 1.0 (2020-01-01)\n- twice\n",
    ],
)
def test_what_is_no_list_of_changes_is_a_text(text):
    assert dated_text("x", text).releases == ()


def test_lists_may_have_their_oldest_release_first():
    text = "1.0 (2020-01-01)\n- one\n1.1 (2021-01-01)\n- two\n"
    assert [each.version for each in dated_text("x", text).releases] == ["1.1", "1.0"]


def test_every_question_is_flagged_and_none_is_dropped_silently(model, settings):
    task = Dated(settings)
    cases = task.cases(model)
    flags = {
        f"{case.name}/{item.name}": item.about["age"]
        for case in cases
        for item in case.items
        if item.about["kind"] != "continuation"
    }
    assert flags == {
        "version/alpha/0": "new",
        "version/alpha/1": "new",
        "version/alpha/2": "old",
        "version/alpha/3": "undated",
        "version/beta/0": "new",
        "version/beta/1": "old",
        "latest/alpha/latest": "new",
        "latest/beta/latest": "new",
    }
    continued = {case.group: item.about["age"] for case in cases for item in case.items if not item.token_ids}
    assert continued == {**continued, "2026-01-05-letter": "new", "story": "old", "tale": "undated"}
    (note,) = task.notes
    assert f"{sum(len(case.items) for case in cases)} questions" in note
    new = Dated(dataclasses.replace(settings, ages=("new",)))
    asked = [item for case in new.cases(model) for item in case.items]
    assert {item.about["age"] for item in asked} == {"new"}
    assert new.notes == task.notes  # what is not asked is counted all the same


def test_the_same_texts_give_the_same_hash_and_others_another(model, settings, folder):
    def hash_of(**changes: Any) -> str:
        task = Dated(dataclasses.replace(settings, **changes))
        return task.identity(task.cases(model))["dated"]

    first = hash_of()
    assert hash_of() == first
    (folder / "picture.png").write_bytes(b"another")
    assert hash_of() == first
    assert hash_of(ages=("new",), limit=1) == first
    for changes in ({"seed": 1}, {"tokens_per_text": 300}, {"cutoff": "2025-06-01"}):
        assert hash_of(**changes) != first
    (folder / "beta.rst").write_text(BETA.replace("3.0", "3.1"))
    assert hash_of() != first


def test_a_change_is_asked_with_the_versions_of_its_list_and_stands_in_memory(model, settings):
    decode = model.tokenizer.decode
    cases = {case.name: case for case in Dated(settings).cases(model)}
    assert [decode(ids) for ids in cases["version/alpha"].memory] == [
        decode(ids) for ids in cases["latest/beta"].memory
    ]
    alpha, beta = map(decode, cases["version/alpha"].memory)
    for item in cases["version/alpha"].items:
        question, value = decode(item.token_ids), item.about["values"][item.about["right"]]
        assert f"{question.splitlines()[-1]} {value}" in alpha
        assert not any(
            f"{question.splitlines()[-1]} {wrong}" in alpha for wrong in item.about["values"] if wrong != value
        )
    assert alpha.endswith("The latest version of alpha is 2.1, released 2026-03-02.\n")
    (item,) = cases["latest/alpha"].items
    assert {"2.1,", "2.0,"} <= set(item.about["values"])
    assert "Beta" in beta


def test_a_run_leaves_what_was_read_and_the_hash(settings):
    finished = evaluate(Dated(dataclasses.replace(settings, limit=2, generate=False)), Console(file=io.StringIO()))
    records = [json.loads(line) for line in (finished.folder / "predictions.jsonl").read_text().splitlines()]
    config = json.loads((finished.folder / "config.json").read_text())
    assert config["data"]["dated"] in finished.metrics["notes"][0]
    facts = [record for record in records if record["system"] == "on" and record["kind"] != "continuation"]
    assert facts
    assert all(0 <= record["source"] <= 1 and record["read"] in ("alpha", "beta") for record in facts)
    assert {record["freshness"] for record in facts if record["kind"] == "latest"} == {1.0}
    assert finished.metrics["measures"]["freshness"]["cells"]["latest"]["systems"]["on"]["value"] == 100
    assert set(finished.metrics["measures"]["likelihood"]["cells"]["continuation"]["systems"]) == {
        "backbone",
        "on",
        "wrong",
    }
    by_system = {name: [r["logprobs"] for r in records if r["system"] == name] for name in ("backbone", "on", "wrong")}
    assert by_system["on"] != by_system["wrong"] != by_system["backbone"]


def test_what_was_superseded_is_read_where_it_stays_beside_the_newer(settings):
    beside = dataclasses.replace(
        settings, superseded="beside", kinds=("latest",), systems=("on",), generate=False, limit=1
    )
    finished = evaluate(Dated(beside), Console(file=io.StringIO()))
    assert finished.metrics["measures"]["freshness"]["cells"]["latest"]["systems"]["on"]["value"] < 100


def test_an_answer_is_supported_if_the_passage_names_it(settings):
    record = {"kind": "version", "logprobs": [-1.0, -3.0], "tokens": [1, 1], "right": 0, "values": ["2.1)", "2.14)"]}
    score = Dated(settings).score
    for passage, prediction, expected in (
        ("x (alpha 2.1)", "2.1)", 1),
        ("x (alpha 2.1)", "2.14)", 0),  # what was said, not what is right
        ("x (alpha 2.14)", "2.1)", 0),
        ("x (alpha 2.1)", "none", 0),
    ):
        assert score({**record, "passage": passage, "prediction": prediction})["support"] == expected
    assert score({**record, "passage": "x (alpha 2.1)"})["support"] == 1
    assert "support" not in score(record)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cutoff": "2024"}, "`cutoff` must be a day as YYYY-MM-DD, got '2024'"),
        ({"cutoff": "1.2.2024"}, "`cutoff` must be a day"),
        ({"kinds": ()}, "`kinds` must be at least one"),
        ({"window": 48}, "`window` must hold more than `local_tokens` and `continuation_tokens`, 48, got 48"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(settings, **changes)


def test_folders_without_what_is_asked_are_refused(model, settings, tmp_path):
    (tmp_path / "empty").mkdir()
    for data, message in (
        ("missing", "which is neither"),
        (str(tmp_path / "empty"), "`data` must hold texts, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            Dated(dataclasses.replace(settings, data=data)).cases(model)
    (tmp_path / "empty" / "short.txt").write_text("Short.")
    with pytest.raises(ValueError, match="of which nothing of the kinds"):
        Dated(dataclasses.replace(settings, data=str(tmp_path / "empty"))).cases(model)
    Path(settings.data, "beta.rst").unlink()
    task = Dated(settings)
    cases = task.cases(model)
    with pytest.raises(ValueError, match="`systems` must leave out `wrong`"):
        task.wrong(cases[0], cases)


def test_this_environment_has_questions_enough(model):
    """The packages that tests need bring lists of changes with them."""
    task = Dated(
        DatedSettings(
            output="unused", data=dated.INSTALLED, num_texts=None, tokens_per_text=20_000, kinds=("version", "latest")
        )
    )
    cases = task.cases(model)
    new = [item for case in cases for item in case.items if item.about["age"] == "new"]
    assert len(new) >= 40
    assert sum(len(case.items) for case in cases) >= 60
