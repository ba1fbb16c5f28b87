"""How many bytes of text stand behind tokens, so that models with different tokenizers can be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longmem.evaluation.documents.windows import Window

# Tokens as they are: nothing that looks like mark-up is left out, and no blank before a comma.
VERBATIM: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Return bits per UTF-8 byte of text whose tokens have these losses in all."""
    return nats / math.log(2) / num_bytes


def scored_bytes(
    tokenizer: PreTrainedTokenizerBase, token_ids: Int[Tensor, " tokens"], windows: Sequence[Window]
) -> Int[Tensor, " windows"]:
    """Return the UTF-8 bytes of the text of each window's scored tokens.

    The text is what the tokenizer makes of the whole document's ids. A character that several tokens share counts with the
    first of them. Where the tokenizer does not say which characters belong to a token, or makes other tokens of its own
    text (as of a document that was cut in the middle of a word), the scored tokens of a window are decoded by themselves.
    """
    ends = byte_ends(tokenizer, token_ids)
    if ends is not None:
        return torch.stack([ends[window.end - 1] - ends[window.first_scored - 1] for window in windows])
    spans = [token_ids[window.first_scored : window.end].tolist() for window in windows]
    return torch.tensor([len(str(tokenizer.decode(span, **VERBATIM)).encode()) for span in spans])


def byte_ends(tokenizer: PreTrainedTokenizerBase, token_ids: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"] | None:
    """Return the byte after each token in the text of all of them; None where the tokenizer cannot say."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    text = str(tokenizer.decode(token_ids.tolist(), **VERBATIM))
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    if encoded["input_ids"] != token_ids.tolist():
        return None
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(sizes)])
    char_ends = np.maximum.accumulate(
        [end for _, end in encoded["offset_mapping"]]
    )  # tokens that share one end with it
    return torch.from_numpy(bytes_before[char_ends])
