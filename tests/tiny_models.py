"""A tiny random backbone with a tokenizer, in a folder, for what opens models by name."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = tuple("the cat sat on a mat and saw one dog in this old house while rain fell".split())  # noqa: SIM905


def save_tiny_backbone(folder: Path, **changes: int) -> Path:
    """Write a Llama of 4 layers whose tokens are bytes, and return its folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"vocab_size": len(alphabet), "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **tokens, "num_key_value_heads": 2, **changes}))
    with torch.no_grad():  # so small is the random start that attention is near uniform: let mistakes show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def some_text(num_words: int, seed: int = 0) -> str:
    """Return words in random order."""
    picks = torch.randint(len(WORDS), (num_words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[pick] for pick in picks)
