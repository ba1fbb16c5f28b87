from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_backbone

from longmem.model.opening import open_model


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    return str(save_tiny_backbone(tmp_path / "backbone"))


def test_a_dtype_is_that_of_both_networks(backbone: str, tmp_path: Path) -> None:
    model = open_model(backbone, dtype="bfloat16", segment_length=16)
    assert (model.backbone.dtype, model.side_network.dtype) == (torch.bfloat16, torch.bfloat16)
    mixed = open_model(backbone, dtype="bfloat16", side_network_dtype="float32")
    assert (mixed.backbone.dtype, mixed.side_network.dtype) == (torch.bfloat16, torch.float32)
    mixed.save_pretrained(tmp_path / "saved")
    saved = open_model(str(tmp_path / "saved"))
    assert (saved.backbone.dtype, saved.side_network.dtype) == (torch.float32, torch.float32)
    again = open_model(str(tmp_path / "saved"), dtype="bfloat16")
    assert (again.backbone.dtype, again.side_network.dtype) == (torch.bfloat16, torch.bfloat16)
    ids = torch.arange(1, 12)[None]
    assert again(ids).logits.isfinite().all()
    for name, weight in again.side_network.named_parameters():
        torch.testing.assert_close(weight, saved.side_network.get_parameter(name).to(weight.dtype), rtol=0, atol=0)
