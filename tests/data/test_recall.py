"""Facts hidden in texts, and questions about them."""

import random
import re

import pytest
from tiny_models import save_tiny_backbone, some_text
from transformers import AutoTokenizer

from longmem.data import load_corpus
from longmem.data.recall import FactMaker, LabelledPassages, hide_and_ask, paragraphs

TEXT = "\n\n".join(some_text(200, seed).replace(".", ".\n") for seed in range(60))

NOUNS = ["house", "road", "sea", "lamp"]


@pytest.mark.parametrize("seed", range(20))
def test_every_answer_stands_once_behind_its_cue(seed):
    maker = FactMaker(TEXT, random.Random(seed))
    maker.examples.labels = []  # they have the same cue on purpose
    drawn = [maker.draw() if number % 2 else maker.sentence() for number in range(40)]
    text = "\n".join(facts.text for facts in drawn)
    for question in [question for facts in drawn for question in facts.questions]:
        cue = question.cues[0]
        assert len(re.findall(rf"(?<!\w){re.escape(cue)} {re.escape(question.answer)}(?!\w)", text)) == 1
        assert len(re.findall(rf"(?<!\w){re.escape(cue)} ", text)) == 1


@pytest.mark.parametrize("seed", range(8))
def test_labels_follow_one_rule_that_examples_show(seed):
    speech = "Yes! She went to the old house with a lamp in her hand? He took the road to the sea and never came back again. "
    examples = LabelledPassages(40 * speech + TEXT, NOUNS[:2], NOUNS, random.Random(seed))
    if not examples.labels:
        pytest.skip("the text has one kind of sentence by this rule")
    facts = examples.draw()
    labels = dict[str, str]()
    for line in facts.text.split("\n"):
        passage, label = line.rsplit(": ", 1)
        assert labels.setdefault(passage, label) == label
        assert label in examples.labels
    assert len(facts.text.split("\n")) == 24
    for asked in facts.questions:
        line = f"{asked.ask} {asked.cues[0]}".removesuffix(":")
        assert labels.get(line, asked.answer) == asked.answer


@pytest.mark.parametrize("text", ["", "word", "a\n\nb", TEXT, TEXT.replace("\n", " "), "x" * 9000], ids=len)
def test_nothing_of_the_text_is_lost(text):
    assert "".join(paragraphs(text)) == text
    asked = hide_and_ask(text, 0.3, random.Random(1))
    kept = iter(re.findall(r"\S+", asked))
    assert all(word in kept for word in re.findall(r"\S+", text))  # in this order


def test_questions_take_their_share_and_come_after_their_facts():
    asked = hide_and_ask(4 * TEXT, 0.3, random.Random(4), lambda turns: "".join(f"<{a}|{b}>\n" for a, b in turns))
    assert 0.15 < (len(asked) - 4 * len(TEXT)) / len(asked) < 0.5
    assert "<" in asked
    for found in re.finditer(r"When was (.+?) born\? (\1 .+)", asked):
        assert found[2] in asked[: found.start()]


def test_a_corpus_has_them_where_asked_for_and_is_the_same_again(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_backbone(tmp_path / "backbone"))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    made = [
        load_corpus(tmp_path / "text.txt", tokenizer, cache_dir=tmp_path / name, recall_share=share)[0]["input_ids"]
        for name, share in (("a", 0.0), ("a", 0.3), ("b", 0.3))
    ]
    assert len(made[0]) < len(made[1])
    assert made[1] == made[2]
    with pytest.raises(ValueError, match="`recall_share` must be from 0 to below 1"):
        load_corpus(tmp_path / "text.txt", tokenizer, recall_share=1.0)
