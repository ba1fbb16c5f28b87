"""Documents of labelled sentences: each label goes with what it says, and the same seed gives the same documents."""

from __future__ import annotations

import json
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny_backbone

from experiments.demonstrations.demonstrations import DemonstrationMaker, sentences_of, tone_of

LEXICON = {"glad": 3.0, "fine": 2.5, "grim": -3.0, "foul": -2.5, "plain": 0.4}
SCRIPT = Path(__file__).with_name("make_demonstrations.py")
THINGS = "ship money house road kiss grave horse window bank sailor dinner letter"


def story(seed: int, count: int = 1_500) -> str:
    draw, things = random.Random(seed), THINGS.split()
    return " ".join(
        f"{draw.choice(('He', 'She', 'I'))} saw a {draw.choice(sorted(LEXICON))} and {draw.choice(sorted(LEXICON))} "
        f"{draw.choice(things)} by the {draw.choice(things)} number {draw.randrange(999)}{draw.choice('.!?')}"
        for _ in range(count)
    )


def maker(seed: int) -> DemonstrationMaker:
    sentences = {name: sentences_of(story(number)) for number, name in enumerate(("ann radcliffe", "jules verne"))}
    return DemonstrationMaker(
        sentences, {"rust": sentences_of(story(7)), "sql": sentences_of(story(8))}, LEXICON, random.Random(seed)
    )


def test_a_seed_gives_the_same_documents_and_another_seed_others():
    one, same, other = (maker(seed) for seed in (1, 1, 2))
    documents = [one.draw(900) for _ in range(20)]
    assert documents == [same.draw(900) for _ in range(20)]
    assert documents != [other.draw(900) for _ in range(20)]
    assert min(map(len, documents)) >= 900


def test_labels_go_with_what_they_say():
    """All tasks that are about tone, in documents whose labels mean something."""
    one, seen = maker(3), set[str]()
    for _ in range(60):
        document = one.draw(2_000)
        for sentence, label in re.findall(r"(?:Text|Comment|Passage|Sentence): (.+?) \w+: (\w+)[.;\n]", document):
            tone = tone_of(sentence, LEXICON)
            if label in ("positive", "happy", "great", "negative", "sad", "excellent", "awful"):
                assert tone is not None
                assert (tone > 0) is (label in ("positive", "happy", "great", "excellent"))
                seen.add(label)
    assert len(seen) > 4


def test_too_few_sentences_are_said():
    with pytest.raises(ValueError, match="got too few"):
        DemonstrationMaker({"a": ["He left."]}, {"b": ["So."], "c": ["On."]}, LEXICON, random.Random(1)).draw(100)


def test_the_script_writes_a_folder_to_train_on(tmp_path, monkeypatch, capsys):
    for folder, names in (("stories", ("ann-radcliffe", "jules-verne")), ("others", ("rust", "sql"))):
        for number, name in enumerate(names):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.txt").write_text(story(number))
    (tmp_path / "lexicon.txt").write_text("".join(f"{word}\t{score}\t0.5\n" for word, score in LEXICON.items()))
    save_tiny_backbone(tmp_path / "tokenizer")
    places = [tmp_path / name for name in ("stories", "others")]
    options = [
        "--lexicon",
        tmp_path / "lexicon.txt",
        "--output",
        tmp_path / "mix",
        "--tokenizer",
        tmp_path / "tokenizer",
    ]
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), *map(str, [*places, *options, "--documents", "5", "--characters", "600"])]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [json.loads(line) for line in (tmp_path / "mix" / "train.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == ["ann-radcliffe", "jules-verne", *(f"labelled-{n}" for n in range(5))]
    assert "7 documents" in capsys.readouterr().out
