"""Opening the frozen backbone and its tokenizer by hub name, local folder or packaged name."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longmem.backbone.packaged import resolve_backbone
from longmem.console import without_transformers_bars


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
            return transformers.AutoModelForCausalLM.from_pretrained(
                resolved, revision=revision or "main", **load_options
            )
    except OSError as error:  # it may say that there is no connection, and not what for
        raise OSError(f"the backbone `{name_or_path}` can't be opened: {error}") from error


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer that belongs to the backbone of that name.

    Raises:
        OSError: there is no such tokenizer, or it can't be reached.
    """
    return transformers.AutoTokenizer.from_pretrained(resolve_backbone(name_or_path), revision=revision or "main")


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
