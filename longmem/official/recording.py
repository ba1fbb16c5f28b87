"""A recording of the released code: one file of tensors, one of settings, and the model they describe.

Tensors are named `sd/<weight>` (side network), `bb_sd/<weight>` (backbone), `reload_sd/<weight>` (side network copied from
the backbone) and `<run>/s<step>/<what>`. Settings stand in a JSON file of the same stem, under `config`; only what no
tensor tells is read from there.
"""

import json
import re
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.activations import ACT2FN

from longmem.model.modeling import LongMemForCausalLM
from longmem.official.memory import OfficialMemory
from longmem.official.weights import backbone_weights, build_backbone, build_model, side_weights

Memory = TypeVar("Memory", bound=OfficialMemory)
INPUT = re.compile(r"(.+)/s(\d+)/input_ids")


class Recording:
    """Runs and weights of the released code, in a safetensors file; settings are beside it, with the ending `.json`.

    Raises ValueError if it can't be read, or holds no runs or no weights.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no recording {self.path}.")
        try:
            self._file = safe_open(self.path, "pt")
        except Exception as error:
            raise ValueError(f"{self.path} is no safetensors file: {error}") from error
        self._names, path = set(self._file.keys()), self.path.with_suffix(".json")
        if not path.is_file():
            raise ValueError(f"the settings of the recording must be beside it, in {path}; there is no such file.")
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        self._settings: dict[str, Any] = settings if isinstance(settings, dict) else {}
        self.runs: dict[str, list[int]] = {}  # the numbers of the steps of each, in order
        for run, number in sorted((match[1], int(match[2])) for match in map(INPUT.fullmatch, self._names) if match):
            self.runs.setdefault(run, []).append(number)
        if not self.runs:
            raise ValueError(f"{self.path} holds no run: no tensor is named `<run>/s<step>/input_ids`.")

    def step(self, run: str, number: int) -> dict[str, Tensor]:
        """Return everything that was recorded in one step, by the last part of its name."""
        return self.weights(f"{run}/s{number:02d}/")

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors under a prefix, by the rest of their names."""
        return {name[len(prefix) :]: self._file.get_tensor(name) for name in self._names if name.startswith(prefix)}

    def _shape(self, ending: str, run: str = "") -> list[int] | None:
        """Return the shape of a tensor that some step recorded, None if none did."""
        name = next((name for name in sorted(self._names) if name.startswith(run) and name.endswith(ending)), None)
        return None if name is None else self._file.get_slice(name).get_shape()

    def setting(self, name: str) -> Any:
        """Return a setting from `config` or, failing that, from the recorded command lines; None if neither has it."""
        if (found := (self._settings.get("config") or {}).get(name)) is not None:
            return found
        option = "--" + name.replace("_", "-")
        for key, value in self._settings.items():
            if key.startswith("argv") and isinstance(value, list) and option in value[:-1]:
                return value[value.index(option) + 1]
        return None

    def whole_number(self, name: str) -> int:
        """Return a setting that must be there. Raises ValueError if it is not, or is no whole number."""
        value = self.setting(name)
        try:
            return int(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"{self.path.with_suffix('.json')} must give `{name}`, a whole number, under `config`, because no "
                f"tensor of the recording tells it; got {value!r}."
            ) from None

    @property
    def pad_id(self) -> int:
        """The id of padding; 1 in fairseq's dictionaries."""
        return 1 if self.setting("pad_token_id") is None else self.whole_number("pad_token_id")

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk."""
        stored = self._shape("/memory/keys")
        return stored[2] if stored else self.whole_number("chunk_size")

    @property
    def num_retrieved_tokens(self) -> int:
        """The released code's `k`."""
        if retrieved := self._shape("/mem_layer/retrieved_k"):
            return retrieved[2]
        if rows := self._shape("/mem_layer/knn_index"):
            return rows[2] * self.chunk_size
        return self.whole_number("k")

    def new_memory(self, run: str, memory_class: type[Memory]) -> Memory:
        """Return an empty memory of the recorded size, with rows of the dtype that the run stored."""
        stored = self._shape("/memory/keys", f"{run}/")
        memory_size = stored[1] * stored[2] if stored else self.whole_number("memory_size")
        return memory_class(
            memory_layer=self.whole_number("retrieval_layer_index"),
            chunk_size=self.chunk_size,
            memory_size=memory_size,
            storage_dtype=self.row_dtype(run),
        )

    def row_dtype(self, run: str) -> torch.dtype:
        """Return the dtype of stored rows: of the recorded ones, or by the ending of the run's name."""
        name = next((name for name in self._names if re.fullmatch(rf"{re.escape(run)}/s\d+/memory/keys", name)), None)
        if name is not None:
            return {"F16": torch.float16, "F32": torch.float32}[self._file.get_slice(name).get_dtype()]
        if (ending := run[-4:]) in ("_f16", "_f32"):
            return torch.float16 if ending == "_f16" else torch.float32
        raise ValueError(
            f"run {run} must end in `_f16` or `_f32`, or record `memory/keys`, so that the dtype of its rows is known."
        )

    def build_model(self) -> LongMemForCausalLM:
        """Return the recorded model.

        Raises ValueError if a setting or a weight is missing, or they do not fit each other.
        """
        own = self.weights("sd/")
        weights = side_weights(own)
        biases = [tensor for name, tensor in weights.items() if name.endswith(".memory_bias")]
        backbone = build_backbone(
            backbone_weights(self.weights("bb_sd/") or own),
            num_heads=len(biases[0]) if biases else self.whole_number("num_heads"),
            hidden_act=self._activation("backbone_act", "gelu_new"),
            layer_norm_eps=float(self.setting("backbone_ln_eps") or 1e-6),
            pad_token_id=self.pad_id,
        )
        epsilon = float(self.setting("side_ln_eps") or 1e-5)
        return build_model(
            backbone,
            weights,
            {"hidden_act": self._activation("side_act", "gelu"), "layer_norm_eps": epsilon},
            layer_reduction_factor=self.whole_number("layer_reduction_factor"),
            memory_layers=[self.whole_number("retrieval_layer_index")],
            chunk_size=self.chunk_size,
            num_retrieved_tokens=self.num_retrieved_tokens,
        )

    def _activation(self, name: str, usual: str) -> str:
        """Return the activation that a setting names; a remark may follow the name: "gelu (erf)"."""
        given = str(self.setting(name) or usual).split()[0]
        if given not in ACT2FN:
            raise ValueError(f"`{name}` must start with the name of an activation of transformers, got {given!r}.")
        return given
