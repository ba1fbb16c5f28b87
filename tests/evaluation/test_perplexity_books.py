"""Books: every cut as if it were run by hand, stopped runs that go on, folders of other runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from longmem.evaluation.folder import RunFolder, describe
from longmem.evaluation.perplexity import PerplexitySettings, running, scoring
from longmem.evaluation.perplexity.running import evaluate_texts, score_text
from longmem.evaluation.perplexity.scoring import DOCUMENT, Cut, Starts, View, make_views, score_windows
from longmem.evaluation.perplexity.texts import Text, TextScores, digest_of, load_scores, save_scores
from longmem.memory import MemoryBank

CUTS = (Cut(16, 16), Cut(32, 16))
SYSTEMS = ("backbone", "off", "on", "wrong")
SETTINGS = PerplexitySettings(
    data="none",
    output="none",
    plan="books",
    systems=(*SYSTEMS, "context-40"),
    window=16,
    stride=16,
    other_cuts=("32/16",),
    memory_tokens=48,
    windows_per_document=3,
    context_windows=2,
)
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture
def texts() -> list[Text]:
    return [book(name, seed, (seed + 1) % 3) for seed, name in enumerate("abc")]


def book(name: str, seed: int, wrong: int) -> Text:
    ids = [
        torch.randint(0, 256, (SETTINGS.needed_tokens,), generator=torch.Generator().manual_seed(each))
        for each in (seed, wrong)
    ]
    return Text(name, ids[0], "abc"[wrong], ids[1])


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


def score(model: Any, text: Text, settings: PerplexitySettings = SETTINGS) -> dict[Cut, TextScores]:
    starts = Starts(model, max(map(settings.memorized, settings.cuts)))
    return score_text(model, text, settings, starts)


def run_all(
    model: Any, texts: list[Text], folder: Path, console: Console, settings: PerplexitySettings = SETTINGS
) -> dict[str, dict[Cut, TextScores]]:
    with RunFolder(folder, describe(settings, model, {"documents": digest_of(texts)})) as run:
        found = evaluate_texts(model, texts, settings, run, console)
    return {each.name: scores for each, scores in zip(texts, found, strict=True)}


def assert_same_losses(found: dict[Cut, TextScores], expected: dict[Cut, TextScores]) -> None:
    assert list(found) == list(expected)
    for cut in expected:
        assert list(found[cut].systems) == list(expected[cut].systems)
        for name, own in expected[cut].systems.items():
            assert_same_tensors(found[cut].systems[name].losses, own.losses)


def assert_same_tensors(found: Any, expected: Any, **tolerance: Any) -> None:
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, **(tolerance or EXACT))


@pytest.mark.parametrize("grow", [False, True])
def test_a_book_is_scored_as_if_each_cut_were_run_by_hand(model, texts, grow):
    settings = dataclasses.replace(SETTINGS, grow=grow)
    found = score(model, texts[0], settings)
    for cut in CUTS:
        start, ids = settings.memorized(cut), texts[0].token_ids
        banks = [MemoryBank.for_model(model) for _ in range(2)]
        for bank, own in zip(banks, (ids, texts[0].wrong_ids), strict=True):
            model.memorize(bank, own[:start], DOCUMENT)
        memories = {"on": banks[0], "wrong": banks[1]}
        views = make_views(SYSTEMS, model, ids[start:], cut, memories, is_growing=grow)
        group = found[cut].systems
        assert tuple(group) == settings.systems
        for name, view in views.items():
            assert_same_tensors(group[name].losses, score_windows(view, cut.row(0, 3)).losses)
        assert banks[0].num_tokens == start + 3 * 16 * grow
        long = score_windows(View(model, ids, is_plain=True, context=40), cut.row(start, 2))
        assert_same_tensors(group["context-40"].losses, long.losses, rtol=1e-5, atol=1e-5)
        assert group["context-40"].num_tokens == 2 * cut.scored


def test_all_systems_score_the_same_tokens(model, texts, monkeypatch):
    """With a model that gives token t the loss t, losses are the tokens that were scored."""
    monkeypatch.setattr(scoring, "token_losses", scored_ids)
    for cut, own in score(model, texts[0]).items():
        starts = [SETTINGS.first_scored + number * 16 + 16 - cut.scored for number in range(3)]
        expected = [texts[0].token_ids[start : start + cut.scored] for start in starts]
        for system, scores in own.systems.items():
            losses = [each.long() for each in scores.losses]
            assert len(losses) == (2 if system.startswith("context") else 3)
            assert_same_tensors(losses, expected[: len(losses)])
        assert [window.num_scored for window in own.windows] == [cut.scored] * 3


def scored_ids(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return token_ids[0, token_ids.shape[1] - logits.shape[1] + 1 :].float()


def test_each_book_is_encoded_once_and_longer_contexts_are_run_once(model, texts, monkeypatch):
    encoded, seen = [], []
    memorize, run = model.memorize, running.score_windows
    monkeypatch.setattr(
        model, "memorize", lambda *given, **options: encoded.append(count := memorize(*given, **options)) or count
    )
    monkeypatch.setattr(
        running, "score_windows", lambda view, *rest, **options: seen.append(view) or run(view, *rest, **options)
    )
    starts = Starts(model, max(map(SETTINGS.memorized, CUTS)))
    for text in texts:
        score_text(model, text, SETTINGS, starts)
    whole = [count.num_encoded for count in encoded if count.num_encoded]
    # Books a, b and c, and a again, whose memory was not kept: it is the wrong one of the last.
    assert whole == [64, 64, 64, 64]
    assert len(encoded) == 4 + 3 * 2 * 2  # and two copies for each cut of each book
    assert len([view for view in seen if view.context == 40]) == 3
    assert len(seen) == 3 * (2 * 4 + 1)


def test_a_memory_that_is_handed_out_may_grow(model, texts):
    starts = Starts(model, 64)
    one, seconds = starts.bank(texts[0].token_ids, 48)
    more, _ = starts.bank(texts[0].token_ids, 64)
    states = [torch.zeros(2, 16, 8)] * len(one.memory_layers)
    one.append(DOCUMENT, states, states, token_ids=texts[1].token_ids[:16])
    again, _ = starts.bank(texts[0].token_ids, 48)
    assert [bank.num_tokens for bank in (one, more, again)] == [64, 64, 48]
    assert torch.equal(more.token_ids(DOCUMENT), texts[0].token_ids[:64])
    assert seconds > 0


def test_a_stopped_run_goes_on_to_the_same_numbers(model, texts, tmp_path, quiet, monkeypatch):
    expected = run_all(model, texts, tmp_path / "one go", quiet)
    original, scored = running.score_text, []

    def interrupted(model: Any, text: Text, *rest: Any) -> Any:
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(text.name)
        return original(model, text, *rest)

    monkeypatch.setattr(running, "score_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all(model, texts, tmp_path / "stopped", quiet)
    files = [file.name for file in sorted((tmp_path / "stopped" / "documents").iterdir())]
    assert files == ["00000-a.safetensors", "00001-b.safetensors"]
    monkeypatch.setattr(
        running, "score_text", lambda model, text, *rest: scored.append(text.name) or original(model, text, *rest)
    )
    for _ in range(2):
        found = run_all(model, texts, tmp_path / "stopped", quiet)
        assert scored == ["a", "b", "c"]
        for name in expected:
            assert_same_losses(found[name], expected[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("windows", r"settings.windows_per_document = 3 and not 2"),
        ("text", r"data.documents = "),
        ("weights", r"side_network = "),
    ],
)
def test_a_folder_of_another_run_is_refused(model, texts, tmp_path, quiet, change, message):
    run_all(model, texts[:1], tmp_path, quiet)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    settings = dataclasses.replace(SETTINGS, windows_per_document=2) if change == "windows" else SETTINGS
    if change == "text":
        texts[0] = dataclasses.replace(texts[0], wrong_ids=texts[0].wrong_ids.flip(0))
    if change == "weights":
        with torch.no_grad():
            next(model.side_network.parameters()).add_(1)
    with pytest.raises(ValueError, match=f"(?s){message}.*Name another folder"):
        run_all(model, texts[:1], tmp_path, quiet, settings)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("context_windows", [1, 3])
def test_a_saved_book_is_the_book(model, texts, tmp_path, context_windows):
    settings = dataclasses.replace(SETTINGS, context_windows=context_windows)
    found = score(model, texts[0], settings)
    path = tmp_path / "documents" / "a.safetensors"
    save_scores(path, texts[0], found)
    loaded = load_scores(path)
    assert_same_losses(loaded, found)
    for cut, each in found.items():
        own, kept = (scores.systems["on"] for scores in (each, loaded[cut]))
        assert kept.preparing_seconds == own.preparing_seconds > 0
        assert (kept.seconds, kept.num_tokens) == (own.seconds, own.num_tokens)
        torch.testing.assert_close(kept.memory_share, own.memory_share, **EXACT)
        assert loaded[cut].windows == each.windows
    assert [file.name for file in (tmp_path / "documents").iterdir()] == ["a.safetensors"]


def test_what_is_scored_is_counted_to_the_end(model, texts, tmp_path, monkeypatch, capsys):
    told = []
    original = running.counting

    def counting(report: Any, total: int) -> Any:
        return original(lambda done, of: told.append((done, of)) or report(done, of), total)

    monkeypatch.setattr(running, "counting", counting)
    console = Console(width=100, highlight=False)
    run_all(model, texts, tmp_path, console)
    # Four systems on three windows of each cut, and the longer context on two windows for both.
    total = 3 * (4 * 3 * (15 + 16) + 2 * 16)
    assert told[0][1] == total
    assert told[-1] == (total, total)
    assert f"{total:,}/{total:,} tokens" in capsys.readouterr().out
    run_all(model, texts, tmp_path, console)
    assert capsys.readouterr().out == ""  # all books are finished
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"]["other_cuts"] == ["32/16"]
