"""Loss of every token of a text under several systems, on the same windows: does it help to remember, and what?"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longmem.evaluation.intervals import bootstrap_interval
from longmem.memory import BankView, MemoryBank
from longmem.model.modeling import LongMemForCausalLM

# In the order of the tables. "wrong" reads another document's memory: what it gains over "off" is not from remembering.
SYSTEMS = ("backbone", "off", "on", "wrong")


@dataclasses.dataclass(frozen=True)
class WindowScores:
    """Losses of one system, in nats, and the seconds that its `num_tokens` scored tokens took, writing included.

    `memory_share` is the weight of memory in the attention of each reading layer and head, averaged over tokens; None
    where nothing was read.
    """

    losses: Float[Tensor, "windows scored"]
    seconds: float
    num_tokens: int
    memory_share: Float[Tensor, "layers heads"] | None = None

    @property
    def loss(self) -> float:
        """Return the mean loss of a token, in nats."""
        return self.losses.double().mean().item()

    @property
    def perplexity(self) -> float:
        """Return e to the mean loss."""
        return math.exp(self.loss)

    @property
    def tokens_per_second(self) -> float:
        """Return scored tokens per second; with a stride, a token is read several times and counts once."""
        return self.num_tokens / self.seconds

    def last(self, scored: int) -> WindowScores:
        """Return the scores of the last tokens of every window; the time of a scored token is taken as it was."""
        losses = self.losses[:, self.losses.shape[1] - scored :].clone()  # files hold no two views of one tensor
        seconds = self.seconds * losses.numel() / self.losses.numel()
        return dataclasses.replace(self, losses=losses, seconds=seconds, num_tokens=losses.numel())


def validate_windows(num_tokens: int, window: int, stride: int | None) -> int:
    """Return the stride. Raises ValueError if window and stride do not fit each other or the text."""
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(
            f"`window` must be at least 2 tokens and `stride` from 1 to `window`, got {window} and {stride}."
        )
    if num_tokens < window:
        raise ValueError(f"`token_ids` must fill a window of {window} tokens, got {num_tokens}; choose a smaller one.")
    return stride


def strided_windows(
    token_ids: Int[Tensor, " tokens"], window: int, stride: int
) -> Iterator[tuple[int, Int[Tensor, "1 window"]]]:
    """Yield (start, tokens) of each whole window, starts being `stride` apart."""
    for start in range(0, len(token_ids) - window + 1, stride):
        yield start, token_ids[None, start : start + window]


def token_losses(
    logits: Float[Tensor, "1 kept vocabulary"], token_ids: Int[Tensor, "1 tokens"]
) -> Float[Tensor, " scored"]:
    """Return the loss of the last tokens, as many as logits were kept but one, in float32 on the CPU."""
    targets = token_ids[0, token_ids.shape[1] - logits.shape[1] + 1 :]
    return nn.functional.cross_entropy(logits[0, :-1].float(), targets, reduction="none").cpu()


@torch.no_grad()
def score_windows(
    model: LongMemForCausalLM,
    token_ids: Int[Tensor, " tokens"],
    *,
    window: int,
    stride: int | None = None,
    memory: MemoryBank | BankView | None = None,
    grow: str | None = None,
    backbone_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> WindowScores:
    """Return the losses of a text that is read in windows; a rest shorter than a stride is left out.

    Without a stride windows do not overlap, and the first token of each has nothing before it and is not scored. With
    a stride only the last `stride` tokens of each window are scored: each has at least `window - stride` before it.

    Args:
        model: read from; its mode is the caller's business.
        token_ids: the text, which should start where the memory ends.
        window: tokens the model sees at once.
        stride: tokens from one window to the next; default `window`.
        memory: what to read beside the window; None reads nothing.
        grow: document of `memory` that takes in every token as it leaves the window, so that a token is in the window
            or in memory, never in both. `memory` is changed.
        backbone_only: run the plain backbone, without side network.
        progress: called with (tokens scored, tokens in all) after every window.

    Raises:
        ValueError: the text does not fill a window, or `grow` asks for what `memory` cannot do.
    """
    stride = validate_windows(len(token_ids), window, stride)
    if grow is not None and not isinstance(memory, MemoryBank):
        raise ValueError(f"`grow` needs a MemoryBank as `memory`, got {type(memory).__name__}.")
    device = model.input_device
    num_windows = (len(token_ids) - window) // stride + 1
    scored = min(stride, window - 1)
    losses, shares, seconds = [], [], 0.0
    for done, (_, ids) in enumerate(strided_windows(token_ids.to(device), window, stride), start=1):
        start = time.perf_counter()
        if backbone_only:
            logits = model.backbone(ids, use_cache=False, logits_to_keep=scored + 1).logits
        else:
            output = model(ids, memory=memory, output_memory_reads=True, logits_to_keep=scored + 1)
            logits = output.logits
            if output.memory_reads:
                shares.append(torch.stack([read.memory_share[0].mean(dim=-1) for read in output.memory_reads]).cpu())
        losses.append(token_losses(logits, ids))
        if grow is not None:
            keys, values = (
                [part[0, :, :stride] for part in parts] for parts in (output.memory_keys, output.memory_values)
            )
            memory.append(grow, keys, values, token_ids=ids[0, :stride])  # type: ignore[union-attr]
        seconds += time.perf_counter() - start  # `token_losses` has waited for the device
        if progress is not None:
            progress(done * scored, num_windows * scored)
    memory_share = torch.stack(shares).mean(dim=0) if shares else None
    return WindowScores(torch.stack(losses), seconds, num_windows * scored, memory_share)


def compare_systems(
    model: LongMemForCausalLM,
    token_ids: Int[Tensor, " tokens"],
    *,
    memory: MemoryBank,
    wrong_memory: MemoryBank,
    window: int,
    stride: int | None = None,
    grow: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, WindowScores]:
    """Return the scores of every one of `SYSTEMS` on the same tokens.

    Args:
        model: read from.
        token_ids: the text after what is in `memory`.
        memory: holds the text before.
        wrong_memory: holds as many tokens of another text.
        window: tokens the model sees at once.
        stride: see `score_windows`.
        grow: see `score_windows`; only `memory` grows.
        progress: called with (system, tokens scored, tokens in all).
    """
    settings: Mapping[str, dict[str, Any]] = {
        "backbone": {"backbone_only": True},
        "off": {},
        "on": {"memory": memory, "grow": grow},
        "wrong": {"memory": wrong_memory},
    }
    scores = {}
    for system in SYSTEMS:
        report = None if progress is None else lambda done, total, name=system: progress(name, done, total)
        scores[system] = score_windows(
            model, token_ids, window=window, stride=stride, progress=report, **settings[system]
        )
    return scores


def pooled(groups: Sequence[Mapping[str, WindowScores]]) -> dict[str, WindowScores]:
    """Return scores over several texts, each of which counts the same: a row of losses is the mean of a text.

    So intervals are over texts; those of a single text stay over its windows.
    """
    if len(groups) == 1:
        return dict(groups[0])
    found = {}
    for system in groups[0]:
        results = [group[system] for group in groups]
        means = torch.stack([result.losses.mean() for result in results]).unsqueeze(1)
        seconds, tokens = sum(result.seconds for result in results), sum(result.num_tokens for result in results)
        found[system] = WindowScores(means, seconds, tokens)
    return found


def loss_difference(scores: WindowScores, baseline: WindowScores, seed: int = 0) -> tuple[float, float, float]:
    """Return by how many nats the loss of `scores` is below that of `baseline`, and the interval of that."""
    differences = (baseline.losses - scores.losses).mean(dim=1)
    return differences.double().mean().item(), *bootstrap_interval(differences, seed=seed)
