"""Losses of single tokens, from hidden states, without holding the logits of a whole batch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longmem.data.lanes import NO_LABEL
from longmem.model.modeling import LongMemForCausalLM


def token_losses(
    model: LongMemForCausalLM,
    hidden_states: Float[Tensor, "lanes tokens hidden"],
    labels: Int[Tensor, "lanes tokens"],
    *,
    backbone: bool = False,
) -> Float[Tensor, "lanes targets"]:
    """Return the loss of every token but the first in nats, in float32; 0 where the label is -100.

    The LM head runs on one lane at a time, and nothing of it is kept: a vocabulary of 50,000 makes 200 MB of logits from
    1,000 tokens, and several times that with their gradients. The head is frozen and sees each token by itself, so the
    gradient of a token's loss by its hidden state is found at once; the backward pass only scales it. Where the side network
    trains a final norm of its own, or weights of the backbone are trained, the head runs again in the backward pass instead.

    `hidden_states` are as they leave the last layer, `labels` the tokens themselves, shifted here. With `backbone` its own
    final norm runs, not the side network's copy.
    """
    final_modules = None if backbone else model.side_network.final_modules

    def of_lane(states: Tensor, targets: Tensor) -> Tensor:
        logits = model._backbone.logits(states[None, :-1], final_modules=final_modules)[0]
        return nn.functional.cross_entropy(logits.float(), targets[1:], ignore_index=NO_LABEL, reduction="none")

    def with_gradient(states: Tensor, targets: Tensor) -> Tensor:
        leaf = states.detach().requires_grad_()
        losses = of_lane(leaf, targets)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        # Adds zeros, whose gradient by the hidden states is the one just found.
        return losses.detach() + ((states - leaf.detach()) * gradient)[:-1].sum(dim=-1)

    lanes = zip(hidden_states, labels, strict=True)
    if not (torch.is_grad_enabled() and hidden_states.requires_grad):
        return torch.stack([of_lane(*lane) for lane in lanes])
    modules = [model.backbone, *([] if final_modules is None else [final_modules])]
    if any(weight.requires_grad for module in modules for weight in module.parameters()):
        return torch.stack([checkpoint(of_lane, *lane, use_reentrant=False) for lane in lanes])
    return torch.stack([with_gradient(*lane) for lane in lanes])


def long_context_weights(
    local: Float[Tensor, "lanes targets"], long: Float[Tensor, "lanes targets"], extra: float
) -> Float[Tensor, "lanes targets"]:
    """Return a weight of each token: 1, and up to `extra` more the better a longer context predicts it.

    Both losses are the frozen backbone's, in nats: `local` with the window alone, `long` with more text before it. A gain of
    1 nat or more counts as 1. These are the tokens for which something outside of the window is worth reading.

    >>> long_context_weights(torch.tensor([[2.0, 2.0, 2.0]]), torch.tensor([[2.5, 1.5, 0.1]]), extra=2.0)
    tensor([[1., 2., 3.]])
    """
    return 1.0 + extra * (local - long).clamp(0.0, 1.0)
