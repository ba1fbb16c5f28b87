"""Side-network checkpoints: safetensors, configuration, model card. The backbone is named, never copied."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import load_state_dict_from_file, save_torch_state_dict, snapshot_download
from torch import nn
from transformers import PreTrainedModel

from longmem.backbone.packaged import PACKAGED_BACKBONES, trained_side_network
from longmem.configuration import ALL_LINEAR, LongMemConfig
from longmem.errors import did_you_mean
from longmem.quiet import without_transformers_bars

if TYPE_CHECKING:
    from longmem.model.pretrained import LongMemPreTrainedModel
    from longmem.model.side_network import SideNetwork

PREFIX = "side_network."
SAVED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL_CARD = """---
library_name: longmem
tags: [longmem, long-term-memory]
{base_model}---

# LongMem side network

A residual side network that reads a memory bank of past text beside a frozen backbone
(LongMem, [arXiv 2306.07174](https://arxiv.org/abs/2306.07174)). This folder holds {contents}. Trained: {trained}.

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
    """Return the folder of a saved model: that of a packaged name, a local one, or one downloaded from the hub.

    Raises:
        ValueError: a local folder holds no LongMem model, or no trained side network comes with a packaged name.
        OSError: no such folder, and the hub has no such repository or can't be reached.
    """
    # As for backbones, a packaged name comes before a folder of that name, which is reached as `./name`.
    if isinstance(name_or_path, str) and name_or_path in PACKAGED_BACKBONES:
        return trained_side_network(name_or_path)
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
    if not name or name in PACKAGED_BACKBONES or not Path(name).is_dir():
        return name
    place = Path(name).resolve()  # a folder elsewhere by its whole path, whatever folder the model is opened from
    return (place.relative_to(folder.resolve()) if place.is_relative_to(folder.resolve()) else place).as_posix()


def save_model(
    model: LongMemPreTrainedModel,
    save_directory: str | PathLike[str],
    dtype: torch.dtype | str | None = None,
    save_backbone: bool = False,
    **options: Any,
) -> None:
    """Write side network, configuration, generation configuration and model card to a folder, the backbone if asked to.

    Raises:
        ValueError: the path is a file, `dtype` is none that weights are saved in, an option is unknown, or a trained backbone
            would be lost.
    """
    if model.backbone_was_trained and not save_backbone:
        raise ValueError(
            "`save_backbone` must be True for a model whose backbone was trained and is no longer "
            f"{model.config.backbone_name_or_path}, got False; `save_pretrained(folder, save_backbone=True)` writes both."
        )
    dtype = SAVED_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and dtype not in SAVED_DTYPES.values():
        raise ValueError(
            f"`dtype` must be one of {', '.join(SAVED_DTYPES)}, got {dtype!r}; leave it out for that of the weights."
        )
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
    saved = saved_names(model.side_network)
    own = {name: tensor for name, tensor in state.items() if name.removeprefix(PREFIX) in saved}
    if dtype is not None:  # not buffers: positions in half precision would be other positions
        weights = {PREFIX + name for name in model.side_network.trained_parameters()}
        own = {name: tensor.to(dtype) if name in weights else tensor for name, tensor in own.items()}
    save_torch_state_dict(own, folder, **sharding)
    model.config.architectures = [type(model).__name__]
    config = copy.deepcopy(model.config)
    if save_backbone:
        config.backbone_revision = None  # of the hub's
        config.backbone_name_or_path = str(write_backbone(model, folder / "backbone"))
    config.backbone_name_or_path = name_from(folder, config.backbone_name_or_path)
    # Where it was opened from here, such as a folder of somebody's cache, is nobody else's business.
    config.backbone_config.name_or_path = config.backbone_name_or_path or ""
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    trained = sum(weight.numel() for weight in model.side_network.trained_parameters().values())
    (folder / "README.md").write_text(model_card(config, trained, with_backbone=save_backbone), encoding="utf-8")
    if push_to_hub:
        from huggingface_hub import upload_folder

        upload_folder(repo_id=repo_id, folder_path=folder, token=token)


def write_backbone(model: LongMemPreTrainedModel, folder: Path) -> Path:
    """Write the backbone, and the tokenizer if there is one, to a folder, and return the folder."""
    with without_transformers_bars():
        model.backbone.save_pretrained(folder)
    if model._tokenizer is not None or model.config.backbone_name_or_path:
        with contextlib.suppress(OSError):  # a backbone in a folder without a tokenizer is given token ids
            model.tokenizer.save_pretrained(folder)
    return folder


def saved_names(side_network: SideNetwork) -> set[str]:
    """Return the names of what a checkpoint holds: everything or, with LoRA, what may differ from the backbone's weights."""
    if side_network.config.lora is None:
        return set(side_network.state_dict())
    unfrozen = {name for name, weight in side_network.named_parameters() if weight.requires_grad}
    return unfrozen | set(side_network.trained_parameters())


def model_card(config: LongMemConfig, num_trained: int, *, with_backbone: bool = False) -> str:
    """Return the text of the model card; `num_trained` parameters are trained, `with_backbone` it is in the folder."""
    names = (
        "layer_reduction_factor memory_layers chunk_size num_retrieved_tokens segment_length memory_distance "
        "residual fusion init"
    )
    settings = "\n".join(f"| `{name}` | {getattr(config, name)} |" for name in names.split())
    backbone = config.backbone_name_or_path or "a model without a name"
    is_hub_name = bool(config.backbone_name_or_path) and backbone.count("/") == 1 and not Path(backbone).exists()
    base_model = f"base_model: {backbone}\n" if is_hub_name else ""
    trained = f"every weight of the side network, {num_trained:,} parameters"
    if (lora := config.lora) is not None:
        targets = "every linear layer" if lora["target_modules"] == ALL_LINEAR else ", ".join(lora["target_modules"])
        trained = f"LoRA of rank {lora['rank']} (alpha {lora['alpha']:g}) on {targets}, {num_trained:,} parameters"
    contents = f"the side network alone; the backbone,\n`{backbone}`, is opened by name"
    if with_backbone:
        contents = f"the side network\nand, in `{backbone}`, the backbone"
    return MODEL_CARD.format(base_model=base_model, contents=contents, settings=settings, trained=trained)


def load_side_network(side_network: SideNetwork, folder: Path) -> None:
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
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
    copied = side_network.state_dict().keys() - saved_names(side_network)
    load_strictly(side_network, weights, str(folder), optional=copied)
    for name, weight in side_network.named_parameters():
        if name in copied & weights.keys():  # unfrozen by hand: trained on, and saved again
            weight.requires_grad_(True)


def load_strictly(
    module: nn.Module, weights: Mapping[str, torch.Tensor], where: str, optional: Collection[str] = ()
) -> None:
    """Load weights, all of them and nothing else. Raises ValueError, with `where` they are from, if they do not fit.

    `optional`: names of weights that may be missing and then stay as they are.
    """
    expected = module.state_dict()
    missing = sorted(expected.keys() - weights.keys() - set(optional))
    unexpected = sorted(weights.keys() - expected.keys())
    reshaped = sorted(name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape)
    if missing or unexpected or reshaped:
        raise ValueError(
            f"the weights in {where} do not fit the network that its settings describe: "
            f"missing {missing[:3]} ({len(missing)}), unexpected {unexpected[:3]} ({len(unexpected)}), "
            f"of another shape {reshaped[:3]} ({len(reshaped)})."
        )
    module.load_state_dict(weights, strict=False)  # checked above


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
    known = ["backbone", "backbone_options", "revision", "dtype", "config", "save_backbone", "push_to_hub", "repo_id"]
    for name in options:
        if name not in habits:
            raise ValueError(f"`{name}` is not an option here.{did_you_mean(name, known)} Options: {', '.join(known)}.")
