"""Side-network checkpoints: safetensors, configuration, model card. The backbone is named, never copied."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import load_state_dict_from_file, save_torch_state_dict, snapshot_download
from torch import nn
from transformers import PreTrainedModel

from longmem.configuration import LongMemConfig
from longmem.errors import did_you_mean

if TYPE_CHECKING:
    from longmem.pretrained import LongMemPreTrainedModel

PREFIX = "side_network."
MODEL_CARD = """---
library_name: longmem
tags: [longmem, long-term-memory]
{base_model}---

# LongMem side network

A residual side network that reads a memory bank of past text beside a frozen backbone
(LongMem, [arXiv 2306.07174](https://arxiv.org/abs/2306.07174)). This folder holds the side network alone; the backbone,
`{backbone}`, is opened by name.

```python
from longmem import LongMemForCausalLM, MemoryBank

model = LongMemForCausalLM.from_pretrained("PATH")
bank = MemoryBank.for_model(model)
model.memorize(bank, open("book.txt").read(), document_id="book")
inputs = model.tokenizer("In the last chapter,", return_tensors="pt")
print(model.tokenizer.decode(model.generate(**inputs, memory=bank, max_new_tokens=64)[0]))
```

| setting | value |
|---|---|
{settings}
"""


def local_folder(name_or_path: str | PathLike[str], revision: str | None) -> Path:
    """Return the folder of a saved model, downloading it when the name is not a local folder.

    Raises:
        ValueError: a local folder holds no LongMem model.
        OSError: no such folder, and the hub has no such repository or can't be reached.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            patterns = ["*.json", "*.safetensors"]
            folder = Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=patterns))
        except Exception as error:
            raise OSError(
                f"`{name_or_path}` is not a local folder, and could not be downloaded from the hub: {error}"
            ) from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, so it is not a model that `save_pretrained` wrote.")
    return folder


def backbone_location(folder: Path, name: str) -> str:
    """Return where to open a backbone: inside the model's folder if its name is a folder there, else by its name."""
    return str((folder / name).resolve()) if (folder / name).is_dir() else name


def name_from(folder: Path, name: str | None) -> str | None:
    """Return how a model in `folder` names its backbone: by a relative path if it is inside, so that both can move."""
    if not name or not Path(name).is_dir():
        return name
    place = Path(name).resolve()  # a folder elsewhere by its whole path, whatever folder the model is opened from
    return (place.relative_to(folder.resolve()) if place.is_relative_to(folder.resolve()) else place).as_posix()


def save_model(model: LongMemPreTrainedModel, save_directory: str | PathLike[str], **options: Any) -> None:
    """Write side network, configuration, generation configuration and model card to a folder.

    Raises:
        ValueError: the path is a file, or an option is unknown.
    """
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"`save_directory` must be a folder, got the file {folder}.")
    push_to_hub, repo_id = options.pop("push_to_hub", False), options.pop("repo_id", folder.name)
    state = options.pop("state_dict", None) or model.state_dict()
    is_main_process, token = options.pop("is_main_process", True), options.pop("token", None)
    sharding = {"max_shard_size": options.pop("max_shard_size")} if "max_shard_size" in options else {}
    for habit in (
        "safe_serialization",
        "save_function",
    ):  # accelerate and the Trainer pass them; it is always safetensors
        options.pop(habit, None)
    refuse_unknown_options(options)
    if not is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    save_torch_state_dict(own, folder, **sharding)
    model.config.architectures = [type(model).__name__]
    config = copy.deepcopy(model.config)
    config.backbone_name_or_path = name_from(folder, config.backbone_name_or_path)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(config), encoding="utf-8")
    if push_to_hub:
        from huggingface_hub import upload_folder

        upload_folder(repo_id=repo_id, folder_path=folder, token=token)


def model_card(config: LongMemConfig) -> str:
    """Return the text of the model card."""
    names = (
        "layer_reduction_factor memory_layers chunk_size num_retrieved_tokens segment_length memory_distance "
        "residual fusion init"
    )
    settings = "\n".join(f"| `{name}` | {getattr(config, name)} |" for name in names.split())
    backbone = config.backbone_name_or_path or "a model without a name"
    is_hub_name = bool(config.backbone_name_or_path) and backbone.count("/") == 1 and not Path(backbone).exists()
    base_model = f"base_model: {backbone}\n" if is_hub_name else ""
    return MODEL_CARD.format(base_model=base_model, backbone=backbone, settings=settings)


def load_side_network(side_network: nn.Module, folder: Path) -> None:
    """Load the weights that `save_model` wrote, all of them and nothing else.

    Raises:
        ValueError: weights are missing, left over or of another shape, or the file can't be read.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no model.safetensors, so there is no side network to load.")
    found: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            found |= load_state_dict_from_file(file)
        except Exception as error:
            raise ValueError(f"{file} can't be read, it is damaged or incomplete: {error}") from error
    load_strictly(side_network, {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}, str(folder))


def load_strictly(module: nn.Module, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Load weights, all of them and nothing else. Raises ValueError, with `where` they are from, if they do not fit."""
    expected = module.state_dict()
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    reshaped = sorted(name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape)
    if missing or unexpected or reshaped:
        raise ValueError(
            f"the weights in {where} do not fit the network that its settings describe: "
            f"missing {missing[:3]} ({len(missing)}), unexpected {unexpected[:3]} ({len(unexpected)}), "
            f"of another shape {reshaped[:3]} ({len(reshaped)})."
        )
    module.load_state_dict(weights)


def refuse_other_backbone(config: LongMemConfig, backbone: PreTrainedModel) -> None:
    """Raise if the backbone is of another type or size than the one the side network was made for."""
    if config.backbone_config is None:
        return
    expected, given = config.get_text_config(), backbone.config.get_text_config()
    for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        if getattr(expected, name) != getattr(given, name):
            raise ValueError(
                f"`backbone` must be the model the side network was made for ({config.backbone_name_or_path}): "
                f"{name} should be {getattr(expected, name)}, got {getattr(given, name)}."
            )


def refuse_unknown_options(options: dict[str, Any]) -> None:
    """Raise for keyword arguments of loading and saving that would be ignored."""
    habits = {"trust_remote_code", "code_revision", "_commit_hash", "adapter_kwargs", "quantization_config"}
    known = ["backbone", "backbone_options", "revision", "dtype", "config", "push_to_hub", "repo_id"]
    for name in options:
        if name not in habits:
            raise ValueError(f"`{name}` is not an option here.{did_you_mean(name, known)} Options: {', '.join(known)}.")
