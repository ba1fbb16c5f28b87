"""The plain backbone with a longer window, on the tokens that the systems with memory are scored on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from longmem.evaluation.perplexity import WindowScores, token_losses
from longmem.model.modeling import LongMemForCausalLM


def validate_context(model: LongMemForCausalLM, context: int, window: int) -> None:
    """Raise ValueError unless `context` tokens are more than a window and fit the backbone's positions."""
    if context <= window:
        raise ValueError(
            f"`context` must be longer than the window of {window} tokens, got {context}; "
            "with the window's own tokens it is the system `backbone`."
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise ValueError(
            f"`context` must be at most {limit} tokens, the backbone's `max_position_embeddings`, got {context}: beyond it "
            "the backbone meets positions that it was never trained on; choose a shorter one."
        )


@torch.no_grad()
def score_contexts(
    model: LongMemForCausalLM,
    token_ids: Int[Tensor, " tokens"],
    *,
    ends: Sequence[int],
    context: int,
    scored: int,
    progress: Callable[[int, int], None] | None = None,
) -> WindowScores:
    """Return the backbone's losses of some tokens of a text, when `context` tokens are in its window.

    Each window is read anew, as those of the other systems are; the LM head runs over the scored tokens only.

    Args:
        model: its backbone is run, without side network.
        token_ids: the text from its start.
        ends: where windows end in the text; the last `scored` tokens before each are scored.
        context: tokens the backbone sees at once, those that are scored included.
        scored: tokens scored in each window.
        progress: called with (tokens scored, tokens in all) after every window.

    Raises:
        ValueError: the text has fewer than `context` tokens before an end, or none beside those that are scored.
    """
    if not ends or min(ends) < context or max(ends) > len(token_ids):
        raise ValueError(
            f"`ends` must leave {context} tokens of context before them in a text of {len(token_ids)}, got {list(ends)}; "
            "choose a shorter `context`, or score tokens further on."
        )
    if not 1 <= scored < context:
        raise ValueError(f"`scored` must be from 1 to {context - 1} tokens of each window, got {scored}.")
    losses, seconds = [], 0.0
    for number, end in enumerate(ends, start=1):
        start = time.perf_counter()
        ids = token_ids[None, end - context : end].to(model.input_device)
        losses.append(token_losses(model.backbone(ids, use_cache=False, logits_to_keep=scored + 1).logits, ids))
        seconds += time.perf_counter() - start  # `token_losses` has waited for the device
        if progress is not None:
            progress(number * scored, len(ends) * scored)
    return WindowScores(torch.stack(losses), seconds, len(ends) * scored)
