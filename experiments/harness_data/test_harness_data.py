"""Data of the harness's local tasks: questions of the published sets as JSON lines."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from experiments.harness_data.data import babi_items, quality_items, spread_between, write_items

SCRIPT = Path(__file__).with_name("make_harness_data.py")
STORY = """1 Mary left.
2 John came.
3 Where is Mary?\taway\t1
4 Mary came.
5 Where is Mary?|here|4
1 A new one.
2 Who?\tBo\t1
"""


@pytest.fixture
def quality(tmp_path: Path) -> Path:
    work = {
        "input": " Once upon a time. ",
        "instructions": [
            "Who?\n\n (A) a cat\n (B) a  dog \n (C) (nobody)\n(D) all",
            "When?\n(A) 1\n(B) 2\n(C) 3\n(D) 4",
        ],
        "outputs": ["(C) (nobody)", " (A) 1\n"],
    }
    path = tmp_path / "quality.jsonl"
    path.write_text(json.dumps(work) + "\n")
    return path


def test_quality_has_options_and_the_number_of_the_answer(quality):
    first, second = quality_items(quality)
    assert first == {
        "group": "text 0",
        "text": "Once upon a time.",
        "question": "Who?",
        "options": ["a cat", "a dog", "(nobody)", "all"],
        "answer": 2,
    }
    assert (second["question"], second["options"], second["answer"]) == ("When?", ["1", "2", "3", "4"], 0)


@pytest.mark.parametrize(("old", "new"), [("(D) all", "(E) all"), ('"(C) (nobody)"', '"nobody"')])
def test_other_questions_are_refused(quality, old, new):
    quality.write_text(quality.read_text().replace(old, new))
    with pytest.raises(ValueError, match=r"options \(A\), \(B\)"):
        list(quality_items(quality))


def test_babi_has_the_story_up_to_each_question(tmp_path):
    (tmp_path / "qa.txt").write_text(STORY)
    items = list(babi_items(tmp_path / "qa.txt"))
    assert [item["text"] for item in items] == [
        "Mary left. John came.",
        "Mary left. John came. Mary came.",
        "A new one.",
    ]
    assert [(item["group"], item["question"], item["answer"]) for item in items] == [
        ("story 1", "Where is Mary?", "away"),
        ("story 1", "Where is Mary?", "here"),
        ("story 2", "Who?", "Bo"),
    ]


def test_a_filler_goes_between_the_sentences(tmp_path):
    (tmp_path / "qa.txt").write_text(STORY)
    items = list(babi_items(tmp_path / "qa.txt", "a b c d e", 3))
    assert items[0]["text"] == "a Mary left. b John came. c"
    assert items[1]["text"] == "Mary left. d John came. e Mary came. a"  # it begins anew
    assert spread_between([], ["a"]) == ["a"]
    with pytest.raises(ValueError, match="`filler` must be a text"):
        list(babi_items(tmp_path / "qa.txt", " ", 3))


def test_what_is_no_babi_is_refused(tmp_path):
    (tmp_path / "qa.txt").write_text("Once upon a time.\n")
    with pytest.raises(ValueError, match="numbered sentences"):
        list(babi_items(tmp_path / "qa.txt"))
    with pytest.raises(ValueError, match="must be at least one"):
        write_items(tmp_path / "none.jsonl", [])


def test_one_command_writes_the_file_of_a_task(tmp_path, quality, monkeypatch, capsys):
    (tmp_path / "qa.txt").write_text(STORY)
    (tmp_path / "book.txt").write_text("w x y z")
    for arguments in (
        ["quality", quality],
        ["babi", tmp_path / "qa.txt", "--filler", tmp_path / "book.txt", "--filler-words", 4],
        ["babilong_qa1", tmp_path / "qa.txt", "--filler", tmp_path / "book.txt", "--filler-words", 4],
    ):
        monkeypatch.setattr("sys.argv", ["make", *map(str, arguments), "--output", str(tmp_path / "data")])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.count("items") == 3
    babi = [json.loads(line) for line in (tmp_path / "data" / "babi.jsonl").read_text().splitlines()]
    assert babi[0]["text"] == "w Mary left. x John came. y z"
    babilong = json.loads((tmp_path / "data" / "babilong_qa1.jsonl").read_text().splitlines()[0])
    asked = {"question": "Where is Mary?", "target": "away"}  # the fields of lm-eval's tasks
    assert babilong == {"group": "story 1", "input": "w Mary left. x John came. y z", **asked}
