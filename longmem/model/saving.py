"""Side-network checkpoints: safetensors, configuration, model card. The backbone is named, never copied."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from longmem import files
from longmem.configuration import ALL_LINEAR, LongMemConfig
from longmem.encoder.path import BackboneStamp
from longmem.memory.folder.foreign import fits
from longmem.model.names import lasting_name
from longmem.model.side_network import GATES, SideNetwork

PREFIX = "side_network."
SEALED = (CONFIG_NAME, GENERATION_CONFIG_NAME)
TOLD = {"files?": dict, "backbone?": {"sums": dict, "recipe": dict}}  # in the header of the weights
BACKBONE_FOLDER = "backbone"  # inside the folder of a model that is saved with its backbone
# Options of `save_pretrained` that transformers takes, those of an upload, and what other libraries pass by habit and weights
# in safetensors need not.
SAVE_OPTIONS = ("max_shard_size", "variant", "save_peft_format")
PUSH_OPTIONS = ("private", "token", "commit_message", "commit_description", "revision", "create_pr")
SAVE_HABITS = ("safe_serialization", "save_function", "save_original_format")
KNOWN_OPTIONS = (*SAVE_OPTIONS, *PUSH_OPTIONS, "dtype", "save_backbone", "push_to_hub", "repo_id", "state_dict")
# What lets transformers open the folder in a program that never imported this package (`trust_remote_code=True`).
SHIM = "longmem_model"
SHIM_CODE = '''"""Lets transformers open this folder by `trust_remote_code=True`; needs `pip install longmem-lm`."""

from longmem import LongMemConfig, LongMemForCausalLM, LongMemModel  # noqa: F401
'''
# Tools that take the class to open a folder with by its name from transformers (`transformers serve`, TRL) find this one there.
OPENED_BY = "AutoModelForCausalLM"
AUTO_MAP = {
    "AutoConfig": f"{SHIM}.LongMemConfig",
    "AutoModel": f"{SHIM}.LongMemModel",
    "AutoModelForCausalLM": f"{SHIM}.LongMemForCausalLM",
}
SAVED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CARD_BEGINS = b"library_name: longmem"
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


def seal_weights(folder: Path, backbone: PreTrainedModel) -> None:
    """Put into the weights in a folder digests of all that is in it, and the stamp of the backbone they were trained beside."""
    about = {
        "files": {name: files.digest_of(path) for name in SEALED if (path := folder / name).is_file()},
        "backbone": BackboneStamp.of(backbone).to_json(),
    }
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            files.seal_tensors(path, about)


def write_description(
    config: LongMemConfig, num_trained: int, folder: Path, *, with_backbone: bool, place: Path | None
) -> None:
    """Write the configuration, which names the backbone, the model card, and the module that `AUTO_MAP` names.

    Args:
        config: of the model; not changed.
        num_trained: parameters that are trained.
        folder: that the weights are in.
        with_backbone: whether the backbone is in it as well.
        place: where the folder will be; None: elsewhere. Then no backbone is named by a path, and the card says what it is.
    """
    config = copy.deepcopy(config)
    config.auto_map, config.architectures = dict(AUTO_MAP), [OPENED_BY]
    if with_backbone:
        config.backbone_revision = None  # of the hub's
        config.backbone_name_or_path = BACKBONE_FOLDER
    elif config.backbone_name_or_path:
        config.backbone_name_or_path = lasting_name(config.backbone_name_or_path, beside=place or folder)
    card = model_card(config, num_trained, with_backbone=with_backbone)
    if place is None and is_place(config.backbone_name_or_path):
        config.backbone_name_or_path = None
    # Where it was opened from here, such as a folder of somebody's cache, is nobody else's business.
    config.backbone_config.name_or_path = config.backbone_name_or_path or ""
    config.save_pretrained(folder)
    (folder / f"{SHIM}.py").write_text(SHIM_CODE, encoding="utf-8")
    there = None if place is None else place / "README.md"
    if there is None or not there.is_file() or CARD_BEGINS in files.read_file(there):  # else it is somebody's own
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


def load_side_network(side_network: SideNetwork, folder: Path, variant: str | None = None) -> BackboneStamp | None:
    """Load the weights that `save_pretrained` wrote, all of them and nothing else; return the stamp of their backbone.

    Null slots, and distances of heads, that the network was saved without and is opened with begin as new ones do.

    Files that other tools wrote have no stamp, and no digests to check.

    Raises:
        ValueError: weights are missing, left over, of another shape or not finite, or a file can't be read or is damaged.
    """
    found: dict[str, torch.Tensor] = {}
    about: dict[str, Any] = {}
    for file in weight_files(folder, variant):
        try:
            told = files.check_tensors(file)
            told = {} if told is None else told
            if not fits(told, TOLD):
                raise files.damaged(file, "what is told of it is not what is told of a side network")
            about |= told
            found |= load_file(file)
        except OSError as error:
            raise files.not_opened(file, error) from error
        except SafetensorError as error:
            raise files.damaged(file, error) from error
    known = about.get("files", {})
    for name in filter(known.__contains__, SEALED):
        if not (folder / name).is_file() or files.digest_of(folder / name) != known[name]:
            warnings.warn(
                f"{folder / name} is not as `save_pretrained` wrote it; if nobody changed it on purpose it is damaged, and the "
                "folder should be restored from a copy.",
                stacklevel=3,
            )
    for name, tensor in found.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"`{name}` in {folder} must be finite, but holds NaN or infinity; its training diverged.")
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
    copied = side_network.state_dict().keys() - saved_names(side_network)
    # Gates that the saved network had in no layer, and the settings now ask for, begin as those of a new network.
    saved = {name.rpartition(".")[2] for name in weights}
    new = {
        name for name in side_network.state_dict() if (kind := name.rpartition(".")[2]) in GATES and kind not in saved
    }
    load_strictly(side_network, weights, str(folder), optional=copied | new)
    for name, weight in side_network.named_parameters():
        if name in copied & weights.keys():  # unfrozen by hand: trained on, and saved again
            weight.requires_grad_(True)
    return BackboneStamp.from_json(about["backbone"]) if "backbone" in about else None


def pattern_of_weights(variant: str | None) -> str:
    """Return a pattern of the names of files that hold weights of a variant, or list them."""
    dotted = "" if variant is None else re.escape(f".{variant}")
    return rf"model{dotted}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{dotted}\.json"


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the files of weights that count in a folder: the one, or those that the index names; no other is read."""
    dotted = "" if variant is None else f".{variant}"
    whole, index = folder / f"model{dotted}.safetensors", folder / f"model.safetensors.index{dotted}.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise ValueError(f"{folder} holds no {whole.name}, so there is no side network to load.")
    try:
        names = sorted(set(files.read_json(index)["weight_map"].values()))
        if not names or not all(re.fullmatch(pattern_of_weights(variant), name) for name in names):
            raise files.damaged(index, f"it names {names[:3]}, not model-00001-of-00002.safetensors and the like")
    except OSError as error:
        raise files.not_opened(index, error) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise files.damaged(index, error) from error
    return [folder / name for name in names]


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


def refuse_other_weights(stamp: BackboneStamp | None, backbone: PreTrainedModel, *, strict: bool) -> None:
    """Raise if the backbone is not the one that the side network was trained beside, or warn where that is not `strict`."""
    differing = [] if stamp is None else stamp.diff(backbone)
    if differing:
        problem = (
            f"the side network was saved beside a backbone that differs from this one in {', '.join(differing)}, and would "
            "read hidden states that it was not trained on; give it the backbone that it was saved beside"
        )
        if strict:
            raise ValueError(f"{problem}, or pass `strict_backbone=False` to be warned only.")
        warnings.warn(f"{problem}.", stacklevel=3)
