"""What is known of a token beside its loss: how far back the same few tokens stood, and how many bytes of text it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longmem.evaluation.perplexity.windows import Window

# Of what lies before the window: each group ends with so many tokens.
UP_TO = {"up to 2k": 2_048, "2k to 8k": 8_192, "8k to 32k": 32_768, "32k to 65k": 65_536, "beyond": None}
DISTANCES = ("in the window", *UP_TO, "never before")
# Tokens as they are: nothing that looks like mark-up is left out, and no blank before a comma.
VERBATIM: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def last_distances(token_ids: Int[Tensor, " tokens"], ngram: int) -> Int[Tensor, " tokens"]:
    """Return for each token how many tokens before it the same `ngram` tokens, itself the last of them, last ended.

    0 where they did not stand there before, as for the first tokens, which end none.

    >>> last_distances(torch.tensor([7, 8, 9, 7, 8, 7, 8]), 2).tolist()
    [0, 0, 0, 0, 3, 0, 2]
    """
    ids = token_ids.numpy().astype(np.int64)
    found = np.zeros(len(ids), dtype=np.int64)
    if len(ids) < ngram:
        return torch.from_numpy(found)
    # The number of an n-gram among all there are: no hash, so that different ones are never taken for the same.
    _, names = np.unique(ids, return_inverse=True)
    kinds, grams = int(names.max()) + 1, names
    for _ in range(ngram - 1):
        _, grams = np.unique(grams[:-1] * kinds + names[-len(grams) + 1 :], return_inverse=True)
    order = np.argsort(grams, kind="stable")
    same = grams[order][1:] == grams[order][:-1]
    found[order[1:][same] + ngram - 1] = (order[1:] - order[:-1])[same]
    return torch.from_numpy(found)


def distance_groups(
    distances: Int[Tensor, " scored"], positions: Int[Tensor, " scored"], starts: Int[Tensor, " scored"], ngram: int
) -> Int[Tensor, " scored"]:
    """Return for each scored token the number of its group in `DISTANCES`.

    What stands wholly in the window is "in the window"; what reaches over its start is not. `positions` are those of the tokens
    in their text, `starts` those of the windows that they were scored in.
    """
    ends = torch.tensor([end for end in UP_TO.values() if end is not None])
    groups = 1 + torch.searchsorted(ends, distances)
    groups[positions - distances - (ngram - 1) >= starts] = DISTANCES.index("in the window")
    groups[distances == 0] = DISTANCES.index("never before")
    return groups


def bits_per_byte(nats: Float[Tensor, " texts"], num_bytes: Int[Tensor, " texts"]) -> Float[Tensor, " texts"]:
    """Return bits per UTF-8 byte of texts whose tokens have these losses in all."""
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
    char_ends = np.maximum.accumulate([end for _, end in encoded["offset_mapping"]])  # of tokens that share a character
    return torch.from_numpy(bytes_before[char_ends])
