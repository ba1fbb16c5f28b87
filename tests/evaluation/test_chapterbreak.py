"""Suffix identification: joins and cuts, what each system sees, what counts as right."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import some_text

from longmem.evaluation.runner import evaluate, wrong_cases
from longmem.evaluation.summary import summarize
from longmem.evaluation.systems import Banks
from longmem.evaluation.tables import tables_of
from longmem.evaluation.task import best
from longmem.evaluation.tasks.chapterbreak import (
    ChapterBreak,
    ChapterBreakSettings,
    Encoder,
    Example,
    Split,
    baseline_values,
    credit,
    views,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
WINDOW, SUFFIX, LOCAL = 32, 8, 22  # two tokens are the joiner's


def examples(counts: dict[str, int], words: int = 30) -> list[Example]:
    """Return examples with contexts and suffixes of random words."""
    return [
        Example(work, n, some_text(words, 100 * w + n), tuple(some_text(6, 1000 * w + 10 * n + s) for s in range(6)))
        for w, (work, count) in enumerate(counts.items())
        for n in range(count)
    ]


def settings_for(tmp_path: Path, **changes: Any) -> ChapterBreakSettings:
    own = {
        "window": WINDOW,
        "suffix_tokens": SUFFIX,
        "contexts": (16, 60),
        "systems": ("backbone", "off", "on", "wrong"),
    }
    return ChapterBreakSettings(output=str(tmp_path / "run"), data="-", **{**own, **changes})


def run(settings: ChapterBreakSettings, model: Any, split: Split, task: type = ChapterBreak) -> list[dict[str, Any]]:
    evaluate(task(settings, split), Console(file=io.StringIO()), model)
    return [json.loads(line) for line in (Path(settings.output) / "predictions.jsonl").read_text().splitlines()]


# Joins and cuts ---------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of characters in which a run of line ends is one token before anything but a letter."""

    def __init__(self, merges: bool = True) -> None:
        self.merges = merges

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        ids: list[int] = []
        for place, letter in enumerate(text):
            after = text[place + 1 : place + 2]
            if self.merges and letter == "\n" and ids and ids[-1] == 10 and not after.isalpha():
                ids[-1] = 1010
            else:
                ids.append(ord(letter))
        return {"input_ids": ids}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join("\n\n" if i == 1010 else chr(i) for i in ids)


def example(context: str, *suffixes: str) -> Example:
    return Example("a", 0, context, suffixes)


def test_the_joiner_has_the_tokens_that_it_has_before_a_word():
    tokenizer = Letters()
    assert tokenizer("\n\n")["input_ids"] == [1010]
    encoder = Encoder(tokenizer, "\n\n", 4)
    question = encoder.item(example("The end. \n", "\n\nAfterwards", "Two", "1801"))
    assert list(question.token_ids) == [10, 10]
    # Whitespace where they meet is the joiner's; a suffix before which the joiner is another token has its own tokens.
    assert question.candidates == [[ord(x) for x in text] for text in ("Afte", "Two", "1801")]
    assert encoder.context(example("The end. \n", "A", "B")) == [ord(x) for x in "The end."]
    assert encoder.room == 6


def test_a_joiner_that_is_part_of_the_first_token_is_scored(model):
    """With a blank between them the first word has its usual token, with the blank in it."""

    class Words:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [hash(word) for word in text.replace(" ", "| ").split("|") if word]}

        def decode(self, ids: list[int], **_: Any) -> str:
            return " The"

    question = Encoder(Words(), " ", 4).item(example("The end", "so it goes", "no"))
    assert list(question.token_ids) == []
    assert question.candidates[1] == [hash(" no")]
    assert Encoder(model.tokenizer, "", 4).joiner_ids == []


