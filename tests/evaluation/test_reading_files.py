"""The files of QuALITY and LoCoMo become documents and questions, and answers are scored by the rules of each."""

from __future__ import annotations

import json
from typing import Any

import pytest

from longmem.evaluation.tasks.locomo import REFUSAL, Locomo, is_refusal, locomo_exact_match, locomo_f1
from longmem.evaluation.tasks.quality import Quality, QualitySettings, chosen_letter
from longmem.evaluation.tasks.reading import Asked, Document, answer_documents
from longmem.evaluation.tasks.squad import exact_match, f1

OPTIONS = ("He is ill.", "He is (A) liar", "Nobody knows why", "Both")
QUESTION = "Why does he stay?"


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def leval_row(output: str = "(C) Nobody knows why") -> dict[str, Any]:
    shown = "".join(f"\n ({letter}) {option} " for letter, option in zip("ABCD", OPTIONS, strict=True))
    tight = "".join(f"\n({letter}){option}" for letter, option in zip("ABCD", OPTIONS, strict=True))
    return {
        "input": "A story.",
        "instructions": [f"{QUESTION}\n{shown}", QUESTION + tight],
        "outputs": [output, "(D) Both"],
    }


def official_row(gold: Any = 3, part: str = "10_a") -> dict[str, Any]:
    question = {"question": f"{QUESTION} ", "options": [f" {option}" for option in OPTIONS], "gold_label": gold}
    return {"article_id": "10", "set_unique_id": part, "article": "A story.", "questions": [question]}


