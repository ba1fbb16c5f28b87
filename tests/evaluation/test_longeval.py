"""LongEval's prompts: taken apart, placed in memory, and what a wrong memory is."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from longmem.evaluation.tasks.longeval import LongEval, LongEvalSettings, read_longeval

LINES = "Below is a record.\n\nline red-cat: REGISTER_CONTENT is <2416>\nline old-dog: REGISTER_CONTENT is <24167>\n"
LINES_END = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line red-cat? I need the number. "
LINE: dict[str, Any] = {
    "prompt": LINES + LINES_END,
    "correct_line": "line red-cat: REGISTER_CONTENT is <2416>\n",
    "expected_number": 2416,
}
TOPICS = "Memorize. USER: I would like to discuss the topic of the history of Rome. \n USER: now the art of soup. "
TOPICS_END = "Now the record ends. What is the first topic we discussed?"


@pytest.fixture
def longeval(tmp_path: Path) -> Path:
    folder = tmp_path / "longeval"
    folder.mkdir()
    with gzip.open(folder / "lines_2.jsonl.gz", "wt") as file:
        file.write(json.dumps(LINE) + "\n" + json.dumps(LINE | {"prompt": LINES * 2 + LINES_END}) + "\n")
    topics = {"prompt": TOPICS + TOPICS_END, "topics": ["The history of Rome", "The art of soup"]}
    (folder / "topics_2.jsonl").write_text(json.dumps(topics) + "\n")
    return folder


@pytest.fixture
def settings(longeval: Path) -> LongEvalSettings:
    return LongEvalSettings(output="unused", data=str(longeval))


def test_prompts_of_longeval_are_taken_apart(model, longeval, settings):
    prompt, _ = read_longeval(longeval, "lines")
    assert prompt.record == LINES + "\n"
    assert prompt.question.startswith("Now the record is over.")
    assert prompt.question.endswith("line red-cat: REGISTER_CONTENT is <")
    assert prompt.values == ["2416>", "24167>"]
    (topics,) = read_longeval(longeval, "topics")
    assert topics.values == ["the history of Rome", "the art of soup"]
    lines, _, conversation = LongEval(settings).cases(model)
    for case, own, after in ((lines, prompt, LINES.partition("<2416>")[2] + "\n"), (conversation, topics, None)):
        (item,), (ids,) = case.items, case.memory
        assert item.about["values"][item.about["right"]] == own.values[0]
        assert sorted(item.about["values"]) == sorted(own.values)
        end = ids[len(ids) - item.about["distance"] :]
        assert model.tokenizer.decode(end) == (after or TOPICS.partition("of Rome")[2])
        assert model.tokenizer.decode(item.token_ids) == own.question
        assert model.tokenizer.decode(ids) == own.record
        assert item.about["size"] == len(ids)
        assert case.axes["depth"] == round(4 * item.about["distance"] / len(ids)) / 4
    assert [model.tokenizer.decode(each)[0] for each in conversation.items[0].candidates] == [" ", " "]
    assert model.tokenizer.decode(lines.items[0].candidates[0])[0] == "2"


def test_files_that_are_none_of_longeval_are_refused(longeval):
    (longeval / "lines_3.jsonl").write_text('{"prompt": "no end"}\n')
    with pytest.raises(ValueError, match=r"lines_3.jsonl, line 1, must be a prompt of LongEval"):
        read_longeval(longeval, "lines")
    with pytest.raises(ValueError, match="`data` must be a folder with files lines_"):
        read_longeval(longeval.parent, "lines")


def test_the_wrong_memory_is_the_next_record_of_the_same_task(model, longeval, settings):
    task = LongEval(settings)
    first, second, topics = cases = task.cases(model)
    assert task.wrong(first, cases) is second
    assert task.wrong(second, cases) is first
    with pytest.raises(ValueError, match="`systems` must leave out `wrong`"):
        task.wrong(topics, cases)
    (longeval / "lines_3.jsonl").write_text(json.dumps(LINE) + "\n")
    task = LongEval(dataclasses.replace(settings, tasks=("lines",), limit=1))
    first, second = cases = task.cases(model)  # two of three: the second is there for its record alone
    assert [len(case.items) for case in cases] == [1, 0]
    assert task.wrong(first, cases).name == "lines_2/1"


@pytest.mark.parametrize("tasks", [(), ("lines", "lines")])
def test_tasks_are_named_once(settings, tasks):
    with pytest.raises(ValueError, match="`tasks` must be at least one, and none twice"):
        dataclasses.replace(settings, tasks=tasks)
