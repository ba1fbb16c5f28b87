"""How a stream chooses its next token: transformers' own `generate`, for one token at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from longmem.errors import did_you_mean

# Fields of transformers' generation configuration that say how one token is chosen.
CHOICE = (
    *("do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "sequence_bias"),
    *("renormalize_logits", "remove_invalid_values", "eos_token_id", "pad_token_id"),
)


def one_token_config(defaults: GenerationConfig, options: dict[str, Any]) -> GenerationConfig:
    """Return the generation configuration for one token: the model's defaults, with the caller's options instead.

    Raises:
        ValueError: an option says something else than how one token is chosen.
    """
    for name in options:
        if name not in CHOICE:
            raise ValueError(
                f"`{name}` has no meaning for a stream, whose tokens come one at a time.{did_you_mean(name, CHOICE)} "
                f"Options: {', '.join(CHOICE)}."
            )
    given = {name: value for name in CHOICE if (value := getattr(defaults, name, None)) is not None}
    return GenerationConfig(**{**given, **options}, max_new_tokens=1, return_dict_in_generate=True)


def end_tokens(config: GenerationConfig) -> set[int]:
    """Return the ids that end a text."""
    ends: Any = config.eos_token_id
    if isinstance(ends, Tensor):
        ends = ends.flatten().tolist()
    return set(ends) if isinstance(ends, Iterable) else set() if ends is None else {ends}
