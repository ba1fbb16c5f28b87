"""The tripwire: whether anything on the encoder path was touched, asked at every read and nearly free.

Five signs are looked at: a tensor that requires a gradient, a module in training mode, a module or tensor that was replaced,
a tensor's version counter and, because that sees neither fused optimizers nor writes to `.data`, a few numbers of each tensor.
It can't see a write past the counter that spares all those numbers; the exact stamp does.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longmem.encoder.path import EncoderPath

SAMPLED_NUMBERS = 16  # of each tensor, at even distances


class _Leaf(NamedTuple):
    """A tensor as it was."""

    name: str
    held_in: dict[str, Tensor | None]
    key: str
    tensor: Tensor
    version: int  # -1: it has no counter
    address: int


class _Sample(NamedTuple):
    """Numbers of all tensors of one dtype on one device."""

    names: list[str]
    views: list[Tensor]  # of where they are
    before: Tensor  # what was there


class Tripwire:
    """A tripwire over an encoder path as it is now."""

    def __init__(self, path: EncoderPath) -> None:
        self._leaves = [_leaf(*each) for each in path.leaves]
        self._modules = path.modules
        self._children = [(name, module._modules, dict(module._modules)) for name, module in path.modules]
        self._samples = _samples(self._leaves)

    def changed(self) -> str | None:
        """Return what was written to or replaced since, in words; None if nothing was."""
        for name, children, known in self._children:
            if children != known:
                return f"a module inside `{name}` was replaced"
        for name, held_in, key, tensor, version, address in self._leaves:
            if held_in.get(key) is not tensor:
                return f"`{name}` was replaced"
            # An inference tensor has no counter, and can be written to in inference mode alone.
            if tensor.data_ptr() != address or (version >= 0 and tensor._version != version):
                return f"`{name}` was written to"
        for names, views, before in self._samples:
            if not torch.equal(torch.cat(views), before):
                parts = before.split([len(view) for view in views])
                differs = [not torch.equal(*pair) for pair in zip(views, parts, strict=True)]
                return f"`{names[differs.index(True)]}` holds other numbers"
        return None

    def trainable(self) -> str | None:
        """Return what makes the encoder trainable or random, in words; None if it is frozen and in eval mode."""
        for leaf in self._leaves:
            if leaf.tensor.requires_grad:
                return f"`{leaf.name}` requires a gradient"
        for name, module in self._modules:
            if module.training:
                return f"`{name or 'the backbone'}` is in training mode"
        return None


def _leaf(name: str, module: nn.Module, key: str) -> _Leaf:
    held_in: dict[str, Tensor | None] = module._parameters if key in module._parameters else module._buffers  # type: ignore[assignment]
    tensor: Tensor = getattr(module, key)
    version = -1 if tensor.is_inference() else tensor._version
    return _Leaf(name, held_in, key, tensor, version, tensor.data_ptr())


@torch.no_grad()
def _samples(leaves: list[_Leaf]) -> list[_Sample]:
    """Return a few numbers of each tensor; none of those that are not in memory, or of a class of their own."""
    views: dict[tuple[torch.dtype, torch.device], list[tuple[str, Tensor]]] = defaultdict(list)
    for leaf in leaves:
        tensor = leaf.tensor
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous()
        if plain and tensor.numel() and not tensor.is_meta:
            step = max(1, tensor.numel() // SAMPLED_NUMBERS)
            views[tensor.dtype, tensor.device].append((leaf.name, tensor.detach().view(-1)[::step][:SAMPLED_NUMBERS]))
    return [
        _Sample([name for name, _ in group], [view for _, view in group], torch.cat([view for _, view in group]))
        for group in views.values()
    ]
