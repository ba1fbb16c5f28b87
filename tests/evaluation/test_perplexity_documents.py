"""Documents in windows: which tokens each system sees, and that what is lost and saved is counted rightly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longmem import MemoryBank
from longmem.evaluation.perplexity import PerplexitySettings
from longmem.evaluation.perplexity.running import memories_of, score_text
from longmem.evaluation.perplexity.scoring import Cut, GrowingMemory, Starts, View, Window, make_views, score_windows
from longmem.evaluation.perplexity.summary import markdown, summarize_texts
from longmem.evaluation.perplexity.texts import Text, TextScores, load_scores, save_scores
from longmem.evaluation.systems import RetrievalSystem

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SYSTEMS = ("backbone", "context-24", "bm25", "hidden", "off", "on", "wrong")


def settings_of(**changes: Any) -> PerplexitySettings:
    own = {
        "data": "none",
        "output": "none",
        "window": 16,
        "stride": 8,
        "windows_per_document": None,
        "systems": SYSTEMS,
    }
    return PerplexitySettings(**{**own, "memory_tokens": None, **changes})


def letters(num_tokens: int, seed: int) -> torch.Tensor:
    """Return letters, in the tiny model's tokens."""
    return torch.randint(64, 90, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def changed(model: Any) -> Any:
    """Return the model with a side network that is no copy of the backbone, so that memory off is something else."""
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.side_network.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


TEXT = Text("text", letters(61, 1), "other", letters(40, 2))
CUT = Cut(16, 8)
WINDOW = Window(start=40, first_scored=48, end=56)


def scores_of(model: Any, text: Text = TEXT, **changes: Any) -> TextScores:
    """Return the scores of all windows of a text."""
    settings = settings_of(**changes)
    (found,) = score_text(model, text, settings, Starts(model, 0)).values()
    return found


def one_window(model: Any, window: Window, **changes: Any) -> dict[str, torch.Tensor]:
    """Return the losses of each system on a window of the text, as if it were the only one."""
    views = views_of(model, TEXT, **changes)
    return {system: score_windows(view, [window]).losses[0] for system, view in views.items()}


def views_of(model: Any, text: Text, **changes: Any) -> dict[str, View]:
    """Return what the systems see of the windows of a text."""
    settings = settings_of(**changes)
    (cut,) = settings.cuts
    memories, _ = memories_of(model, text, settings, Starts(model, 0), cut)
    return make_views(settings.systems, model, text.token_ids, cut, memories)


def bank_of(model: Any, ids: torch.Tensor) -> MemoryBank:
    bank = MemoryBank.for_model(model)
    model.memorize(bank, ids, "text")
    return bank


@torch.no_grad()
def test_a_new_side_network_without_memory_has_the_loss_of_the_backbone(model):
    """Transformers' own loss with `labels` is the reference, the tokens before the scored ones being no targets."""
    scores = scores_of(model, systems=("backbone", "off"))
    assert scores.windows == tuple(CUT.cover(61))
    for number, window in enumerate(scores.windows):
        ids = TEXT.token_ids[None, window.start : window.end]
        labels = ids.clone()
        labels[:, : window.first_scored - window.start] = -100
        expected = model.backbone(ids, labels=labels).loss
        for system, own in scores.systems.items():
            found = own.losses[number].mean()
            torch.testing.assert_close(found, expected, **CLOSE, msg=f"{system}, window {number}")


@torch.no_grad()
def test_each_system_reads_what_its_name_says(model):
    changed(model)
    ids, other = TEXT.token_ids, TEXT.wrong_ids
    right, wrong = bank_of(model, ids[:40]), bank_of(model, other[:40])

    def losses(forward: Any, start: int) -> torch.Tensor:
        logits = forward(ids[None, start:56]).logits[0, -9:-1].float()
        return -logits.log_softmax(-1)[torch.arange(8), ids[48:56]]

    expected = {
        "backbone": losses(model.backbone, 40),
        "context-24": losses(model.backbone, 32),
        "off": losses(model, 40),
        "on": losses(lambda tokens: model(tokens, memory=right), 40),
        "wrong": losses(lambda tokens: model(tokens, memory=wrong), 40),
    }
    found = one_window(model, WINDOW)
    for system, own in expected.items():
        torch.testing.assert_close(found[system], own, **CLOSE, msg=system)
    assert len({tuple(own.tolist()) for own in expected.values()}) == len(expected)


@torch.no_grad()
def test_memory_that_grew_from_window_to_window_is_that_of_all_tokens_before(model):
    changed(model)
    scores = scores_of(model, systems=("on", "wrong"))
    for window, own in zip(scores.windows, scores.by_window(), strict=True):
        alone = one_window(model, window, systems=("on", "wrong"))
        for system in ("on", "wrong"):
            found = own.systems[system].losses[0]
            torch.testing.assert_close(found, alone[system], **CLOSE, msg=f"{system}, {window}")


def test_no_token_is_in_window_and_memory_and_none_is_lost(model):
    """A spy sees what is written; tokens are told apart by their ids, which are all different."""
    text = Text("a", torch.arange(60), "b", torch.arange(100, 160))
    written: dict[int, list[int]] = {}
    memorize = model.memorize

    def spy(bank: MemoryBank, tokens: torch.Tensor, document_id: str, **options: Any) -> int:
        written.setdefault(id(bank), []).extend(tokens.tolist())
        return memorize(bank, tokens, document_id, **options)

    model.memorize = spy
    views = views_of(model, text)
    for window in CUT.cover(60):
        local, tokens = views["on"].of(window)
        in_memory = written[id(local.memory)] if local.memory is not None else []
        assert [*in_memory, *tokens[0].tolist()] == list(range(window.end))
        local, tokens = views["wrong"].of(window)
        in_memory = written[id(local.memory)] if local.memory is not None else []
        assert in_memory == list(range(100, 100 + window.start))  # as many tokens, of the other document
        assert tokens[0].tolist() == list(range(window.start, window.end))


@pytest.mark.parametrize("name", ["bm25", "hidden"])
@torch.no_grad()
def test_passages_replace_the_oldest_half_of_what_stands_before_the_scored_tokens(model, name):
    view = views_of(model, Text("a", torch.arange(60), "b", TEXT.wrong_ids), window=24, stride=8)[name]
    for window in Cut(24, 8).cover(60):
        local, tokens = view.of(window)
        assert local.model is model.backbone
        ids = tokens[0].tolist()
        assert len(set(ids)) == len(ids)
        assert max(ids) == window.end - 1
        assert len(ids) <= 24
        if not window.start:
            assert ids == list(range(window.end))
            continue
        middle = window.first_scored - 8
        pasted, rest = ids[: -(window.end - middle)], ids[-(window.end - middle) :]
        assert rest == list(range(middle, window.end))
        assert len(pasted) == 8  # a passage, of the document before
        assert pasted == sorted(pasted)
        assert max(pasted) < middle


@torch.no_grad()
def test_passages_come_from_as_far_back_as_memory_reaches(model, monkeypatch):
    window, seen = CUT.cover(60)[-1], []
    read = RetrievalSystem.read
    monkeypatch.setattr(RetrievalSystem, "read", lambda self, passages: seen.append(passages) or read(self, passages))
    for far in (None, 16):
        (view,) = make_views(["bm25"], model, torch.arange(60), CUT, {}, memory_tokens=far).values()
        view.of(window)
    (every,), (few,) = seen
    assert every == list(range(window.first_scored))
    assert few == every[window.start - 16 :]


@torch.no_grad()
def test_a_full_memory_holds_the_latest_tokens_whether_it_grew_or_not(model):
    """What would be evicted unread is not encoded; the rest is as if all had been."""
    ids = letters(200, 3)
    grown, jumped = (GrowingMemory(model, ids, capacity_tokens=32) for _ in range(2))
    for place in range(8, 161, 8):
        bank = grown.before(place)
    encoded = []
    memorize = model.memorize
    model.memorize = lambda bank, tokens, *rest, **options: (
        encoded.append(len(tokens)) or memorize(bank, tokens, *rest, **options)
    )
    jumped.before(16)
    other = jumped.before(160)
    assert sum(encoded) == 16 + 32
    queries = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))
    for layer in bank.memory_layers:
        found, expected = (each.search(layer, queries, 8) for each in (bank, other))
        torch.testing.assert_close(found.scores, expected.scores, **CLOSE)
        states, others = (
            each.gather(layer, best.rows[:, 0], best.generation) for each, best in ((bank, found), (other, expected))
        )
        torch.testing.assert_close(states, others, **CLOSE)
    assert bank.num_tokens == 32
    assert torch.equal(bank.token_ids("document"), ids[128:160])
    with pytest.raises(ValueError, match="must not move back"):
        grown.before(8)


