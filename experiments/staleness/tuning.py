"""Changing an encoder as its owner would: all weights of a backbone fine-tuned on some text, for so many steps."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel


def tuned_backbone(
    backbone: PreTrainedModel,
    token_ids: Int[Tensor, " tokens"],
    *,
    steps: int,
    learning_rate: float,
    window: int,
    seed: int,
    keep_in: Path | None = None,
) -> PreTrainedModel:
    """Return a copy of a backbone after so many AdamW steps, each on one window drawn from a text; in eval mode.

    Weights are trained in float32, products computed in bfloat16; the copy has the backbone's dtype again.

    Args:
        backbone: stays as it is.
        token_ids: of the text.
        steps: optimizer steps.
        learning_rate: constant.
        window: tokens of a step.
        seed: of the windows.
        keep_in: file of the tuned weights: read if it is there, else written.
    """
    tuned = copy.deepcopy(backbone)
    if keep_in is not None and keep_in.is_file():
        tuned.load_state_dict(load_file(keep_in), strict=False)
        return tuned.eval()
    tuned.float().train().requires_grad_(True)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        start = int(torch.randint(len(token_ids) - window + 1, (1,), generator=generator))
        ids = token_ids[None, start : start + window].to(tuned.device)
        with torch.autocast(tuned.device.type, dtype=torch.bfloat16):
            loss = tuned(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    tuned = tuned.to(backbone.dtype).requires_grad_(False).eval()  # type: ignore[arg-type]
    if keep_in is not None:
        keep_in.parent.mkdir(parents=True, exist_ok=True)
        parameters = {name: each.detach().contiguous() for name, each in tuned.named_parameters()}  # tied ones once
        save_file(parameters, keep_in.with_suffix(".part"))
        keep_in.with_suffix(".part").replace(keep_in)
    return tuned
