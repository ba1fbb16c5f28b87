"""The loss of every scored token of a text under a system, and whether one system's losses are lower than another's."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longmem.evaluation.intervals import Estimate, bootstrap_interval
from longmem.evaluation.perplexity.views import View
from longmem.evaluation.perplexity.windows import Window


@dataclasses.dataclass(frozen=True)
class WindowScores:
    """Losses of one system on windows of a text, in nats, one tensor for each window, and what they cost.

    `seconds` are of running the windows, `preparing_seconds` of what went into memory or was indexed for them. `memory_share`
    is the mean weight of memory in the attention of each reading layer and head; None where it was not asked for or read.
    """

    losses: tuple[Float[Tensor, " _scored"], ...]
    seconds: float
    preparing_seconds: float = 0.0
    memory_share: Float[Tensor, "layers heads"] | None = None

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that were scored."""
        return sum(map(len, self.losses))

    @property
    def loss(self) -> float:
        """Return the mean loss of a token, in nats."""
        return torch.cat(self.losses).double().mean().item()

    def part(self, windows: slice) -> WindowScores:
        """Return the scores of some windows."""
        return self._with(self.losses[windows])

    def last(self, scored: int) -> WindowScores:
        """Return the scores of the last tokens of every window."""
        return self._with(tuple(window[len(window) - scored :] for window in self.losses))

    def _with(self, losses: tuple[Tensor, ...]) -> WindowScores:
        """Return the scores with fewer losses; the time of a scored token is taken as it was."""
        share = sum(map(len, losses)) / self.num_tokens
        seconds = {name: getattr(self, name) * share for name in ("seconds", "preparing_seconds")}
        return dataclasses.replace(self, losses=losses, **seconds)


def token_losses(logits: Float[Tensor, "1 kept vocabulary"], ids: Int[Tensor, "1 tokens"]) -> Float[Tensor, " scored"]:
    """Return the loss of the last tokens, as many as logits were kept but one, in float32 on the CPU."""
    targets = ids[0, ids.shape[1] - logits.shape[1] + 1 :]
    return nn.functional.cross_entropy(logits[0, :-1].float(), targets, reduction="none").cpu()


@torch.no_grad()
def score_windows(
    view: View, windows: Sequence[Window], *, with_reads: bool = False, progress: Callable[[int], None] | None = None
) -> WindowScores:
    """Return the losses of a system on the scored tokens of some windows of a text, in its order.

    The mode of the view's model is the caller's business. `with_reads` finds out how much of the attention memory gets;
    `progress` is called after every window, with the number of its scored tokens.
    """
    losses, shares, seconds, preparing = [], [], 0.0, 0.0
    for window in windows:
        start = time.perf_counter()
        local, tokens = view.of(window)
        prepared = time.perf_counter()
        options = {"output_memory_reads": True} if with_reads and local.memory is not None else {}
        options |= {"output_memory_keys": True} if view.leaving else {}
        output = local(tokens, use_cache=False, logits_to_keep=window.num_scored + 1, **options)
        losses.append(token_losses(output.logits, tokens))  # waits for the device
        if with_reads and local.memory is not None and output.memory_reads:
            shares.append(torch.stack([read.memory_share[0].mean(dim=-1) for read in output.memory_reads]).cpu())
        view.leave(window, output)
        preparing += prepared - start
        seconds += time.perf_counter() - prepared
        if progress is not None:
            progress(window.num_scored)
    memory_share = torch.stack(shares).mean(dim=0) if shares else None
    return WindowScores(tuple(losses), seconds, preparing, memory_share)


def loss_difference(scores: WindowScores, baseline: WindowScores, seed: int = 0) -> Estimate:
    """Return by how many nats the loss of `scores` is below that of `baseline`, and its interval over windows."""
    pairs = zip(baseline.losses, scores.losses, strict=True)
    differences = torch.stack([(before - after).mean() for before, after in pairs])
    return differences.double().mean().item(), *bootstrap_interval(differences, seed=seed)
