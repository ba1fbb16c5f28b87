from __future__ import annotations

import pytest
import torch

from longmem.evaluation import score_windows
from longmem.evaluation.contexts import score_contexts, validate_context

WINDOW = 16


@pytest.fixture
def text(past, rest):
    return torch.cat([past, rest])


def test_a_longer_context_is_the_plain_backbone_with_more_tokens_before(model, text):
    ends, context, scored = [80, 90, 147], 40, 7
    found = score_contexts(model, text, ends=ends, context=context, scored=scored)
    assert found.losses.shape == (3, scored)
    assert found.num_tokens == 21
    with torch.no_grad():
        for end, losses in zip(ends, found.losses, strict=True):
            for place, loss in zip(range(end - scored, end), losses, strict=True):  # token by token
                logits = model.backbone(text[None, end - context : place]).logits[0, -1]
                torch.testing.assert_close(loss, -logits.log_softmax(dim=-1)[text[place]])


@pytest.mark.parametrize("stride", [4, WINDOW])
def test_a_context_as_long_as_the_window_is_the_backbone(model, past, rest, text, stride):
    backbone = score_windows(model, rest, window=WINDOW, stride=stride, backbone_only=True)
    ends = [len(past) + WINDOW + number * stride for number in range(len(backbone.losses))]
    scored = backbone.losses.shape[1]
    same = score_contexts(model, text, ends=ends, context=WINDOW, scored=scored)
    torch.testing.assert_close(same.losses, backbone.losses)
    longer = score_contexts(model, text, ends=ends, context=3 * WINDOW, scored=scored)
    assert (longer.losses - backbone.losses).abs().max() > 1e-3


def test_bad_contexts_are_explained(model, text):
    limit = model.config.get_text_config().max_position_embeddings
    validate_context(model, limit, WINDOW)
    with pytest.raises(ValueError, match=f"at most {limit} tokens, the backbone's `max_position_embeddings`, got"):
        validate_context(model, limit + 1, WINDOW)
    with pytest.raises(ValueError, match="longer than the window of 16 tokens, got 16"):
        validate_context(model, 16, WINDOW)
    with pytest.raises(ValueError, match="leave 40 tokens of context before them"):
        score_contexts(model, text, ends=[39], context=40, scored=4)
    with pytest.raises(ValueError, match="`scored` must be from 1 to 39"):
        score_contexts(model, text, ends=[40], context=40, scored=40)
