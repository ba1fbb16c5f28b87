"""The texts that are scored, as token ids, and what the wrong memory of each is."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longmem.data import load_corpus
from longmem.data.sources import unrelated_text
from longmem.evaluation.folder import digest, spread
from longmem.evaluation.perplexity.settings import PerplexitySettings
from longmem.evaluation.systems import tokenize


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokens of a document, or as many of a book as are read; and those of the text whose memory is the wrong one."""

    name: str
    token_ids: Int[Tensor, " tokens"]
    wrong_name: str
    wrong_ids: Int[Tensor, " others"]


def token_digest(token_ids: Int[Tensor, " tokens"]) -> str:
    """Return a hash of token ids."""
    return hashlib.blake2b(token_ids.numpy().tobytes(), digest_size=8).hexdigest()


def read_texts(tokenizer: PreTrainedTokenizerBase, settings: PerplexitySettings) -> list[Text]:
    """Return the texts to score; the wrong memory of each is of the next one, that of the last of the first.

    A single text has `unrelated_text` for it. Documents of less than two tokens are left out. Raises ValueError if there are no
    others, or a book is too short.
    """
    corpus = load_corpus(
        settings.data,
        tokenizer,
        text_column=settings.text_column,
        split=settings.split or ("test" if settings.data.endswith(".json") else "train"),
        max_tokens=settings.max_tokens,
        num_documents=settings.num_documents,
    )
    lengths = np.concatenate([pc.list_value_length(chunk).to_numpy() for chunk in corpus.data["input_ids"].chunks])
    numbers = np.flatnonzero(lengths >= 2)
    if not len(numbers):
        raise ValueError(
            f"`data` must hold a document of two tokens or more, got {len(corpus)} shorter ones in {settings.data!r}; the "
            "first token of a document has nothing before it and is not scored."
        )
    rows = [corpus[int(numbers[place])] for place in spread(len(numbers), settings.limit)]
    texts = [read_part(row["document_id"], row["input_ids"], settings, settings.needed_tokens) for row in rows]
    others = [*texts[1:], texts[0]]
    if len(texts) == 1:
        name, text = unrelated_text(settings.data)
        ids = tokenize(tokenizer, text)
        others = [read_part(name, ids, settings, settings.first_scored)]
    return [Text(*text, *other) for text, other in zip(texts, others, strict=True)]


def read_part(name: str, token_ids: Sequence[int], settings: PerplexitySettings, needed: int) -> tuple[str, Tensor]:
    """Return the name and tokens of a document, or of so much of a book as is needed. Raises ValueError if it has less."""
    if settings.plan == "documents":
        return name, torch.tensor(token_ids)
    if len(token_ids) < needed:
        raise ValueError(
            f"{name} must have {needed:,} tokens, the scored ones and those before them, got {len(token_ids):,}; take a "
            "longer text, or fewer `windows_per_document` or `memory_tokens`."
        )
    return name, torch.tensor(token_ids[:needed])


def digest_of(texts: Sequence[Text]) -> str:
    """Return a hash of what is read."""
    return digest([[each.name, token_digest(each.token_ids), token_digest(each.wrong_ids)] for each in texts])
