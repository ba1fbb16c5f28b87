"""Tiny LongMem models, and copies of them whose encoder has moved."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from tiny_models import save_tiny_backbone

from longmem.model.modeling import LongMemForCausalLM


def tiny_longmem(folder: Path, *, num_key_value_heads: int = 2, **settings: int) -> LongMemForCausalLM:
    """Return a new model on a tiny backbone that is written to `folder`; its windows have 32 tokens."""
    options = {"segment_length": 32, "num_retrieved_tokens": 16} | settings
    return LongMemForCausalLM.from_backbone(
        str(save_tiny_backbone(folder, num_key_value_heads=num_key_value_heads)), **options
    ).eval()


@torch.no_grad()
def changed(model: LongMemForCausalLM, share: float, seed: int = 0) -> LongMemForCausalLM:
    """Return a copy whose backbone has noise on it, `share` of the spread of each weight."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in twin.backbone.parameters():
        if parameter.ndim > 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * share)
    return twin
