"""The tripwire: whether anything on the encoder path was touched, asked at every read and nearly free.

Four signs are looked at: a tensor that requires a gradient, a module in training mode, a module or tensor put in another's
place, and a tensor's version counter, which counts writes. The counter sees neither fused optimizers nor writes to
`.data`, so a few numbers of a few tensors are compared as well, other ones at every look.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longmem.backbone.stamp import EncoderPath

SAMPLED_NUMBERS = 16  # of a tensor, at even distances
SAMPLED_TENSORS = 4  # at each look; an optimizer step changes all of them


class _Leaf(NamedTuple):
    """A tensor as it was: where it is held, itself, its counter, its memory, and some of its numbers."""

    name: str
    held_in: dict[str, Tensor | None]
    key: str
    tensor: Tensor
    version: int
    address: int
    sample: Tensor


class Tripwire:
    """Return a tripwire over an encoder path as it is now.

    Args:
        path: tensors and modules to watch.
    """

    def __init__(self, path: EncoderPath) -> None:
        self._leaves = [_leaf(*each) for each in path.leaves]
        self._modules = [module for _, module in path.modules]
        self._names = [name for name, _ in path.modules]
        self._children = [(module._modules, dict(module._modules)) for module in self._modules]
        self._turn = 0

    def changed(self) -> str | None:
        """Return what was written to or replaced since, in words; None if nothing was."""
        for (current, before), name in zip(self._children, self._names, strict=True):
            if current != before:
                return f"a module inside `{name}` was replaced"
        for name, held_in, key, tensor, version, address, _ in self._leaves:
            if held_in.get(key) is not tensor:
                return f"`{name}` was replaced"
            # An inference tensor has no counter, and can be written to in inference mode alone.
            if tensor.data_ptr() != address or (version >= 0 and tensor._version != version):
                return f"`{name}` was written to"
        return self._sampled(SAMPLED_TENSORS)

    def changed_anywhere(self) -> str | None:
        """Return what `changed` does, after a look at the samples of all tensors."""
        return self.changed() or self._sampled(len(self._leaves))

    def trainable(self) -> str | None:
        """Return what makes the encoder trainable or random, in words; None if it is frozen and in eval mode."""
        for leaf in self._leaves:
            if leaf.tensor.requires_grad:
                return f"`{leaf.name}` requires a gradient"
        for module, name in zip(self._modules, self._names, strict=True):
            if module.training:
                return f"`{name or 'the backbone'}` is in training mode"
        return None

    def _sampled(self, count: int) -> str | None:
        for _ in range(min(count, len(self._leaves))):
            leaf = self._leaves[self._turn % len(self._leaves)]
            self._turn += 1
            if not torch.equal(_sample(leaf.tensor), leaf.sample):
                return f"`{leaf.name}` holds other numbers"
        return None


def _leaf(name: str, module: nn.Module, key: str) -> _Leaf:
    held_in: dict[str, Tensor | None] = module._parameters if key in module._parameters else module._buffers  # type: ignore[assignment]
    tensor = held_in[key]
    assert tensor is not None
    version = -1 if tensor.is_inference() else tensor._version
    return _Leaf(name, held_in, key, tensor, version, tensor.data_ptr(), _sample(tensor))


def _sample(tensor: Tensor) -> Tensor:
    """Return a few numbers of a tensor; none of one that is not in memory, or is of a class of its own."""
    if tensor.is_meta or not tensor.numel() or not _is_plain(tensor):
        return torch.empty(0)
    step = max(1, tensor.numel() // SAMPLED_NUMBERS)
    with torch.no_grad():
        return tensor.detach().reshape(-1)[::step][:SAMPLED_NUMBERS].clone()


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous()
