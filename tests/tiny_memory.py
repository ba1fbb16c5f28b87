"""Fixtures: a tiny random model with a tokenizer, a text, and a memory of what stands before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_backbone

from longmem import LongMemForCausalLM, MemoryBank


@pytest.fixture
def model(tmp_path: Path) -> LongMemForCausalLM:
    backbone = save_tiny_backbone(tmp_path / "backbone")
    return LongMemForCausalLM.from_backbone(str(backbone), segment_length=16, num_retrieved_tokens=8).eval()


@pytest.fixture
def past() -> torch.Tensor:
    return torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def rest() -> torch.Tensor:
    return torch.randint(0, 256, (83,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def bank(model: LongMemForCausalLM, past: torch.Tensor) -> MemoryBank:
    bank = MemoryBank.for_model(model)
    model.memorize(bank, past, "past")
    return bank
