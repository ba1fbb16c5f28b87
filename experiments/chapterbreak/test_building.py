"""Examples from books: where they are cut, what is drawn, what is left out."""

from __future__ import annotations

import random
import re

import pytest

from experiments.chapterbreak.building import (
    BuildRules,
    Chapter,
    build,
    chapters_of,
    context_of,
    entries_of,
    save_split,
    suffix_of,
)
from longmem.evaluation.tasks.chapterbreak import load_split

RULES = BuildRules(
    context_words=40, slack_words=10, suffix_words=10, shortest_suffix=7, longest_suffix=13, negatives=2, boundaries=3
)


def book(chapters: int, seed: int = 0, heading: str = "CHAPTER {}\n\nA TITLE") -> str:
    """Return a book whose every word is another; chapters have 4 paragraphs of two sentences of 6 words."""
    generator = random.Random(seed)
    parts = ["Front matter that is no chapter."]
    for number in range(chapters):
        parts.append(heading.format(number))
        for paragraph in range(4):
            words = [f"w{number}-{paragraph}-{place}-{generator.randrange(100)}" for place in range(12)]
            words[5] += "."
            words[11] += '."'
            parts.append(" ".join(words))
    return "\n\n".join(parts)


def test_entries_keep_the_rules():
    text = book(9)
    entries = entries_of(text, RULES, random.Random(0))
    assert len(entries) == 3
    bodies = [text[c.body : c.end] for c in chapters_of(text, RULES.chapter)]
    beginnings = [" ".join(body.split()[:12]) for body in bodies]  # two sentences: nearer to 10 words than 1
    positions = []
    for entry in entries:
        position = beginnings.index(entry["pos"])
        positions.append(position)
        assert 30 <= len(entry["ctx"].split()) <= 40
        assert text.count(entry["ctx"]) == 1
        before = text[: text.index(entry["ctx"])]
        assert before.endswith("\n\n")  # a paragraph begins
        between = text[text.index(entry["ctx"]) + len(entry["ctx"]) : text.index(entry["pos"])]
        assert between.split() == ["CHAPTER", str(position), "A", "TITLE"]
        later = [beginnings.index(negative) for negative in entry["negs"]]
        assert len(set(later)) == 2
        assert min(later) > position
    assert positions == sorted(positions)
    assert set(positions) <= set(range(1, 7))  # 40 words before, two chapters after
    assert entries == entries_of(text, RULES, random.Random(0))
    assert any(entries != entries_of(text, RULES, random.Random(seed)) for seed in range(1, 5))


def cut(words: list[str], rules: BuildRules = RULES) -> int | None:
    text = " ".join(words)
    suffix = suffix_of(text, Chapter(0, 0, len(text)), rules)
    return None if suffix is None else len(suffix.split())


def test_a_suffix_ends_with_a_sentence_near_its_length():
    plain = ["word"] * 30
    for ends, count in (([8, 11], 11), ([8, 12], 8), ([6, 14], 10), ([], 10), ([7], 7), ([13], 13), ([9, 30], 9)):
        words = [f"{word}." if place in ends else word for place, word in enumerate(plain, start=1)]
        assert cut(words) == count, ends
    assert cut([*plain[:9], "Mr.", *plain]) == 10  # as without any end
    assert cut([*plain[:7], "Mr.", *plain]) == 10
    assert cut([*plain[:7], 'end?"', *plain]) == 8
    assert cut(plain[:9]) is None
    assert cut(plain[:10]) == 10


@pytest.mark.parametrize(
    ("joints", "begins"),
    [
        ({}, 10),  # neither paragraph nor sentence: exactly the words asked for
        ({12: "\n\n"}, 12),
        ({11: ". ", 15: "\n\n"}, 15),
        ({11: ". ", 13: ". "}, 11),
        ({11: ". ", 25: "\n\n"}, 11),  # too far
        ({5: "\n\n", 20: "\n\n"}, 20),
    ],
)
def test_a_context_begins_with_a_paragraph_or_a_sentence(joints, begins):
    text = "".join(joints.get(place, " ") + f"w{place}" for place in range(50))
    words = list(re.finditer(r"\S+", text))
    assert (context_of(text, words, RULES) or "").startswith(f"w{begins}")
    assert context_of(text, words[:39], RULES) is None
    assert (context_of(text, words[:40], RULES) or "").startswith("w0")


def test_headings_and_titles_are_no_text():
    text = 'x\nCHAPTER I\n\nIN WHICH NOTHING\nHAPPENS\n\n"NO!"\n\nHe left.\nChapter and verse\nCHAPTERS\n\nCHAPTER II\nHere.'
    found = [text[c.body : c.end].strip() for c in chapters_of(text, BuildRules().chapter)]
    assert found == ['"NO!"\n\nHe left.\nChapter and verse\nCHAPTERS', "Here."]


def test_books_are_built_on_their_own_and_read_back(tmp_path):
    for seed, name in enumerate("abc"):
        (tmp_path / f"{name}.txt").write_text(book(8, seed) if name != "b" else "No chapters here.", encoding="utf-8")
    files = sorted(tmp_path.glob("*.txt"))
    works = build(files, RULES)
    assert list(works) == ["a", "c"]
    assert build(files[2:], RULES) == {"c": works["c"]}
    for name in ("x.json", "new/x.json.gz"):
        save_split(tmp_path / name, "mine", works)
        split = load_split(str(tmp_path / name))
        assert split.name == "mine"
        assert [e.suffixes[0] for e in split.examples] == [e["pos"] for own in works.values() for e in own]
    with pytest.raises(ValueError, match="see `chapter`"):
        build(files[1:2], RULES)
    with pytest.raises(ValueError, match="each of another name"):
        build([*files, files[0]], RULES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shortest_suffix": 200}, "ascending order"),
        ({"slack_words": 6000}, "`slack_words` must be less"),
        ({"negatives": 0}, "at least 1"),
        ({"chapter": "("}, "regular expression"),
    ],
)
def test_wrong_rules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BuildRules(**changes)
