"""A linear layer with LoRA that generates and scores faster: peft's own, but for one pass over what it computes."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional

FEW_ROWS = 64  # up to so many tokens are converted to the dtype of the adapters, and not these to theirs


class InferenceLinear(Linear):
    """peft's layer, which without gradients adds `(alpha / rank) B A x` to `W x` in place.

    peft computes adapters in their own dtype, mostly float32, and passes over the output three times, which can take longer
    than `W x`; here many tokens are computed in the dtype of `W x`. With gradients, dropout, autocast or anything else than
    one plain adapter it computes as ever.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, `... out_features`, of `... in_features`."""
        adapter = None if args or kwargs else self._plain_adapter(x)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        down, up, scale = adapter
        output, rows = self.base_layer(x), x.flatten(0, -2)
        flat = output.view(-1, output.shape[-1])
        if len(rows) < FEW_ROWS and down.dtype != x.dtype:  # the input is smaller than the adapters
            added = functional.linear(functional.linear(rows.to(down.dtype), down), up)
            return flat.add_(added, alpha=scale).view(output.shape)
        narrow = functional.linear(rows, down.to(x.dtype))
        return flat.addmm_(narrow, up.T.to(x.dtype), alpha=scale).view(output.shape)

    def _plain_adapter(self, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """Return A, B and alpha / rank of the only active adapter, None if what is computed isn't `W x` and that one."""
        if torch.is_grad_enabled() or self.training or self.disable_adapters or self.merged or x.ndim < 2:
            return None
        names, base, downs = self.active_adapters, self.base_layer, self.lora_A
        if len(names) != 1 or names[0] not in downs or names[0] in self.lora_variant or type(base) is not nn.Linear:
            return None
        down: Any = downs[names[0]]
        up: Any = self.lora_B[names[0]]
        if base.weight.dtype != x.dtype or up.bias is not None or torch.is_autocast_enabled(x.device.type):
            return None
        return down.weight, up.weight, self.scaling[names[0]]