def test_views_say_what_each_system_uses():
    names = ("backbone", "context-40", "off", "on")
    assert views(names, (60, 16, 30), window=WINDOW, room=10) == {
        16: {"backbone": 16, "off": 16},
        30: {"backbone": 22, "context-40": 30, "off": 22, "on": 30},
        60: {"backbone": 22, "context-40": 30, "off": 22, "on": 60},
    }
    assert views(("backbone",), (16,), window=WINDOW, room=10) == {16: {"backbone": 16}}
    with pytest.raises(ValueError, match="for on to use anything else"):
        views(("backbone", "on"), (16, 22), window=WINDOW, room=10)
    with pytest.raises(ValueError, match="`window` must hold joiner"):
        views(("backbone",), (16,), window=10, room=10)


# What is asked ------------------------------------------------------------------------------------------------------------


def loglikelihood(forward: Any, context: list[int], candidate: list[int]) -> torch.Tensor:
    logits = forward(torch.tensor([[*context, *candidate]])).logits[0, len(context) - 1 : -1].float()
    return logits.log_softmax(-1)[torch.arange(len(candidate)), torch.tensor(candidate)].sum()


@torch.no_grad()
def test_records_are_the_likelihoods_of_a_plain_forward(model, tmp_path):
    from longmem import MemoryBank

    for weight in model.side_network.parameters():  # so that memory off is not the backbone
        weight.add_(torch.randn_like(weight) * 0.1)
    split = Split("test", examples({"a": 1, "b": 1}))
    found = {record["id"]: record for record in run(settings_for(tmp_path), model, split)}
    ids = [model.tokenizer(e.context)["input_ids"] for e in split.examples]
    texts = split.examples[0].suffixes
    suffixes = [model.tokenizer("\n\n" + text)["input_ids"][: 2 + SUFFIX] for text in texts]
    banks = []
    for context in ids:
        banks.append(MemoryBank.for_model(model))
        model.memorize(banks[-1], torch.tensor(context[-60:-LOCAL]), "text")
    forwards = {
        "16/16/backbone": (model.backbone, 16),
        "60/22/backbone": (model.backbone, 22),
        "16/16/off": (model, 16),
        "60/22/off": (model, 22),
        "60/60/on": (lambda tokens: model(tokens, memory=banks[0]), 22),
        "60/60/wrong": (lambda tokens: model(tokens, memory=banks[1]), 22),
    }
    own = {name for name in found if name.startswith("a/0/") and "values" not in found[name]}
    assert own == {f"a/0/{name}" for name in forwards}
    for name, (forward, size) in forwards.items():
        record = found[f"a/0/{name}"]
        sums = [loglikelihood(forward, [*ids[0][-size:], *each[:2]], each[2:]) for each in suffixes]
        torch.testing.assert_close(torch.tensor(record["logprobs"]), torch.stack(sums), **CLOSE, msg=name)
        assert record["tokens"] == [SUFFIX] * 6
        assert record["seconds"] > 0
    assert found["a/0/16/16/backbone"]["context"] == [16]
    assert found["a/0/60/60/on"]["context"] == [60]
    assert {name for name in found if "values" in found[name] and name.startswith("a/0")} == {
        f"a/0/{name}" for name in ChapterBreak.baselines
    }


def test_what_uses_the_same_tokens_is_asked_once(model, tmp_path):
    settings = settings_for(tmp_path, contexts=(16, 40, 60), systems=("backbone", "context-48", "on"))
    found = run(settings, model, Split("test", examples({"a": 1, "b": 1})))
    own = {record["id"]: record["context"] for record in found if "a/0" in record["id"] and "values" not in record}
    assert own == {
        "a/0/16/16/backbone": [16],
        "a/0/40+60/22/backbone": [40, 60],
        "a/0/40+60/38/context-48": [40, 60],
        "a/0/40/40/on": [40],
        "a/0/60/60/on": [60],
    }


