"""A tiny model, a text, and a memory of what stands before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_backbone

WINDOW = 16


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone")))


@pytest.fixture(scope="module")  # some modules have a backbone of their own
def make_model(backbone_folder: str) -> Callable[[], Any]:
    from longmem import LongMemForCausalLM

    options = {"segment_length": WINDOW, "num_retrieved_tokens": 8}
    return lambda: LongMemForCausalLM.from_backbone(backbone_folder, **options).eval()


@pytest.fixture
def model(make_model: Callable[[], Any]) -> Any:
    return make_model()


@pytest.fixture
def past() -> torch.Tensor:
    return torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def rest() -> torch.Tensor:
    return torch.randint(0, 256, (5 * WINDOW + 3,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def bank(model: Any, past: torch.Tensor) -> Any:
    from longmem import MemoryBank

    bank = MemoryBank.for_model(model)
    model.memorize(bank, past, "past")
    return bank
