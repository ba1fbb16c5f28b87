"""Checkpoints of the released code (fairseq's layout) as folders of this package."""

import argparse
import pickle
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmem.console import without_transformers_bars
from longmem.official.weights import OWN_BACKBONE, backbone_weights, build_backbone, build_model, side_weights

# fairseq's names of activations; its "gelu" is the exact one, its other two are one tanh form.
ACTIVATIONS = {"gelu": "gelu", "gelu_accurate": "gelu_new", "gelu_fast": "gelu_new", "relu": "relu", "swish": "silu"}
# Settings that change what the released model computes, and the values that this package has a form for.
SIDE_NEEDS = {"decoder_normalize_before": True, "no_decoder_final_norm": False, "use_external_memory": True}
BACKBONE_NEEDS = {"newgpt_mode": "alibi"}
BACKBONE_FOLDER = "backbone"


class Checkpoint:
    """A fairseq checkpoint: weights, and the settings of its model; read without running any code that it may hold.

    `needs`: settings that must have these values, where the checkpoint tells them. Raises ValueError if it can't be read, or
    is no checkpoint of a model.
    """

    def __init__(self, path: str | PathLike[str], needs: Mapping[str, Any]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no checkpoint {self.path}.")
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(self.path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            # torch's own message would have the user try again without this safeguard.
            raise ValueError(
                f"{self.path} can't be read: it is no checkpoint of torch, or it is damaged, or it holds more than tensors and "
                f"settings, which could run code ({type(error).__name__})."
            ) from error
        weights = content.get("model") if isinstance(content, dict) else None
        if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError(f"{self.path} is no fairseq checkpoint: it holds no weights under `model`.")
        self.weights: dict[str, Tensor] = dict(weights)
        settings = (content.get("cfg") or {}).get("model") or content.get("args") or {}
        self.settings: dict[str, Any] = vars(settings) if isinstance(settings, argparse.Namespace) else dict(settings)
        for name, value in needs.items():
            if (found := self.settings.get(name, value)) != value:
                raise ValueError(f"{self.path} was made with `{name}` {found!r}; only {value!r} can be converted.")

    def setting(self, name: str) -> Any:
        """Return a setting. Raises ValueError if the checkpoint does not tell it."""
        if self.settings.get(name) is None:
            raise ValueError(
                f"{self.path} does not tell `{name}`: it is neither in its `cfg['model']` nor in its `args`."
            )
        return self.settings[name]


def convert(checkpoint: str | PathLike[str], backbone: str | PathLike[str], folder: str | PathLike[str]) -> int:
    """Write a model that `LongMemForCausalLM.from_pretrained` opens, with its backbone inside; return its `memory_size`.

    `memory_size` is a property of the memory here, not of the model: the capacity to give a `MemoryBank`. `checkpoint` is of
    the side network, `backbone` of the NewGPT model it was trained on, which is written to `backbone` inside the folder.

    Raises ValueError if a file can't be read, a setting is missing, weights do not fit, or the two do not belong together.
    """
    side, base = Checkpoint(checkpoint, SIDE_NEEDS), Checkpoint(backbone, BACKBONE_NEEDS)
    weights = backbone_weights(base.weights)
    own = {name: tensor for name, tensor in side.weights.items() if name.startswith(OWN_BACKBONE)}
    for name, tensor in backbone_weights(own).items() if own else ():
        if name not in weights or not torch.equal(weights[name], tensor):
            raise ValueError(
                f"{side.path} was trained on another backbone than the one given: `{name}` differs; "
                "pass the checkpoint that its `pretrained_model_path` names."
            )
    activation = side.setting("activation_fn")
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation_fn` of {side.path} must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    model = build_model(
        build_backbone(weights, int(base.setting("num_attention_heads")), pad_token_id=base.settings.get("pad", 1)),
        side_weights(side.weights),
        {
            "hidden_act": ACTIVATIONS[activation],
            "attention_dropout": float(side.settings.get("attention_dropout", 0.0)),
            "hidden_dropout": float(side.settings.get("dropout", 0.0)),
        },
        layer_reduction_factor=int(side.setting("layer_reduction_factor")),
        memory_layers=[int(side.setting("retrieval_layer_index"))],
        chunk_size=int(side.setting("chunk_size")),
        num_retrieved_tokens=int(side.setting("k")),
        segment_length=int(side.setting("tokens_per_sample")),
    )
    base_folder = Path(folder) / BACKBONE_FOLDER
    with without_transformers_bars():
        model.backbone.save_pretrained(base_folder)
    model.config.backbone_name_or_path = str(base_folder)
    model.save_pretrained(folder)
    return int(side.setting("memory_size"))