def test_a_length_that_no_context_has_is_told(model, tmp_path):
    task = ChapterBreak(settings_for(tmp_path, contexts=(60, 5000)), Split("", examples({"a": 1, "b": 1})))
    console = Console(file=io.StringIO(), width=200)
    metrics = evaluate(task, console, model).metrics
    longest = max(len(example.context) for example in task.examples)  # a byte is a token
    assert metrics["notes"] == [f"The longest context has {longest:,} tokens; that is what is told at [5000]."]
    assert metrics["notes"][0] in console.file.getvalue()  # type: ignore[attr-defined]
    assert metrics["notes"][0] in (tmp_path / "run" / "table.md").read_text()
    task = ChapterBreak(settings_for(tmp_path, contexts=(60,)), task.split)
    task.cases(model)
    assert task.notes == []


def test_each_context_is_encoded_once(model, tmp_path):
    banks: list[Banks] = []

    class Watched(ChapterBreak):
        def banks(self, model: Any) -> Banks:
            banks.append(super().banks(model))
            return banks[-1]

    split = Split("test", examples({"a": 2, "b": 2, "c": 2}))
    settings = settings_for(tmp_path, contexts=(60,), systems=("on", "wrong"))
    records = [record for record in run(settings, model, split, Watched) if "values" not in record]
    assert len(records) == 12
    total = (6 + 1) * (60 - LOCAL)  # the first is the wrong one of the last as well
    assert banks[0].encoded_tokens == sum(record["encoded_tokens"] for record in records) == total


def test_the_wrong_memory_is_of_another_work_that_has_one(model, tmp_path):
    def wrong(own: list[Example]) -> dict[str, str]:
        task = ChapterBreak(settings_for(tmp_path, systems=("on", "wrong")), Split("", own))
        return {name: other.subject for name, other in wrong_cases(task, task.cases(model)).items() if other}

    own = [*examples({"a": 2, "short": 1}), examples({"c": 1})[0]._replace(work="c")]
    own[2] = own[2]._replace(context="too short")
    found = wrong(own)
    expected = {"a/0": "c/0", "short/0": "c/0", "c/0": "a/1", "a/1": "c/0"}
    assert found == {f"{name}/60/60": other for name, other in expected.items()}
    with pytest.raises(ValueError, match="must leave out `wrong`"):
        wrong(examples({"a": 2}))


# What counts as right -------------------------------------------------------------------------------------------------------


def test_ties_do_not_favour_the_right_suffix():
    assert [credit(each) for each in ([0.0, -1.0], [-1.0, 0.0], [2.0, 2.0, 1.0], [0.0] * 6)] == [1, 0, 0.5, 1 / 6]
    assert credit([1.0, 2.0, 2.0]) == 0
    assert best([-1.0, -1.0]) == 0  # what would have counted a tie as right
    with pytest.raises(ValueError, match="must be finite"):
        credit([math.nan, 1.0])


def record(system: str, work: str, sums: list[float], tokens: list[int], contexts: list[int]) -> Any:
    own = {"id": "", "case": work, "item": f"{work}/0", "group": work, "system": system, "context": contexts}
    return {**own, "logprobs": sums, "tokens": tokens, "seconds": 2.0}


