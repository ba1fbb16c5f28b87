from __future__ import annotations

import dataclasses

import pytest
import torch

from longmem.evaluation import bootstrap_interval, compare_systems, loss_difference, pooled, score_windows
from longmem.memory import MemoryBank

WINDOW = 16
EXACT = {"rtol": 0, "atol": 0}


def test_losses_without_memory_are_those_of_transformers(model, rest):
    scores = score_windows(model, rest, window=WINDOW)
    assert scores.losses.shape == (5, WINDOW - 1)
    assert scores.memory_share is None
    for window, losses in zip(rest[: 5 * WINDOW].view(5, 1, WINDOW), scores.losses, strict=True):
        expected = model.backbone(window, labels=window).loss
        torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(losses.mean(), model(window, labels=window).loss, rtol=1e-6, atol=1e-6)


def test_an_empty_memory_changes_nothing_and_a_full_one_does(model, rest, bank):
    off = score_windows(model, rest, window=WINDOW)
    empty = score_windows(model, rest, window=WINDOW, memory=bank.empty_like())
    on = score_windows(model, rest, window=WINDOW, memory=bank)
    torch.testing.assert_close(empty.losses, off.losses, **EXACT)
    assert (on.losses - off.losses).abs().max() > 1e-3
    assert on.memory_share.shape == (len(bank.memory_layers), 4)
    assert 0 < on.memory_share.min() <= on.memory_share.max() < 1


@pytest.mark.parametrize("stride", [5, WINDOW - 1])
def test_strided_windows_score_their_last_tokens(model, rest, bank, stride):
    scores = score_windows(model, rest, window=WINDOW, stride=stride, memory=bank)
    starts = range(0, len(rest) - WINDOW + 1, stride)
    assert scores.losses.shape == (len(starts), stride)
    for start, losses in zip(starts, scores.losses, strict=True):
        ids = rest[None, start : start + WINDOW]
        logits = model(ids, memory=bank).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[-stride:]
        torch.testing.assert_close(losses, expected.detach())


@pytest.mark.parametrize("stride", [None, 4])
def test_a_growing_memory_holds_what_has_left_the_window_and_nothing_else(model, past, rest, bank, stride, monkeypatch):
    held = []
    forward = model.forward

    def spy(ids, **options):
        held.append((ids[0], bank.token_ids("past")))
        return forward(ids, **options)

    monkeypatch.setattr(model, "forward", spy)
    grown = score_windows(model, rest, window=WINDOW, stride=stride, memory=bank, grow="past")
    assert len(held) > 3
    for number, (window, in_memory) in enumerate(held):
        torch.testing.assert_close(torch.cat([in_memory, window]), torch.cat([past, rest])[: len(in_memory) + WINDOW])
        assert len(in_memory) == len(past) + number * (stride or WINDOW)
    fixed = MemoryBank.for_model(model)
    model.memorize(fixed, past, "past")
    unchanged = score_windows(model, rest, window=WINDOW, stride=stride, memory=fixed)
    torch.testing.assert_close(grown.losses[0], unchanged.losses[0], **EXACT)
    assert (grown.losses[1:] - unchanged.losses[1:]).abs().max() > 1e-3


def test_systems_are_compared_on_the_same_tokens(model, rest, past, bank):
    wrong = MemoryBank.for_model(model)
    model.memorize(wrong, past.flip(0), "another")
    seen = []
    scores = compare_systems(
        model, rest, memory=bank, wrong_memory=wrong, window=WINDOW, progress=lambda *report: seen.append(report)
    )
    assert list(scores) == ["backbone", "off", "on", "wrong"]
    assert seen[4] == ("backbone", 75, 75)
    assert len(seen) == 20
    # Side layers start as copies of the backbone's, so nothing in memory is the backbone.
    torch.testing.assert_close(scores["off"].losses, scores["backbone"].losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores["on"].losses, score_windows(model, rest, window=WINDOW, memory=bank).losses)
    assert not torch.equal(scores["on"].losses, scores["wrong"].losses)
    assert scores["on"].perplexity == pytest.approx(torch.exp(scores["on"].losses.mean()).item())
    assert scores["on"].tokens_per_second == pytest.approx(75 / scores["on"].seconds)


def test_the_interval_is_that_of_the_mean():
    differences = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 0.5
    low, high = bootstrap_interval(differences)
    error = 1.96 * differences.std().item() / 20
    assert low == pytest.approx(differences.mean().item() - error, abs=0.01)
    assert high == pytest.approx(differences.mean().item() + error, abs=0.01)
    assert bootstrap_interval(differences) == (low, high)
    assert bootstrap_interval(differences, seed=1) != (low, high)


def test_a_lower_loss_is_a_positive_difference(model, rest, bank):
    scores = score_windows(model, rest, window=WINDOW)
    worse = dataclasses.replace(scores, losses=scores.losses + 0.25)
    assert loss_difference(scores, worse) == pytest.approx((0.25, 0.25, 0.25))


def test_texts_count_the_same_whatever_their_length(model, rest):
    scores = score_windows(model, rest, window=WINDOW)
    lower = dataclasses.replace(scores, losses=scores.losses[:2] - 1.0, num_tokens=30)
    total = pooled([{"off": scores}, {"off": lower}])["off"]
    assert total.loss == pytest.approx((scores.loss + lower.loss) / 2)
    assert total.tokens_per_second == pytest.approx(105 / (2 * scores.seconds))
    assert pooled([{"off": scores}]) == {"off": scores}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "`window` must be at least 2"),
        ({"window": 8, "stride": 9}, "`stride` from 1 to `window`"),
        ({"window": 8, "stride": 0}, "`stride` from 1 to `window`"),
        ({"window": 100}, "must fill a window of 100 tokens, got 83"),
        ({"window": 8, "grow": "past"}, "`grow` needs a MemoryBank"),
    ],
)
def test_bad_input_is_explained(model, rest, options, message):
    with pytest.raises(ValueError, match=message):
        score_windows(model, rest, **options)
