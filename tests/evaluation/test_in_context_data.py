"""Sets as the released script reads them, data sets with columns, passages that never stand on both sides."""

from __future__ import annotations

import json
import random

import datasets
import pytest
from in_context_data import save_sets, save_squad

from longmem.evaluation.tasks.labelled import SETS, Labelled, LabelledSettings
from longmem.evaluation.tasks.squad import Squad, SquadSettings, load_parted, load_passages


def examples_of(name, **values):
    """Return the examples of a set that are shown, and those that are asked."""
    few = {"demonstrations": 1, "memory_demonstrations": 1}
    return Labelled(LabelledSettings(output="x", sets=(name,), **few, **values)).examples[name]


def write_csv(folder, name, lines):
    place = folder / name
    place.mkdir()
    for file in ("train.csv", "test.csv"):
        (place / file).write_bytes("".join(f"{line}\n" for line in lines).encode())


def released_reading(path, strips_quotes):
    """Read as the released script does."""
    with open(path) as file:
        lines = file.readlines()
    texts = [line[2:].strip("\n") for line in lines]
    return [(text.strip('"') if strips_quotes else text, int(line[0])) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.parametrize("name", ["mr", "mpqa", "subj"])
def test_csv_files_are_read_as_released_or_as_csv(tmp_path, name):
    lines = ["1,plain text", '0,"one , two"', '1," "" like this "" , he said"', "0,caf\u00e9"]
    write_csv(tmp_path, name, lines)
    official, evaluated = examples_of(name, data=str(tmp_path))
    assert [tuple(each) for each in official] == released_reading(tmp_path / name / "train.csv", name == "subj")
    assert evaluated == official
    proper, _ = examples_of(name, data=str(tmp_path), official_files=False)
    assert [each.text for each in proper] == ["plain text", "one , two", ' " like this " , he said', "caf\u00e9"]
    assert [each.label for each in proper] == [1, 0, 1, 0]
    assert official[2].text == (' "" like this "" , he said' if name == "subj" else '" "" like this "" , he said"')


def test_the_other_sets_and_their_words(tmp_path):
    save_sets(tmp_path)
    (tmp_path / "SST-2" / "dev.tsv").write_text('sentence\tlabel\na "film" , seen\t1\nlabel me\t0\n')
    (tmp_path / "sst-5" / "stsa.fine.dev").write_text("4 great one\n0 worst , 3 times\n")
    names = ("sst-2", "sst-5", "subj")
    found = {name: examples_of(name, data=str(tmp_path))[1] for name in names}
    assert found["sst-2"] == [('a "film" , seen', 1), ("label me", 0)]
    assert found["sst-5"] == [("great one", 4), ("worst , 3 times", 0)]
    lines = ["".join(SETS[name].shown(found[name][0])) for name in names]
    assert lines[:2] == ['Review: a "film" , seen Sentiment: positive. ', "Review: great one Sentiment: great. "]
    assert lines[2].startswith("Input: ")
    assert lines[2].endswith(" Type: subjective. ")
    for name, line in zip(names, lines, strict=True):  # the question is the released template[:-5]
        released = "Input: {} Type: {}. " if name == "subj" else "Review: {} Sentiment: {}. "
        assert SETS[name].prompt == released[:-5]
        assert line.startswith(SETS[name].prompt.format(found[name][0].text) + " ")
    assert SETS["mr"].prompt.format("{} and {0}") == "Review: {} and {0} Sentiment:"


def test_a_data_set_with_columns(tmp_path):
    rows = {"sentence": ["up", "down"], "label": [1, 0], "word": ["positive", "negative"]}
    both = datasets.DatasetDict({split: datasets.Dataset.from_dict(rows) for split in ("train", "validation")})
    both.save_to_disk(tmp_path / "saved")
    lines = tmp_path / "lines"
    lines.mkdir()
    for split in ("train", "validation"):
        (lines / f"{split}.jsonl").write_text(
            "".join(json.dumps(dict(zip(rows, row, strict=True))) + "\n" for row in zip(*rows.values(), strict=True))
        )
    expected = [("up", 1), ("down", 0)]
    for place in ("saved", "lines"):
        for label in ("label", "word"):
            source = {"path": str(tmp_path / place), "text": "sentence", "label": label}
            assert examples_of("sst-2", sources={"sst-2": source}) == (expected, expected)
    turned = {**source, "label": "label", "labels": ["positive", "negative"]}
    found, _ = examples_of("sst-2", sources={"sst-2": turned})
    assert found == [("up", 0), ("down", 1)]
    for change, message in (
        ({"text": "sentences"}, "Did you mean `sentence`"),
        ({"label": "sentence"}, "must have as its label a number from 0 to 1 or one of negative, positive, got 'up'"),
        ({"split": "dev"}, "split"),
    ):
        for place in ("saved", "lines"):
            changed = {**source, "path": str(tmp_path / place), **change}
            with pytest.raises(ValueError, match=message):
                examples_of("sst-2", sources={"sst-2": changed})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1,fine", "2,what"], r"train.csv, line 2, must have as its label a number from 0 to 1 or .* got '2'"),
        (["1,fine", "", "0,more"], "line 2, must have as its label"),
        ([], "must hold examples, got none"),
    ],
)
def test_wrong_files_are_told(tmp_path, lines, message):
    write_csv(tmp_path, "mr", lines)
    with pytest.raises(ValueError, match=message):
        examples_of("mr", data=str(tmp_path))
    with pytest.raises(ValueError, match="is missing; name the folder"):
        examples_of("mr", data=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sets": ("mr", "mr"), "data": "x"}, "`sets` must be at least one, and none twice"),
        ({"seeds": (), "data": "x"}, "`seeds` must be at least one"),
        ({}, "`data` must name the folder with the files of mr"),
        ({"sources": {"mrr": {}}}, "Did you mean `mr`"),
        ({"sources": {"mr": {"path": "x", "labls": 1}}}, "labls"),
        ({"sources": {"mr": {"path": "x", "labels": ["good", "bad"]}}}, "must be the words negative, positive"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LabelledSettings(output="x", **{"sets": ("mr",), **values})


def squad(data, *, seed=0, **values):
    few = {"demonstrations": 1, "memory_demonstrations": 1}
    return Squad(SquadSettings(**{"output": "x", "data": data, "seed": seed, **few, **values}))


def test_no_passage_is_shown_and_asked(tmp_path):
    path = str(save_squad(tmp_path / "squad.json"))
    shown, asked = load_parted(path, None, seed=0)
    assert {each.article for passage in shown for each in passage}.isdisjoint(
        each.article for passage in asked for each in passage
    )
    assert len(shown) == len(asked) == 8
    assert load_parted(path, None, seed=1) != (shown, asked)
    task = squad(path, demonstrations=2, memory_demonstrations=6)
    assert task.examples["squad"] == (shown, [each for passage in asked for each in passage])
    window, memory, _ = task.draw("squad", 3)
    assert (len(window), len(memory)) == (2, 6)
    contexts = [passage[0].passage for passage in shown]
    used = [context for each in (*window, *memory) for context in contexts if f"Passage: {context}\n" in each.question]
    assert len(set(used)) == len(used) == 8
    assert task.draw("squad", 3)[:2] == (window, memory)
    assert task.draw("squad", 4)[:2] != (window, memory)
    with pytest.raises(ValueError, match="passages to draw from, 0 together"):
        squad(path, demonstrations_data=path)  # all of them are asked
    with pytest.raises(ValueError, match="passages to draw from, 8 together, got 3 and 6"):
        squad(path, demonstrations=3, memory_demonstrations=6)
    with pytest.raises(ValueError, match="`seeds` must be at least one, and none twice"):
        squad(path, seeds=(1, 1))


def test_passages_of_one_article_are_parted_by_passage(tmp_path):
    shown, asked = load_parted(str(save_squad(tmp_path / "squad.json", articles=1, paragraphs=6)), None, seed=0)
    assert {each[0].passage for each in shown}.isdisjoint({each[0].passage for each in asked})
    assert len(shown) == len(asked) == 3


def test_prompts_of_passages_and_the_same_from_columns(tmp_path):
    path = save_squad(tmp_path / "squad.json")
    passages = load_passages(str(path))
    first = passages[0][0]
    query = first.prompt
    assert first.shown == (query, " " + first.answers[0] + "\n\n")
    assert query == f"Passage: {first.passage}\nQuestion: {first.question}\nAnswer:"
    assert "\n" not in first.passage
    articles = json.loads(path.read_text())["data"]
    rows = [
        {
            "title": article["title"],
            "context": paragraph["context"],
            "id": asked["id"],
            "question": asked["question"],
            "answers": {"text": [each["text"] for each in asked["answers"]], "answer_start": [0]},
        }
        for article in articles
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]
    datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    assert load_passages(f"{tmp_path / 'saved'}:validation") == passages


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "must be in the format of SQuAD"),
        ('{"data": [{"paragraphs": [{"context": "a"}]}]}', "must be in the format of SQuAD"),
        ('{"data": []}', "must hold passages"),
        (
            '{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": "7", "question": "b", "answers": []}]}]}]}',
            "an answer to every question, as SQuAD v1.1 has, got none for '7'",
        ),
    ],
)
def test_wrong_passages_are_told(tmp_path, content, message):
    path = tmp_path / "squad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_passages(str(path))
    with pytest.raises(ValueError, match="is no file"):
        load_passages(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"name:split as in rajpurkar/squad:validation, got 'squad'"):
        load_passages("squad")


def test_half_of_the_articles_are_drawn_by_their_own_generator(tmp_path):
    path = str(save_squad(tmp_path / "squad.json"))
    random.seed(5)
    state = random.getstate()
    load_parted(path, None, seed=0)
    assert random.getstate() == state
