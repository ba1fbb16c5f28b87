"""Notes in memory, asked for in the chat format and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_task import run

from longmem.evaluation.tasks.notes import NOTES, Notes, NotesSettings, read_notes

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def settings(tmp_path: Path, **options: Any) -> NotesSettings:
    systems = ("backbone", "context-1024", "off", "on", "wrong")
    common = {"output": str(tmp_path / "run"), "systems": systems, "window": 128, "haystack": "filler"}
    return NotesSettings(**{**common, "sizes": (64, 200), "max_new_tokens": 2, "limit": 4, **options})


def test_every_note_is_in_memory_and_asked_for_in_both_ways(model, tmp_path, monkeypatch):
    tokenizer = model.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    cases = Notes(settings(tmp_path)).cases(model)
    assert [case.name for case in cases] == ["chat/64", "text/64", "chat/200", "text/200"]
    notes = read_notes(NOTES)[:4]
    for case in cases:
        memory = tokenizer.decode([token for passage in case.memory for token in passage])
        assert all(memory.count(note) == 1 for note, _, _ in notes)
        size = case.axes["size"]
        assert sum(map(len, case.memory[::2])) == size // 4 * 4
        for item, (_, question, answer) in zip(case.items, notes, strict=True):
            asked = tokenizer.decode(item.token_ids)
            assert asked == (
                f"<user>{question}<assistant>" if case.axes["asked"] == "chat" else f"\n\nQuestion: {question}\nAnswer:"
            )
            assert item.about["answer"] == answer


def test_the_wrong_memory_is_the_text_alone(model, tmp_path):
    task = Notes(settings(tmp_path))
    cases = task.cases(model)
    (passage,) = task.wrong(cases[0], cases).memory
    assert len(passage) == 64
    text = model.tokenizer.decode(passage)
    assert not any(note in text for note, _, _ in read_notes(NOTES))


def test_an_answer_counts_where_it_has_the_value(model, tmp_path):
    task = Notes(settings(tmp_path))
    answered = {
        said: task.score({"answer": "Copper Heron", "prediction": said})["answered"]
        for said in ("It is copper  heron.", "copper", "heron copper", "COPPER HERON", "copper herons")
    }
    assert list(answered.values()) == [1, 0, 0, 1, 0]


def test_a_run_has_every_system_and_parity(model, tmp_path):
    task = Notes(settings(tmp_path, sizes=(64,), limit=2))
    records, metrics = run(task, model)
    asked = [each for each in records if "item" in each]
    assert len(asked) == 5 * 2  # without a chat format, as text alone
    assert {each["asked"] for each in asked} == {"text"}
    assert list(metrics["measures"]) == ["answered"]
    assert {each["system"] for each in metrics["parity"]} == {"context-1024"}


def test_no_size_is_asked_twice(tmp_path):
    with pytest.raises(ValueError, match="`sizes` must be at least one, and none twice"):
        settings(tmp_path, sizes=(64, 64))


@pytest.mark.parametrize(
    "content",
    ["", "- [a, b]", "- [a, b, c]", "a: b", "- [a, b, 3]\n- [a, b, c]", "- [a, b, '']\n- [a, b, c]", "[", "- - -"],
)
def test_files_that_hold_no_notes_are_refused(tmp_path, content):
    (tmp_path / "notes.yaml").write_text(content)
    with pytest.raises(ValueError, match="`data` must be"):
        read_notes(tmp_path / "notes.yaml")


def test_the_notes_of_the_package_differ_and_hold_their_answers():
    notes = read_notes(NOTES)
    assert all(answer in note for note, _, answer in notes)
    for column in zip(*notes, strict=True):
        assert len(set(column)) == len(notes)
    assert yaml.safe_load(NOTES.read_text()) == notes
