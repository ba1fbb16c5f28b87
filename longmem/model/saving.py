"""Side-network checkpoints: safetensors, configuration, model card. The backbone is named, never copied."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from huggingface_hub import load_state_dict_from_file
from torch import nn
from transformers import PreTrainedModel

from longmem.configuration import ALL_LINEAR, LongMemConfig
from longmem.model.names import lasting_name
from longmem.model.side_network import SideNetwork

PREFIX = "side_network."
BACKBONE_FOLDER = "backbone"  # inside the folder of a model that is saved with its backbone
# Options of `save_pretrained` that transformers takes, those of an upload, and what other libraries pass by habit and weights
# in safetensors need not.
SAVE_OPTIONS = ("max_shard_size", "variant", "save_peft_format")
PUSH_OPTIONS = ("private", "token", "commit_message", "commit_description", "revision", "create_pr")
SAVE_HABITS = ("safe_serialization", "save_function", "save_original_format")
# What lets transformers open the folder in a program that never imported this package (`trust_remote_code=True`).
SHIM = "longmem_model"
SHIM_CODE = '''"""Lets transformers open this folder by `trust_remote_code=True`; needs `pip install longmem-lm`."""

from longmem import LongMemConfig, LongMemForCausalLM, LongMemModel  # noqa: F401
'''
AUTO_MAP = {
    "AutoConfig": f"{SHIM}.LongMemConfig",
    "AutoModel": f"{SHIM}.LongMemModel",
    "AutoModelForCausalLM": f"{SHIM}.LongMemForCausalLM",
}
SAVED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL_CARD = """---
library_name: longmem
pipeline_tag: text-generation
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


def saved_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that weights are saved in, None for that of the weights. Raises ValueError for any other kind."""
    found = SAVED_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if isinstance(found, str) or (found is not None and found not in SAVED_DTYPES.values()):
        raise ValueError(
            f"`dtype` must be one of {', '.join(SAVED_DTYPES)}, got {dtype!r}; leave it out for that of the weights."
        )
    return found


def own_state(
    side_network: SideNetwork, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of a model's state: nothing of the backbone, weights in `dtype`.

    Raises:
        ValueError: a tensor of the side network is not in the state.
    """
    names = sorted(PREFIX + name for name in saved_names(side_network))
    if missing := [name for name in names if name not in state]:
        raise ValueError(
            f"`state_dict` must have all that is saved of the side network, got none of {missing[:3]} ({len(missing)} in "
            "all); take `state_dict()` of the unwrapped model, or leave it out."
        )
    own = {name: state[name] for name in names}
    if dtype is not None:  # not buffers: positions in half precision would be other positions
        weights = {PREFIX + name for name in side_network.trained_parameters()}
        own = {name: tensor.to(dtype) if name in weights else tensor for name, tensor in own.items()}
    return own


def write_description(
    config: LongMemConfig, num_trained: int, folder: Path, *, with_backbone: bool, for_others: bool = False
) -> None:
    """Write the configuration, which names the backbone, the model card, and the module that `AUTO_MAP` names.

    Args:
        config: of the model; not changed.
        num_trained: parameters that are trained.
        folder: that the weights are in.
        with_backbone: whether the backbone is in it as well.
        for_others: name no backbone by a path, which means nothing elsewhere; the card says what it is.
    """
    config = copy.deepcopy(config)
    config.auto_map = dict(AUTO_MAP)
    if with_backbone:
        config.backbone_revision = None  # of the hub's
        config.backbone_name_or_path = str(folder / BACKBONE_FOLDER)
    if config.backbone_name_or_path:
        config.backbone_name_or_path = lasting_name(config.backbone_name_or_path, beside=folder)
    card = model_card(config, num_trained, with_backbone=with_backbone)
    if for_others and is_place(config.backbone_name_or_path):
        config.backbone_name_or_path = None
    # Where it was opened from here, such as a folder of somebody's cache, is nobody else's business.
    config.backbone_config.name_or_path = config.backbone_name_or_path or ""
    config.save_pretrained(folder)
    (folder / f"{SHIM}.py").write_text(SHIM_CODE, encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def is_place(name: str | None) -> bool:
    """Return whether the name of a backbone is a path on this machine, which means nothing to others."""
    return bool(name) and Path(str(name)).is_absolute()


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
    if is_place(config.backbone_name_or_path):
        backbone = Path(backbone).name
    base_model = f"base_model: {backbone}\n" if is_hub_name else ""
    trained = f"every weight of the side network, {num_trained:,} parameters"
    if (lora := config.lora) is not None:
        targets = "every linear layer" if lora["target_modules"] == ALL_LINEAR else ", ".join(lora["target_modules"])
        trained = f"LoRA of rank {lora['rank']} (alpha {lora['alpha']:g}) on {targets}, {num_trained:,} parameters"
    contents = f"the side network alone; the backbone,\n`{backbone}`, is opened by name"
    if with_backbone:
        contents = f"the side network\nand, in `{backbone}`, the backbone"
    elif is_place(config.backbone_name_or_path) or not config.backbone_name_or_path:
        text = config.get_text_config()
        contents = (
            f"the side network alone. Its backbone is\nnot on the Hub: you need `{backbone}`, a {text.model_type} of "
            f"{text.num_hidden_layers} layers, hidden size {text.hidden_size}\nand {text.vocab_size} tokens, and open this "
            "folder with `from_pretrained(PATH, backbone=...)`"
        )
    return MODEL_CARD.format(base_model=base_model, contents=contents, settings=settings, trained=trained)


def load_side_network(side_network: SideNetwork, folder: Path, variant: str | None = None) -> None:
    """Load the weights that `save_pretrained` wrote, all of them and nothing else.

    Raises:
        ValueError: weights are missing, left over or of another shape, or the file can't be read.
    """
    name = "model" if variant is None else f"model.{variant}"
    files = sorted([*folder.glob(f"{name}.safetensors"), *folder.glob(f"{name}-*-of-*.safetensors")])
    if not files:
        raise ValueError(f"{folder} holds no {name}.safetensors, so there is no side network to load.")
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
