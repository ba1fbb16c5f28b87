from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from rich.console import Console

from longmem.evaluation import books as books_module
from longmem.evaluation import compare_systems, score_windows
from longmem.evaluation.book_files import load_book, save_book
from longmem.evaluation.book_plan import Book, BookPlan, Cut
from longmem.evaluation.books import evaluate_books, score_book
from longmem.evaluation.contexts import score_contexts
from longmem.memory import MemoryBank

CUTS = (Cut(16, 16), Cut(32, 16))
PLAN = BookPlan(cuts=CUTS, memory_tokens=48, windows=3, contexts=(40,), context_windows=2)
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture
def texts() -> list[Book]:
    generator = torch.Generator().manual_seed(5)
    return [Book(name, torch.randint(0, 256, (PLAN.num_tokens,), generator=generator)) for name in ("a", "b", "c")]


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


def run_all(model: Any, texts: list[Book], folder: Any, console: Console, plan: BookPlan = PLAN) -> dict[str, Any]:
    return dict(evaluate_books(model, texts, [*texts[1:], texts[0]], plan, folder, console))


def assert_same_losses(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert {cut: list(group) for cut, group in found[name].cuts.items()} == {
            cut: list(group) for cut, group in expected[name].cuts.items()
        }
        for cut, group in expected[name].cuts.items():
            for system, scores in group.items():
                torch.testing.assert_close(found[name].cuts[cut][system].losses, scores.losses, **EXACT)


@pytest.mark.parametrize("grow", [False, True])
def test_a_book_is_scored_as_if_each_cut_were_run_by_hand(model, texts, grow):
    plan = dataclasses.replace(PLAN, grow=grow)
    found = score_book(model, texts[0], texts[1], plan)
    for cut in CUTS:
        start = plan.memorized(cut)
        banks = [MemoryBank.for_model(model) for _ in range(2)]
        for bank, text in zip(banks, texts, strict=False):
            model.memorize(bank, text.token_ids[:start], text.name)
        expected = compare_systems(
            model,
            texts[0].token_ids[start:],
            memory=banks[0],
            wrong_memory=banks[1],
            window=cut.window,
            stride=cut.stride,
            grow="a" if grow else None,
        )
        group = found.cuts[str(cut)]
        assert list(group) == plan.systems
        for system, scores in expected.items():
            torch.testing.assert_close(group[system].losses, scores.losses, **EXACT)
        for context in plan.contexts:
            long = score_contexts(model, texts[0].token_ids, ends=plan.ends(16), context=context, scored=cut.scored)
            torch.testing.assert_close(group[f"context-{context}"].losses, long.losses)
            assert group[f"context-{context}"].num_tokens == 2 * cut.scored


def test_all_systems_score_the_same_tokens(model, texts, monkeypatch):
    """With a model that gives token t the loss t, losses are the tokens that were scored."""
    monkeypatch.setattr("longmem.evaluation.perplexity.token_losses", scored_ids)
    monkeypatch.setattr("longmem.evaluation.contexts.token_losses", scored_ids)
    found = score_book(model, texts[0], texts[1], PLAN)
    for cut in CUTS:
        group = found.cuts[str(cut)]
        starts = [PLAN.first_scored + number * 16 + 16 - cut.scored for number in range(3)]
        expected = torch.stack([texts[0].token_ids[start : start + cut.scored] for start in starts])
        for system, scores in group.items():
            torch.testing.assert_close(scores.losses.long(), expected[: len(scores.losses)], msg=f"{cut} {system}")
            assert len(scores.losses) == (2 if system.startswith("context") else 3)


def scored_ids(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return token_ids[0, token_ids.shape[1] - logits.shape[1] + 1 :].float()


def test_a_stopped_run_goes_on_to_the_same_numbers(model, texts, tmp_path, quiet, monkeypatch):
    expected = run_all(model, texts, tmp_path / "one go", quiet)
    stopped = tmp_path / "stopped"
    for name, _ in evaluate_books(model, texts, [*texts[1:], texts[0]], PLAN, stopped, quiet):
        if name == "b":
            break
    assert sorted(file.name for file in (stopped / "books").iterdir()) == ["a.safetensors", "b.safetensors"]
    scored = []
    original = books_module.score_book
    monkeypatch.setattr(
        books_module, "score_book", lambda model, book, *rest: scored.append(book.name) or original(model, book, *rest)
    )
    found = run_all(model, texts, stopped, quiet)
    assert set(scored) == {"c"}
    assert_same_losses(found, expected)
    assert_same_losses(run_all(model, texts, stopped, quiet), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("windows", r"plan.windows = 3 and not 2"),
        ("text", r"books.b.tokens = "),
        ("weights", r"side_network = "),
    ],
)
def test_a_folder_of_another_run_is_refused(model, texts, tmp_path, quiet, change, message):
    next(evaluate_books(model, texts, [*texts[1:], texts[0]], PLAN, tmp_path, quiet))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    plan = dataclasses.replace(PLAN, windows=2) if change == "windows" else PLAN
    if change == "text":
        texts[1] = Book("b", texts[1].token_ids.flip(0))
    if change == "weights":
        with torch.no_grad():
            next(model.side_network.parameters()).add_(1)
    with pytest.raises(ValueError, match=f"(?s){message}.*Name another folder"):
        run_all(model, texts, tmp_path, quiet, plan)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_context_beyond_the_backbone_is_refused_before_any_work(model, texts, tmp_path, quiet):
    model.config.get_text_config().max_position_embeddings = 39
    with pytest.raises(ValueError, match="at most 39 tokens"):
        run_all(model, texts, tmp_path / "new", quiet)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("context_windows", [1, 3])
def test_a_saved_book_is_the_book(model, texts, tmp_path, context_windows):
    plan = dataclasses.replace(PLAN, context_windows=context_windows)
    book = score_book(model, texts[0], texts[1], plan)
    save_book(tmp_path / "books" / "a.safetensors", book)
    loaded = load_book(tmp_path / "books" / "a.safetensors", plan)
    assert_same_losses({"a": loaded}, {"a": book})
    assert loaded.encoding_seconds == book.encoding_seconds > 0
    own, kept = book.cuts["32/16"]["on"], loaded.cuts["32/16"]["on"]
    assert (kept.seconds, kept.num_tokens) == (own.seconds, own.num_tokens)
    torch.testing.assert_close(kept.memory_share, own.memory_share, **EXACT)
    assert [file.name for file in (tmp_path / "books").iterdir()] == ["a.safetensors"]


def test_the_last_tokens_of_windows_take_their_part_of_the_time(model, rest):
    scores = score_windows(model, rest, window=16)
    last = scores.last(5)
    torch.testing.assert_close(last.losses, scores.losses[:, -5:], **EXACT)
    assert last.tokens_per_second == pytest.approx(scores.tokens_per_second)


def test_the_time_is_said_at_the_start(model, texts, tmp_path, capsys):
    console = Console(width=100, highlight=False)
    run_all(model, texts, tmp_path, console)
    assert re.match(r"3 of 3 books to score: about \d+\.\d minutes\n", capsys.readouterr().out)
    run_all(model, texts, tmp_path, console)
    assert "books to score" not in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["plan"]["cuts"] == ["16/16", "32/16"]
    assert config["books"]["a"]["wrong"] == "b"