def test_both_formats_of_quality_give_the_same_questions(tmp_path):
    path = tmp_path / "quality.jsonl"
    path.write_text(lines(leval_row()), encoding="utf-8")
    (leval,) = Quality.read(path)
    path.write_text(lines(official_row(), official_row(4, "10_b")), encoding="utf-8")
    (official,) = Quality.read(path)  # an article of two lines is one document
    assert leval.passages == official.passages == ("A story.",)
    for one, other in zip(leval.asked, official.asked, strict=True):
        assert (one.question, one.options, one.answer) == (other.question, other.options, other.answer)
        assert (one.question, one.options) == (QUESTION, OPTIONS)
    assert [item.answer for item in leval.asked] == [OPTIONS[2], OPTIONS[3]]
    assert len({item.name for item in official.asked}) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "no"}, "line 1 of .* has neither"),
        (official_row(None), "`gold_label` must be from 1 to 4, got None"),
        (official_row(0), "`gold_label` must be from 1 to 4, got 0"),
        (leval_row("the third"), "output 'the third' in question 1/1"),
        (leval_row("(E) more"), "output '\\(E\\) more' in question 1/1"),
    ],
)
def test_what_is_not_quality_is_refused(tmp_path, row, message):
    (tmp_path / "quality.jsonl").write_text(lines(row), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Quality.read(tmp_path / "quality.jsonl")


def quality(style: str, documents: list[Document] | None = None, **changes: Any) -> Quality:
    return Quality(
        QualitySettings(output="-", data="-", style=style, **changes), documents or [Document("1", ("",), ())]
    )


def test_options_are_continuations_or_letters():
    asked = Asked(name="1", question=QUESTION, options=OPTIONS, answer=OPTIONS[2])
    assert quality("text").prompt(asked).endswith(f"Question: {QUESTION}\nAnswer:")
    assert quality("text").candidates(asked) == [f" {option}" for option in OPTIONS]
    letters = quality("letter").prompt(asked)
    assert letters.endswith("\n(D) Both\nAnswer: (")
    assert all(f"\n({letter}) {option}" in letters for letter, option in zip("ABCD", OPTIONS, strict=True))
    assert quality("letter").candidates(asked) == ["A", "B", "C", "D"]
    assert quality("text").item(asked).guesses == {"longest": {"choice": 2}}
    assert [chosen_letter(text) for text in ("(B) He", "C", "A man", "")] == [1, 2, None, None]


def test_a_written_answer_is_asked_for_without_the_bracket_of_a_letter():
    asked = Asked(name="1", question=QUESTION, options=OPTIONS, answer=OPTIONS[2])
    task = quality("letter", [Document("1", ("A story.",), (asked,))], instruction="Choose.")
    queries: list[str] = []

    class Reader:
        def reset(self) -> None: ...
        def feed(self, chunk: str) -> None: ...
        def answer(self, query: str) -> str:
            queries.append(query)
            return "(C)"

    records = list(answer_documents(task, Reader()))
    assert queries == ["\nChoose." + task.prompt(asked).removesuffix(" (")]
    assert [record["system"] for record in records] == ["longest", "reader"]
    assert [dict(task.score(record)) for record in records] == [{"by letter": 1.0}] * 2


def conversation(sample_id: str = "conv-1") -> dict[str, Any]:
    turns = [
        {"speaker": "Ann", "dia_id": "D1:1", "text": "I moved."},
        {"speaker": "Bob", "dia_id": "D1:2", "text": "Where to?"},
    ]
    photo = {"speaker": "Ann", "dia_id": "D10:1", "text": "Look!", "blip_caption": "a photo of a house"}
    sessions = {
        "session_10_date_time": "9 May",
        "session_10": [photo],
        "session_2_date_time": "8 May",
        "session_2": turns,
    }
    questions = [
        {"question": "What things?", "answer": "a house, a cat", "category": 1, "evidence": []},
        {"question": "When?", "answer": 2022, "category": 2, "evidence": []},
        {"question": "Would she?", "answer": "Likely no; she moved", "category": 3, "evidence": []},
        {"question": "Who moved?", "answer": "Ann", "category": 4, "evidence": []},
        {"question": "When did Bob move?", "adversarial_answer": "8 May", "category": 5, "evidence": []},
    ]
    return {
        "sample_id": sample_id,
        "conversation": {"speaker_a": "Ann", **sessions, "session_11_date_time": "?"},
        "qa": questions,
    }


def test_a_conversation_is_fed_turn_by_turn_in_the_order_of_its_sessions(tmp_path):
    (tmp_path / "locomo.json").write_text(json.dumps([conversation()]), encoding="utf-8")
    (document,) = Locomo.read(tmp_path / "locomo.json")
    expected = (
        "[8 May] Ann: I moved.\n",
        "[8 May] Bob: Where to?\n",
        "[9 May] Ann: Look! [shares a photo of a house]\n",
    )
    assert document.passages == expected
    assert [item.answer for item in document.asked] == ["a house, a cat", "2022", "Likely no", "Ann", REFUSAL]
    categories = ["multi-hop", "temporal", "open-domain", "single-hop", "adversarial"]
    assert [item.category for item in document.asked] == categories
    assert [item.trap for item in document.asked] == ["", "", "", "", "8 May"]


@pytest.mark.parametrize("text", ["[]x", '[{"qa": []}]', '{"a": 1}', '["text"]'])
def test_what_is_not_locomo_is_refused(tmp_path, text):
    (tmp_path / "locomo.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="as in locomo10.json"):
        Locomo.read(tmp_path / "locomo.json")


def test_a_missing_file_is_told(tmp_path):
    for read in (Locomo.read, Quality.read):
        with pytest.raises(ValueError, match="which is no file"):
            read(tmp_path / "nothing.json")
        (tmp_path / "empty.json").write_text("\n")
        with pytest.raises(ValueError, match="is empty"):
            read(tmp_path / "empty.json")


def test_words_are_compared_as_in_squad():
    assert exact_match("The cat.", ["dog", "a  CAT"]) == 1
    assert exact_match("cats", ["cat"]) == 0
    assert f1("the black cat sat", ["a black cat"]) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert f1("cat cat", ["cat"]) == pytest.approx(2 / 3)  # a word counts as often as it stands in both
    assert f1("", ["cat"]) == f1("dog", ["cat"]) == 0
    assert f1("dog", ["cat", "dog"]) == 1


def test_an_adversarial_question_wants_a_refusal_and_no_other_does():
    for text in ("Not mentioned", "There is no information available."):
        assert is_refusal(text)
        assert locomo_f1(text, REFUSAL, "adversarial") == locomo_exact_match(text, REFUSAL, "adversarial") == 1
        assert locomo_f1(text, "8 May", "temporal") == 0
    assert locomo_f1("8 May", REFUSAL, "adversarial") == 0
    assert locomo_f1("in the conversation", REFUSAL, "adversarial") == 0  # words in common are no refusal


def test_multi_hop_answers_are_scored_by_parts():
    assert locomo_f1("a cat, some house", "a house, a cat", "multi-hop") == pytest.approx((2 / 3 + 1) / 2)
    assert locomo_f1("a cat, some house", "a house, a cat", "single-hop") == pytest.approx(2 * 2 / 5)
    assert locomo_exact_match("A house, a cat!", "a house, a cat", "multi-hop") == 1


def test_a_limit_is_spread_over_documents_and_leaves_out_those_without_a_question():
    asked = [tuple(Asked(name=str(n), question="?", answer="!") for n in range(4)) for d in range(5)]
    documents = [Document(str(number), ("text",), own) for number, own in enumerate(asked)]
    chosen = quality("text", documents, limit=3).chosen()
    assert [(document.name, len(own)) for document, own in chosen] == [("0", 1), ("1", 1), ("3", 1)]
    assert [tuple(own) for _, own in quality("text", documents).chosen()] == asked
    alone = quality("text", documents, limit=1).chosen()
    assert [(document.name, len(own)) for document, own in alone] == [("0", 1), ("1", 0)]  # for a wrong memory
