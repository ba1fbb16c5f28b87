"""The documents that are scored, as token ids, and which group of lengths each belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longmem.data import load_corpus
from longmem.data.sample_texts import python_manual
from longmem.evaluation.book_plan import files_of_split, token_digest
from longmem.evaluation.documents.settings import PerplexitySettings
from longmem.evaluation.runs import digest, spread

# The groups of the paper's table, and documents that are shorter than its shortest; each ends before so many tokens.
LENGTHS = {
    "under 5k tokens": 5_000,
    "5k to 10k": 10_000,
    "10k to 100k": 100_000,
    "100k to 500k": 500_000,
    "500k to 1M": 1_000_000,
    "over 1M": None,
}


@dataclasses.dataclass(frozen=True)
class Text:
    """A document's tokens."""

    document_id: str
    token_ids: Int[Tensor, " tokens"]

    @property
    def digest(self) -> str:
        """Return a hash of the tokens."""
        return token_digest(self.token_ids)


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """A document, and the one whose memory is the wrong one for it."""

    text: Text
    wrong: Text


def length_group(num_tokens: int) -> str:
    """Return the group of documents of this length.

    >>> [length_group(count) for count in (4_999, 5_000, 2_000_000)]
    ['under 5k tokens', '5k to 10k', 'over 1M']
    """
    return next(name for name, end in LENGTHS.items() if end is None or num_tokens < end)


def read_texts(tokenizer: PreTrainedTokenizerBase, settings: PerplexitySettings) -> list[ScoredText]:
    """Return the documents to score, of two tokens or more; the wrong memory of each is of the next one.

    That of the last is of the first, and of a single document Python's manual.

    Raises:
        ValueError: there are none.
    """
    corpus = load_documents(tokenizer, settings)
    lengths = np.concatenate([pc.list_value_length(chunk).to_numpy() for chunk in corpus.data["input_ids"].chunks])
    numbers = np.flatnonzero(lengths >= 2)
    if not len(numbers):
        raise ValueError(
            f"`data` must hold a document of two tokens or more, got {len(corpus)} shorter ones in {settings.data!r}; the "
            "first token of a document has nothing before it and is not scored."
        )
    texts = []
    for place in spread(len(numbers), settings.limit):
        row = corpus[int(numbers[place])]
        texts.append(Text(row["document_id"], torch.tensor(row["input_ids"])))
    others = [*texts[1:], texts[0] if len(texts) > 1 else manual(tokenizer)]
    return [ScoredText(text, other) for text, other in zip(texts, others, strict=True)]


def load_documents(tokenizer: PreTrainedTokenizerBase, settings: PerplexitySettings) -> Dataset:
    """Return what `data` names, as `load_corpus` does."""
    if Path(settings.data).suffix != ".json":
        return load_corpus(
            settings.data,
            tokenizer,
            text_column=settings.text_column,
            split=settings.split or "train",
            max_tokens=settings.max_tokens,
            num_documents=settings.num_documents,
        )
    corpora, left = [], settings.max_tokens
    for file in files_of_split(settings.data, settings.split or "test")[: settings.num_documents]:
        corpora.append(load_corpus(file, tokenizer, max_tokens=left))
        if left is not None:
            left -= sum(len(ids) for ids in corpora[-1]["input_ids"])
            if left <= 0:
                break
    return concatenate_datasets(corpora)


def manual(tokenizer: PreTrainedTokenizerBase) -> Text:
    """Return Python's manual, for a memory that is wrong whatever is read."""
    ids = tokenizer(python_manual(), add_special_tokens=False, verbose=False)["input_ids"]
    return Text("Python's manual", torch.tensor(ids))


def digest_of(texts: Sequence[ScoredText]) -> str:
    """Return a hash of what is read."""
    return digest([[each.text.document_id, each.text.digest, each.wrong.digest] for each in texts])
