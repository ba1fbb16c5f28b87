"""Opening the frozen backbone and its tokenizer by hub name, local folder or packaged name."""

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longmem.backbone.packaged import PACKAGED_BACKBONES, resolve_backbone
from longmem.console import without_transformers_bars
from longmem.errors import did_you_mean

# Options of `from_pretrained` in transformers: where files come from, and how weights are loaded, placed and run.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
LOAD_OPTIONS = frozenset(
    ("dtype", "torch_dtype", "device_map", "max_memory", "offload_folder", "offload_buffers", "quantization_config")
    + ("attn_implementation", "experts_implementation", "use_kernels", "kernel_config", "allow_all_kernels")
    + ("distributed_config", "device_mesh", "tp_plan", "tp_size", "disable_mmap", "low_cpu_mem_usage", "proxies")
    + ("fusion_config", "tqdm_class")
)
# Those of the files of a backbone, which a side network's own are not.
BACKBONE_OPTIONS = LOAD_OPTIONS | {"trust_remote_code", "code_revision", "variant", "use_safetensors", "weights_only"}
# What transformers 4 called by another name, or had in an object of its own.
FORMER_OPTIONS = {"use_auth_token": "token", "use_flash_attention_2": "attn_implementation"}
FORMER_OPTIONS |= dict.fromkeys(("load_in_8bit", "load_in_4bit"), "quantization_config=BitsAndBytesConfig(...)")


def take(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return those of the options that have these names and are set, and take them out."""
    found = {name: options.pop(name) for name in names if name in options}
    return {name: value for name, value in found.items() if value is not None}


def refuse_unknown_options(options: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for the first keyword argument that would be ignored."""
    known = sorted(set(known))
    for name in options:
        near = f" Use `{FORMER_OPTIONS[name]}`." if name in FORMER_OPTIONS else did_you_mean(name, known)
        raise ValueError(f"`{name}` is not an option here.{near} Options: {', '.join(known)}.")


def load_backbone(name_or_path: str, revision: str | None = None, **load_options: Any) -> PreTrainedModel:
    """Return the causal LM of that name, in the dtype it was saved in unless `dtype=` says otherwise.

    Args:
        name_or_path: hub name or local folder of a causal LM, or packaged name (`longmem.backbone.packaged`). What else may
            name a backbone, such as a saved LongMem model, `longmem.model.names` looks up first.
        revision: hub revision.
        load_options: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, quantization_config, ...).

    Raises:
        OSError: there is no such model, or it can't be reached.
    """
    resolved = resolve_backbone(name_or_path)
    try:
        with without_transformers_bars():
            options = {"revision": revision or "main", **load_options}
            return transformers.AutoModelForCausalLM.from_pretrained(resolved, **options)
    except (TypeError, AttributeError) as error:  # what transformers makes of a name or a value that it does not know
        raise ValueError(
            f"options must be such as `AutoModelForCausalLM.from_pretrained` takes, got {load_options}: {error}."
        ) from error
    except OSError as error:  # it may say that there is no connection, and not what for
        raise OSError(
            f"the backbone `{name_or_path}` can't be opened, it must be a folder with a causal LM, a name on the hub or one of "
            f"{', '.join(PACKAGED_BACKBONES)}: {error}"
        ) from error


def load_tokenizer(name_or_path: str, revision: str | None = None, **options: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer that belongs to the backbone of that name; `options` are of `AutoTokenizer.from_pretrained`.

    Raises:
        OSError: there is no such tokenizer, or it can't be reached.
        ValueError: its files do not make one.
    """
    resolved = resolve_backbone(name_or_path)
    try:
        return transformers.AutoTokenizer.from_pretrained(resolved, revision=revision or "main", **options)
    except (OSError, ImportError):
        raise
    except Exception as error:  # files that are none end in whatever transformers and tokenizers meet first
        raise ValueError(
            f"the tokenizer of `{name_or_path}` can't be opened, its files must be as `save_pretrained` wrote them: "
            f"{type(error).__name__}, {error}"
        ) from error


def start_of(tokenizer: Any) -> list[int] | None:
    """Return the tokens that a tokenizer puts before a text by itself, such as `<bos>`; None if it puts none there."""
    whole, bare = (list(tokenizer("a", **options)["input_ids"]) for options in ({}, {"add_special_tokens": False}))
    places = [place for place in range(len(whole)) if bare and whole[place : place + len(bare)] == bare]
    return whole[: places[0]] or None if places else None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that decides which tokens a text gets."""
    if getattr(tokenizer, "is_fast", False):
        written = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # set by the tokenizer's last call, and replaced by the next one
            written.pop(state, None)
        return digest(written)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return digest({path.name: path.read_bytes().hex() for path in sorted(Path(folder).iterdir())})


def digest(value: Any) -> str:
    """Return a hash of plain values."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()
