"""Opening a model by one name, whatever the name is of: a backbone, or a side network that was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longmem.modeling import LongMemForCausalLM


def is_saved_model(name: str) -> bool:
    """Return whether a folder holds a side network that `save_pretrained` wrote."""
    config = Path(name) / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "longmem"


def open_model(
    name: str, *, backbone_options: dict[str, Any] | None = None, **config_fields: Any
) -> LongMemForCausalLM:
    """Return a saved LongMem model, or a new side network, with these settings, on any other causal LM; in eval mode.

    `backbone_options`: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, ...).

    Raises:
        ValueError: settings are given for a saved model, which has its own.
    """
    if not is_saved_model(name):
        return LongMemForCausalLM.from_backbone(name, backbone_options=backbone_options, **config_fields).eval()
    if config_fields:
        raise ValueError(f"{name} has its settings; they can be changed for a new side network only: {config_fields}.")
    return LongMemForCausalLM.from_pretrained(name, backbone_options=backbone_options).eval()