def test_capacity_changes_what_is_read(model):
    changed(model)
    every, few = (one_window(model, WINDOW, systems=("off", "on"), memory_tokens=tokens) for tokens in (None, 16))
    assert torch.equal(every["off"], few["off"])
    assert not torch.allclose(every["on"], few["on"])


def assert_equal(found: TextScores, expected: TextScores) -> None:
    for name in ("name", "num_tokens", "windows"):
        assert getattr(found, name) == getattr(expected, name)
    assert torch.equal(found.num_bytes, expected.num_bytes)
    assert all(map(torch.equal, found.distances, expected.distances))
    assert list(found.systems) == list(expected.systems)
    for own, other in zip(found.systems.values(), expected.systems.values(), strict=True):
        assert all(map(torch.equal, own.losses, other.losses))
        assert (own.seconds, own.preparing_seconds) == (other.seconds, other.preparing_seconds)


def test_scores_are_the_same_after_saving(model, tmp_path):
    settings = settings_of(windows_per_document=2)
    scores = score_text(model, TEXT, settings, Starts(model, 0))
    assert scores[CUT].systems["on"].preparing_seconds > 0
    path = tmp_path / "documents" / "a.safetensors"
    save_scores(path, TEXT, scores)
    assert_equal(load_scores(path)[CUT], scores[CUT])
    tensors = load_file(path)
    positions = tensors["16/8/positions"]
    assert torch.equal(tensors["16/8/token_ids"], TEXT.token_ids[positions])
    assert positions.shape == tensors["16/8/on/losses"].shape == tensors["16/8/distances"].shape
    assert positions.tolist() == [n for window in scores[CUT].windows for n in range(window.first_scored, window.end)]


