"""Opening a model by one name, whatever the name is of: a backbone, or a side network that was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from longmem.backbone.packaged import PACKAGED_BACKBONES, has_trained_side_network
from longmem.configuration import LongMemConfig
from longmem.model.modeling import LongMemForCausalLM
from longmem.model.saving import local_folder


def is_saved_model(name: str) -> bool:
    """Return whether a folder holds a side network that `save_pretrained` wrote.

    A packaged name comes before a folder of that name, which is reached as `./smollm2-135m`.
    """
    if name in PACKAGED_BACKBONES:
        return False
    config = Path(name) / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "longmem"


def side_network_origin(name: str) -> Literal["saved", "packaged", "new"]:
    """Return where `open_model(name)` has its side network from: the folder, this package (trained), or nowhere yet."""
    if is_saved_model(name):
        return "saved"
    return "packaged" if has_trained_side_network(name) else "new"


def refuse_config_of_saved(name: str, config_fields: dict[str, Any]) -> None:
    """Raise ValueError if there are settings for a saved model, which has its own."""
    if config_fields:
        raise ValueError(f"{name} has its settings; they can be changed for a new side network only: {config_fields}.")


def open_model(name: str, *, dtype: str | None = None, **config_fields: Any) -> LongMemForCausalLM:
    """Return a saved LongMem model, or a new side network, with these settings, on any other causal LM; in eval mode.

    A packaged backbone that comes with a trained side network gets that one, unless there are settings for a new one.

    Args:
        name: folder of a saved model; or packaged name, hub name or folder of a causal LM.
        dtype: such as "bfloat16", of backbone and side network alike, also where a saved model was trained in another;
            None leaves both as they were saved.
        config_fields: fields of `LongMemConfig` for a new side network.

    Raises:
        ValueError: settings are given for a saved model, which has its own.
    """
    origin = side_network_origin(name)
    if origin == "saved":
        refuse_config_of_saved(name, config_fields)
    if origin == "new" or config_fields:
        options = None if dtype is None else {"dtype": dtype}
        return LongMemForCausalLM.from_backbone(name, backbone_options=options, **config_fields).eval()
    if dtype is None:
        return LongMemForCausalLM.from_pretrained(name).eval()
    config = LongMemConfig.from_pretrained(local_folder(name, None))
    config.side_network_dtype = None  # the backbone's
    return LongMemForCausalLM.from_pretrained(name, config=config, dtype=dtype).eval()
