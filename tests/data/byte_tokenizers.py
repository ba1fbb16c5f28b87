"""A tokenizer whose tokens are bytes, and which counts the texts it is given."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class CountingTokenizer(PreTrainedTokenizerFast):
    num_texts = 0

    def __call__(self, text: list[str], **options: Any) -> Any:
        self.num_texts += len(text)
        return super().__call__(text, **options)


def byte_tokenizer(last_token: int = 255) -> CountingTokenizer:
    """Return a tokenizer of bytes; a byte that is greater than `last_token` has no token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: last_token + 1]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return CountingTokenizer(tokenizer_object=tokenizer)