def test_documents_count_the_same_whatever_their_length(model):
    settings = settings_of(systems=("backbone", "off"))
    texts = [TEXT, Text("short", letters(20, 7), "other", TEXT.wrong_ids)]
    short, long = (score_text(model, each, settings, Starts(model, 0)) for each in texts)
    metrics = summarize_texts([short, long], settings)
    means = [each[CUT].systems["backbone"].loss for each in (short, long)]
    part = metrics["parts"]["all documents"]
    assert part["systems"]["backbone"]["perplexity"]["value"] == pytest.approx(math.exp(sum(means) / 2))
    assert part["scored_tokens"] == 60 + 19
    assert part["scored_bytes"] == part["scored_tokens"]  # tokens are bytes
    bits = part["systems"]["backbone"]["bits_per_byte"]["value"]
    assert bits == pytest.approx(sum(means) / 2 / math.log(2))
    assert list(metrics["parts"]) == ["under 5k tokens", "all documents"]
    assert "under 5k tokens: 2 documents, 79 tokens scored" in markdown(metrics)
    assert metrics["distances"] is None  # nothing that looks back
    assert "Nats per token" not in markdown(metrics)
    ends = part["systems"]["backbone"]["perplexity"]["interval"]
    assert ends == pytest.approx(sorted(map(math.exp, means)))  # of two documents
