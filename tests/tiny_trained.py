"""A stand-in for the trained side network that comes with the package: tiny, random, under the packaged name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_backbone

from longmem import LongMemForCausalLM
from longmem.backbone import loading
from longmem.model import names

NAME = "smollm2-135m"


def save_tiny_trained(folder: Path, monkeypatch: pytest.MonkeyPatch, **config_fields: Any) -> LongMemForCausalLM:
    """Return a changed model whose backbone bears the packaged name, saved where the package keeps its trained ones.

    Until the test is over, the packaged name opens the tiny backbone, and the package's own files are out of sight.
    """
    backbone = str(save_tiny_backbone(folder / "backbone"))
    monkeypatch.setattr(loading, "resolve_backbone", lambda name: backbone if name == NAME else name)
    monkeypatch.setattr(names, "TRAINED_FOLDER", folder / "trained")
    fields = {"segment_length": 16, "num_retrieved_tokens": 8, "lora": {"rank": 2}, **config_fields}
    model = LongMemForCausalLM.from_backbone(NAME, **fields).eval()
    with torch.no_grad():
        for weight in model.side_network.trained_parameters().values():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder / "trained" / NAME, dtype=torch.bfloat16)
    return model
