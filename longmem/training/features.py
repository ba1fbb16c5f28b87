"""Frozen features: what the backbone makes of a window, computed once and read by every later epoch and run.

The backbone never changes, so its hidden states, keys, values and own losses for a window of tokens are always the same.
One file a window (safetensors), named by a hash of the tokens, in a folder named by a hash of all that determines the
numbers: backbone, layers, dtype. Any run with the same backbone and layers may share it, also at the same time.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longmem.backbone.capture import BackboneStates
from longmem.data.lanes import NO_LABEL
from longmem.encoder.path import configuration_recipe, hash_tensors, whole_path
from longmem.encoder.stamp import EncoderStamp
from longmem.files import check_tensors, make_folder, new_file, seal_tensors
from longmem.model.modeling import LongMemForCausalLM
from longmem.training.losses import token_losses

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Features:
    """What the frozen backbone gives for a batch of windows; `losses` are its own, in nats, 0 where there is no target."""

    states: BackboneStates
    losses: Float[Tensor, "lanes targets"]


class FrozenFeatures:
    """Return features of windows, from a folder where they were kept before.

    With a folder, numbers are rounded to its dtype also when they were just computed: a run sees the same ones whether
    they are new or read.

    Args:
        model: whose backbone runs.
        folder: where to keep them; None computes always and rounds nothing.
        dtype: in which hidden states, keys and values are kept; losses are float32.
        max_gigabytes: write no more once the folder has reached this size (of 10^9 bytes); None: no limit.
    """

    def __init__(
        self,
        model: LongMemForCausalLM,
        folder: str | PathLike[str] | None = None,
        dtype: torch.dtype = torch.float16,
        max_gigabytes: float | None = None,
    ) -> None:
        self.model, self.dtype = model, dtype
        self.folder = None if folder is None else Path(folder) / self._fingerprint()
        self._max_bytes = None if max_gigabytes is None else max_gigabytes * 1e9
        self._bytes = 0
        if self.folder is not None:
            make_folder(self.folder)
            if max_gigabytes is not None:  # a large folder takes a while to count
                self._bytes = sum(file.stat().st_size for file in self.folder.glob("*/*.safetensors"))
        self._calls: dict[tuple[int, ...], BackboneStates] = {}

    def bytes_per_token(self) -> int:
        """Return the bytes that a token takes in the folder, found by computing a few."""
        probe = torch.zeros(1, 8, dtype=torch.int64, device=self.model.input_device)
        row = self._row(self._computed(probe, [8]), 0)
        return sum(
            tensor[..., :1].nbytes if name == "losses" else tensor[..., :1, :].nbytes for name, tensor in row.items()
        )

    def of(self, input_ids: Int[Tensor, "lanes tokens"], lengths: Sequence[int]) -> Features:
        """Return the features of a batch of windows, computing those that are not kept yet and keeping them.

        Windows begin at position 0 and are padded on the right; `lengths` are the real tokens of each. Hidden states are of the
        start tokens before them, too; keys, values and losses are not.
        """
        if self.folder is None:
            return self._computed(input_ids, lengths)
        files = [self._file(row[:length]) for row, length in zip(input_ids, lengths, strict=True)]
        kept, shape = [load_kept(file) for file in files], tuple(input_ids.shape)
        if shape not in self._calls or None in kept:
            features = self._computed(input_ids, lengths)
            self._calls.setdefault(shape, BackboneStates(calls=features.states.calls))
            for number, (file, length) in enumerate(zip(files, lengths, strict=True)):
                if kept[number] is None:
                    # Tokens are the last axis of losses, which have one target less, and the one before it of all else.
                    row = {}
                    for name, tensor in self._row(features, number).items():
                        axis = -1 if name == "losses" else -2
                        size = tensor.shape[axis] - (shape[1] - length)  # without padding
                        row[name] = tensor.narrow(axis, 0, size).contiguous().cpu()
                    kept[number] = row
                    self._save(file, row)
        rows = [padded(row, shape[1]) for row in kept if row is not None]
        return self._stacked(rows, self._calls[shape], input_ids)

    @torch.no_grad()
    def losses_after(
        self, context: Int[Tensor, " context"], tokens: Int[Tensor, " tokens"]
    ) -> Float[Tensor, " targets"]:
        """Return the backbone's losses of `tokens` but the first with `context` before them in its window, in nats."""
        whole = torch.cat([context, tokens])
        file = None if self.folder is None else self._file(whole).with_suffix(f".{len(tokens)}.safetensors")
        if file is not None and (kept := load_kept(file)) is not None:
            return kept["losses"].to(tokens.device)
        last = self.model.config.num_backbone_layers
        ids, *_ = self.model.encoder.with_start(whole[None])
        states = self.model.run_backbone(ids, extra_hidden_layers=[last], use_cache=False)
        hidden_states = states.hidden_states[last][:, -len(tokens) :]
        losses = token_losses(self.model, hidden_states, tokens[None], backbone=True)[0]
        if file is not None:
            self._save(file, {"losses": losses.cpu()})
        return losses

    def _computed(self, input_ids: Tensor, lengths: Sequence[int]) -> Features:
        model, last = self.model, self.model.config.num_backbone_layers
        ids, *_ = model.encoder.with_start(input_ids)
        states = model.run_backbone(ids, extra_hidden_layers=[last], use_cache=False)
        for part in (states.keys, states.values):
            part.update({layer: tensor[:, :, -input_ids.shape[1] :] for layer, tensor in part.items()})
        own = states.hidden_states[last][:, -input_ids.shape[1] :]
        with torch.no_grad():
            losses = token_losses(model, own, labels_of(input_ids, lengths), backbone=True)
        wanted = sorted(model.side_network.hidden_layers)
        states.hidden_states = {number: states.hidden_states[number] for number in wanted}
        return Features(states, losses)

    def _row(self, features: Features, number: int) -> dict[str, Tensor]:
        """Return the tensors of one lane, rounded as the folder keeps them."""
        states = features.states
        groups = {"hidden": states.hidden_states, "keys": states.keys, "values": states.values}
        row = {f"{kind}.{layer}": own[number] for kind, group in groups.items() for layer, own in group.items()}
        if states.final_states is not None:
            row["final"] = states.final_states[number]
        return {name: tensor.to(self.dtype) for name, tensor in row.items()} | {"losses": features.losses[number]}

    def _stacked(self, rows: list[dict[str, Tensor]], calls: BackboneStates, input_ids: Tensor) -> Features:
        dtype, device = self.model.backbone.dtype, input_ids.device
        whole = {name: torch.stack([row[name].to(device) for row in rows]) for name in rows[0]}
        losses = whole.pop("losses")
        states = BackboneStates(calls=calls.calls)
        if "final" in whole:
            states.final_states = whole.pop("final").to(dtype)
        groups = {"hidden": states.hidden_states, "keys": states.keys, "values": states.values}
        for name, tensor in whole.items():
            kind, _, layer = name.partition(".")
            groups[kind][int(layer)] = tensor.to(dtype)
        return Features(states, losses)

    def _fingerprint(self) -> str:
        config = self.model.config
        recipe = {
            "format": FORMAT,
            "hidden_layers": sorted(self.model.side_network.hidden_layers),
            "memory_layers": config.memory_layers,
            "residual_states": config.residual_states,
            "dtype": str(self.dtype),
        }
        if config.start_token_ids:  # folders of before have no such tokens
            recipe["start_token_ids"] = config.start_token_ids
        weights = hash_tensors(whole_path(self.model.backbone).tensors())
        return EncoderStamp(weights, recipe | configuration_recipe(self.model.backbone)).digest

    def _file(self, tokens: Int[Tensor, " tokens"]) -> Path:
        assert self.folder is not None
        name = hashlib.blake2b(tokens.cpu().to(torch.int32).numpy().tobytes(), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _save(self, file: Path, kept: dict[str, Tensor]) -> None:
        """Write a file, whole or not at all, unless the folder is full."""
        size = sum(tensor.nbytes for tensor in kept.values())
        if self._max_bytes is not None and self._bytes + size > self._max_bytes:
            return
        make_folder(file.parent)
        with new_file(file) as draft:
            save_file(kept, draft)
            seal_tensors(draft, {"name": file.name})
        self._bytes += size


def load_kept(file: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file, None if it is not there or damaged; then they are computed again."""
    try:
        about = check_tensors(file)
        return load_file(file) if about is not None and about["name"] == file.name else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def labels_of(input_ids: Int[Tensor, "lanes tokens"], lengths: Sequence[int]) -> Int[Tensor, "lanes tokens"]:
    """Return the tokens as targets, -100 where there is padding."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return input_ids.masked_fill(positions >= torch.tensor(lengths, device=input_ids.device)[:, None], NO_LABEL)


def padded(row: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Return a window's tensors with zeros up to `width` tokens."""
    missing = width - 1 - len(row["losses"])
    fill = {name: (0, missing) if name == "losses" else (0, 0, 0, missing) for name in row}
    return {name: nn.functional.pad(tensor, fill[name]) for name, tensor in row.items()}
