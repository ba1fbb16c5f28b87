"""Local updates: each process takes several optimizer steps on its own lanes, then all average what they train.

Local SGD (arXiv 1805.09767): the network is sent once in `every_steps` steps instead of a gradient in each.

Why not a library's class: torch's `PeriodicModelAverager` averages the weights that have a gradient at that moment, and a
memory bias has none where a process's lanes found nothing to read, so processes would add up different weights. accelerate's
`LocalSGD` averages frozen weights as well, counts steps from 0 in a run that goes on, and, left by an error, waits for
processes that are not there. Neither averages what AdamW remembers, without which a checkpoint would be one process's own.
(torch 2.13, accelerate 1.15.)
"""

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class LocalUpdates:
    """What a process does on its own, and the average of all after every `every_steps` steps and the last one.

    With 0 instead gradients are averaged in every step. Raises ValueError if processes hold parts of the network, not all.
    """

    def __init__(self, accelerator: Accelerator, every_steps: int, last_step: int) -> None:
        if every_steps and accelerator.distributed_type in SHARDED:
            raise ValueError(
                f"`exchange.every_steps` must be 0 with {accelerator.distributed_type.value}, got {every_steps}: a process "
                "holds a part of the network and can't take a step on its own; use plain data parallel processes."
            )
        self.accelerator, self.every_steps, self.last_step = accelerator, every_steps, last_step
        self.enabled = every_steps > 0 and accelerator.num_processes > 1

    def agree(self, step: int) -> bool:
        """Return whether all processes have the same network after `step` steps, so that one may speak for all."""
        return not self.enabled or step % self.every_steps == 0 or step == self.last_step

    def loss_scale(self, lengths: Sequence[Sequence[int]], own: range) -> float:
        """Return the factor of a process's summed loss that makes it the mean over the targets of its gradient.

        Where gradients are averaged over processes, these are the targets of all; where each process steps on its own, its
        own. `lengths` are of the windows of all lanes, batch by batch; `own` are the lanes of this process.
        """
        if self.enabled:
            return 1 / num_targets([[batch[lane] for lane in own] for batch in lengths])
        return self.accelerator.num_processes / num_targets(lengths)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Average what is trained, and what the optimizer remembers of it, if that is due after `step` steps."""
        for tensors in groups_to_average(optimizer) if self.enabled and self.agree(step) else ():
            # One message for each group; tensors stay where they are.
            flat = torch.cat([tensor.reshape(-1).to(self.accelerator.device, torch.float32) for tensor in tensors])
            mean = self.accelerator.reduce(flat, "mean")
            for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view(tensor.shape))


def num_targets(lengths: Sequence[Sequence[int]]) -> int:
    """Return the targets in windows of these lengths: all tokens but the first.

    >>> num_targets([[16, 9], [16, 16]])
    53
    """
    return sum(length - 1 for batch in lengths for length in batch)


def groups_to_average(optimizer: torch.optim.Optimizer) -> Iterator[list[Tensor]]:
    """Yield the trained weights, then each kind of number that the optimizer keeps for them.

    Every process yields the same, also for weights that had no gradient there yet: those get zeros, of which an optimizer
    makes the same step as of nothing. The mean of counts of steps corrects for zeros among the averaged moments.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    yield weights
    kept = {name: value for state in optimizer.state.values() for name, value in state.items()}
    for name in sorted(name for name, value in kept.items() if isinstance(value, Tensor)):
        is_count = kept[name].ndim == 0
        for weight in weights:
            if name not in optimizer.state[weight]:
                empty = torch.zeros_like(kept[name]) if is_count else torch.zeros_like(weight)
                optimizer.state[weight][name] = empty
        yield [optimizer.state[weight][name] for weight in weights]
