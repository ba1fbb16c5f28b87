"""Tiny random models: one per kind of decoder that the capture has been proven on."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_memory
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
NO_TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": dict(SMALL, num_key_value_heads=2),
    "gpt2": dict(vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=1024),
    "gpt_neox": dict(SMALL, max_position_embeddings=1024),
    "qwen3": dict(SMALL, num_key_value_heads=2, head_dim=16),
    "gemma2": dict(SMALL, num_key_value_heads=2, head_dim=16, sliding_window=8),
    "newgpt": dict(SMALL),
}
SETTINGS = dict(segment_length=32, num_retrieved_tokens=16, memory_distance=8)


def build_backbone(model_type: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    options = {**BACKBONES[model_type], **NO_TOKENS, **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).eval()
    # Random initialisation is so small that attention is near uniform; larger weights let every mistake show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


@pytest.fixture(params=sorted(BACKBONES))
def backbone(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_backbone(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return build_backbone("llama")


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def document() -> torch.Tensor:
    return torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(6))


# A model with a tokenizer, a text, and a memory of what stands before it.
bank, model, past, rest = tiny_memory.bank, tiny_memory.model, tiny_memory.past, tiny_memory.rest