def test_accuracies_by_hand(tmp_path):
    """Per token the right one of two is best in both works, summed in none, for it is longer."""
    task = ChapterBreak(settings_for(tmp_path, systems=("backbone", "on")), Split("", examples({"a": 1, "b": 1})))
    records = [
        record("backbone", "b", [-4.0, -3.0], [4, 2], [16, 60]),
        record("backbone", "a", [-4.0, -3.0], [4, 2], [16, 60]),
        record("on", "a", [-1.0, -3.0], [4, 2], [60]),
        record("on", "b", [-3.0, -3.0], [2, 2], [60]),
    ]
    for work in "ab":
        for name, values in (("bag-of-words", [1, 0]), ("bag-of-words-near", [0, 1]), ("longest", [1, 1])):
            own = {"case": work, "item": f"{work}/0", "group": work, "system": name, "context": [16, 60]}
            records.append({**own, "values": values})
    metrics = summarize(task, records)
    measures = metrics["measures"]
    found = {
        (length, scoring, name): own["value"]
        for scoring in ("per_token", "sum")
        for length, comparison in measures[scoring]["cells"].items()
        for name, own in comparison["systems"].items()
    }
    assert found == {
        **{(c, s, "backbone"): 100 * (s == "per_token") for c in ("16", "60") for s in ("per_token", "sum")},
        ("60", "per_token", "on"): 75,
        ("60", "sum", "on"): 75,
        **{
            (c, s, name): value
            for c in ("16", "60")
            for s in ("per_token", "sum")
            for name, value in (("bag-of-words", 100), ("bag-of-words-near", 0), ("longest", 50))
        },
    }
    assert metrics["summary"]["chance"] == 50
    assert metrics["summary"]["systems"]["on"]["value"] == 75
    own = measures["per_token"]["cells"]["60"]["systems"]["on"]
    assert own["above_baseline"] == -25
    assert own["interval"] == [50, 100]  # over works, of which one is right and one half right
    # Per token, the right suffix is above the other by 0.5 in both works; with memory by 1.25 and by 0.
    margins = measures["margin"]["cells"]["60"]
    assert margins["baseline"] == "backbone"  # there is no `off`
    assert set(margins["systems"]) == {"backbone", "on"}
    assert (margins["systems"]["backbone"]["value"], margins["systems"]["backbone"]["interval"]) == (0.5, [0.5, 0.5])
    assert margins["systems"]["on"]["value"] == 0.625
    assert margins["systems"]["on"]["above_baseline"] == 0.125
    assert margins["systems"]["on"]["above_baseline_interval"] == [-0.5, 0.75]
    tables = dict(tables_of(metrics))
    accuracies = next(rows for heading, rows in tables.items() if heading.startswith("accuracy, per token"))
    assert [[row[0], *row[1:]] for row in accuracies[1:3]] == [
        ["backbone, same window", "100.0 (100.0 to 100.0)", "100.0 (100.0 to 100.0)"],
        ["LongMem, memory on", "", "75.0 (50.0 to 100.0)"],
    ]
    assert [row[0] for row in accuracies[3:]] == list(ChapterBreak.baselines.values())
    shown = [rows for heading, rows in tables.items() if heading.startswith("margin")]
    assert [rows[-1][-1] for rows in shown] == ["0.625 (0.000 to 1.250)", "+0.125 (-0.500 to +0.750)"]


def test_words_are_weighted_by_their_rarity():
    contexts = ("The cat, the", "the dog", "the cat")
    own = [Example("a", n, context, ("Dog dog dog cat", "the cat")) for n, context in enumerate(contexts)]
    found = [values["bag-of-words"] for _, values in baseline_values(own, own)]
    dog, cat = math.log(3), math.log(3 / 2)
    assert found == [[cat / 4, cat / 2], [dog / 4, 0], [cat / 4, cat / 2]]


def test_baselines_see_the_whole_context_or_its_end():
    filler = "and " * 1000
    own = [
        Example("a", 0, f"Emma left. {filler} John came.", ("Said Emma", "Said John", "Said some other person")),
        Example("b", 0, "Said nobody", ("Some", "thing")),
    ]
    found = {example.work: values for example, values in baseline_values(own, own)}
    assert found["a"] == {
        "bag-of-words": [math.log(2) / 2, math.log(2) / 2, 0],
        "bag-of-words-near": [0, math.log(2) / 2, 0],
        "longest": [2, 2, 4],
    }
    assert credit(found["a"]["bag-of-words"]) == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": ()}, "at least one, and none twice"),
        ({"contexts": (16, 16)}, "none twice"),
        ({"suffix_tokens": WINDOW}, "`suffix_tokens` must be less"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings_for(tmp_path, **changes)
