"""The loss of windows: what each system sees of them, what memory holds meanwhile, and what differences are."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longmem.evaluation import Cut, View, Window, bootstrap_interval, loss_difference, make_views, score_windows
from longmem.evaluation.perplexity.scoring import DOCUMENT, GrowingMemory
from longmem.evaluation.systems.making import validate_context
from longmem.memory import MemoryBank

WINDOW = 16
CUT = Cut(WINDOW, WINDOW)
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture
def bank(model, past):
    bank = MemoryBank.for_model(model)
    model.memorize(bank, past, DOCUMENT)
    return bank


@pytest.fixture
def text(past, rest):
    return torch.cat([past, rest])


def assert_same_losses(found, expected, **tolerance):
    assert len(found.losses) == len(expected.losses)
    for own, other in zip(found.losses, expected.losses, strict=True):
        torch.testing.assert_close(own, other, **tolerance)


def largest_difference(found, expected):
    return max((one - two).abs().max() for one, two in zip(found.losses, expected.losses, strict=True))


def test_losses_without_memory_are_those_of_transformers(model, rest):
    scores = score_windows(View(model, rest), CUT.row(0, 5))
    assert [len(window) for window in scores.losses] == [WINDOW - 1] * 5
    assert scores.num_tokens == 75
    assert scores.memory_share is None
    for window, losses in zip(rest[: 5 * WINDOW].view(5, 1, WINDOW), scores.losses, strict=True):
        expected = model.backbone(window, labels=window).loss
        torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(losses.mean(), model(window, labels=window).loss, rtol=1e-6, atol=1e-6)


def test_an_empty_memory_changes_nothing_and_a_full_one_does(model, rest, bank):
    windows = CUT.row(0, 5)
    off = score_windows(View(model, rest), windows, with_reads=True)
    empty = score_windows(View(model, rest, bank.empty_like()), windows, with_reads=True)
    on = score_windows(View(model, rest, bank), windows, with_reads=True)
    assert_same_losses(empty, off, **EXACT)
    assert off.memory_share is empty.memory_share is None
    assert largest_difference(on, off) > 1e-3
    assert on.memory_share.shape == (len(bank.memory_layers), 4)
    assert 0 < on.memory_share.min() <= on.memory_share.max() < 1
    quick = score_windows(View(model, rest, bank), windows)
    assert_same_losses(quick, on, **EXACT)
    assert quick.memory_share is None


@pytest.mark.parametrize("stride", [5, WINDOW - 1])
def test_strided_windows_score_their_last_tokens(model, rest, bank, stride):
    starts = range(0, len(rest) - WINDOW + 1, stride)
    scores = score_windows(View(model, rest, bank), Cut(WINDOW, stride).row(0, len(starts)))
    assert [len(window) for window in scores.losses] == [stride] * len(starts)
    for start, losses in zip(starts, scores.losses, strict=True):
        ids = rest[None, start : start + WINDOW]
        logits = model(ids, memory=bank).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[-stride:]
        torch.testing.assert_close(losses, expected.detach())


@pytest.mark.parametrize("stride", [WINDOW, 4])
def test_a_growing_memory_holds_what_has_left_the_window_and_nothing_else(model, past, rest, bank, stride, monkeypatch):
    held = []
    forward = model.forward

    def spy(ids, **options):
        held.append((ids[0], bank.token_ids(DOCUMENT)))
        return forward(ids, **options)

    monkeypatch.setattr(model, "forward", spy)
    windows = Cut(WINDOW, stride).row(0, 5)
    grown = score_windows(View(model, rest, bank, leaving=stride), windows)
    assert len(held) == 5
    for number, (window, in_memory) in enumerate(held):
        torch.testing.assert_close(torch.cat([in_memory, window]), torch.cat([past, rest])[: len(in_memory) + WINDOW])
        assert len(in_memory) == len(past) + number * stride
    fixed = MemoryBank.for_model(model)
    model.memorize(fixed, past, DOCUMENT)
    unchanged = score_windows(View(model, rest, fixed), windows)
    torch.testing.assert_close(grown.losses[0], unchanged.losses[0], **EXACT)
    assert largest_difference(grown.part(slice(1, None)), unchanged.part(slice(1, None))) > 1e-3


def test_systems_are_compared_on_the_same_tokens(model, rest, past, bank):
    wrong = MemoryBank.for_model(model)
    model.memorize(wrong, past.flip(0), "another")
    seen = []
    systems, windows = ("backbone", "off", "on", "wrong"), CUT.row(0, 5)
    views = make_views(systems, model, rest, CUT, {"on": bank, "wrong": wrong})
    assert tuple(views) == systems
    scores = {name: score_windows(view, windows, progress=seen.append) for name, view in views.items()}
    assert seen == [15] * 20
    # Side layers start as copies of the backbone's, so nothing in memory is the backbone.
    assert_same_losses(scores["off"], scores["backbone"], rtol=1e-4, atol=1e-4)
    assert_same_losses(scores["on"], score_windows(View(model, rest, bank), windows))
    assert largest_difference(scores["on"], scores["wrong"]) > 1e-3
    assert scores["on"].loss == pytest.approx(torch.stack(scores["on"].losses).mean().item())
    assert bank.num_tokens == len(past)  # only a memory that grows does


def test_a_longer_context_is_the_plain_backbone_with_more_tokens_before(model, text):
    ends, context, scored = [80, 90, 147], 40, 7
    windows = [Window(end - WINDOW, end - scored, end) for end in ends]
    (view,) = make_views([f"context-{context}"], model, text, CUT, {}).values()
    found = score_windows(view, windows)
    assert [len(losses) for losses in found.losses] == [scored] * 3
    with torch.no_grad():
        for end, losses in zip(ends, found.losses, strict=True):
            for place, loss in zip(range(end - scored, end), losses, strict=True):  # token by token
                logits = model.backbone(text[None, end - context : place]).logits[0, -1]
                torch.testing.assert_close(loss, -logits.log_softmax(dim=-1)[text[place]])


@pytest.mark.parametrize("stride", [4, WINDOW])
def test_a_context_as_long_as_the_window_is_the_backbone(model, past, text, stride):
    windows = Cut(WINDOW, stride).row(len(past), 4)
    backbone = score_windows(View(model, text, is_plain=True), windows)
    same = score_windows(View(model, text, is_plain=True, context=WINDOW), windows)
    assert_same_losses(same, backbone)
    longer = score_windows(View(model, text, is_plain=True, context=3 * WINDOW), windows)
    assert largest_difference(longer, backbone) > 1e-3


def test_the_last_tokens_of_windows_take_their_part_of_the_time(model, rest):
    scores = dataclasses.replace(score_windows(View(model, rest), CUT.row(0, 5)), preparing_seconds=3.0)
    last = scores.last(5)
    for own, whole in zip(last.losses, scores.losses, strict=True):
        torch.testing.assert_close(own, whole[-5:], **EXACT)
    assert last.seconds / last.num_tokens == pytest.approx(scores.seconds / scores.num_tokens)
    assert last.preparing_seconds == pytest.approx(1.0)
    two = scores.part(slice(2))
    assert_same_losses(two, dataclasses.replace(scores, losses=scores.losses[:2]), **EXACT)
    assert two.seconds == pytest.approx(scores.seconds * 2 / 5)


def test_the_interval_is_that_of_the_mean():
    differences = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 0.5
    low, high = bootstrap_interval(differences)
    error = 1.96 * differences.std().item() / 20
    assert low == pytest.approx(differences.mean().item() - error, abs=0.01)
    assert high == pytest.approx(differences.mean().item() + error, abs=0.01)
    assert bootstrap_interval(differences) == (low, high)
    assert bootstrap_interval(differences, seed=1) != (low, high)


def test_a_lower_loss_is_a_positive_difference(model, rest):
    scores = score_windows(View(model, rest), CUT.row(0, 5))
    worse = dataclasses.replace(scores, losses=tuple(losses + 0.25 for losses in scores.losses))
    assert loss_difference(scores, worse) == pytest.approx((0.25, 0.25, 0.25))


def test_bad_input_is_explained(model, rest, past):
    for window, stride in ((1, 1), (8, 9), (8, 0)):
        with pytest.raises(ValueError, match="`window` of at least 2 tokens and a `stride` from 1 to that"):
            Cut(window, stride)
    with pytest.raises(ValueError, match=r"must end in a text of 83 tokens, got .*end=100"):
        score_windows(View(model, rest), Cut(100, 100).row(0, 1))
    for memory in (None, GrowingMemory(model, past)):
        with pytest.raises(ValueError, match="`leaving` needs a MemoryBank as `memory`, got"):
            View(model, rest, memory, leaving=4)
    limit = model.config.get_text_config().max_position_embeddings
    validate_context(model, limit, WINDOW)
    with pytest.raises(ValueError, match=f"at most {limit} tokens, the backbone's `max_position_embeddings`, got"):
        validate_context(model, limit + 1, WINDOW)
    with pytest.raises(ValueError, match="longer than the window of 16 tokens, got 16"):
        validate_context(model, 16, WINDOW)
