"""How far an encoder may move before a memory that it wrote earlier finds too little: the bound of a refresh policy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from longmem.memory import MemoryBank
from longmem.memory.index.tuning import recall
from longmem.memory.memorize import encodable
from longmem.model.index_queries import QueryRecorder
from longmem.model.modeling import LongMemForCausalLM

QUERIES = 512  # for each key-value head and layer, evenly spaced in what is read


@dataclass(frozen=True)
class GapPoint:
    """What was measured at one point of the way from the old weights to the new.

    `share`: of the way, 0 to 1. `gap`: how far the encoder has moved there, as the clock "gap" measures it. `drift`: how far
    the chunks' search keys have moved, relative to their length. `recall`: share of the best chunks by fresh keys that are
    also the best by the old ones.
    """

    share: float
    gap: float
    drift: float
    recall: float


@dataclass(frozen=True)
class GapCalibration:
    """The largest gap that still gives a wanted recall, and what it was found from.

    `gap`: interpolated between measured points. `is_reached`: whether recall fell below the target on the way; if not, `gap`
    is that of the new weights, and more may be allowed. `points`: from the old weights to the new.
    """

    gap: float
    is_reached: bool
    target_recall: float
    num_chunks: int
    points: tuple[GapPoint, ...]

    @property
    def refresh(self) -> str:
        """Return the refresh policy that this allows: the name for `MemoryBank(refresh=...)`.

        >>> GapCalibration(0.00123456, True, 0.95, 16, ()).refresh
        'bounded:clock=gap,max_lag=0.001234'
        """
        digits = 3 - math.floor(math.log10(self.gap)) if self.gap else 0
        return f"bounded:clock=gap,max_lag={math.floor(self.gap * 10**digits) / 10**digits:g}"


@torch.no_grad()
def calibrate_gap(
    old_model: LongMemForCausalLM,
    new_model: LongMemForCausalLM,
    text_or_ids: str | Sequence[int] | Tensor,
    *,
    target_recall: float = 0.95,
    num_chunks: int = 16,
    steps: int = 6,
    num_windows: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> GapCalibration:
    """Return how large a gap still gives this recall: the bound for "bounded" with the clock "gap".

    All weights move in a straight line from the old model's to the new one's, to 1/2^(steps-1) of the way, twice as far, and so
    on. At each point the model in between reads the end of the text, with the rest in its memory, and its queries are
    compared with the keys that it writes itself and with those of the old model. Everything is computed in float32, where
    small moves do not drown in rounding, in a copy: it takes (steps + 1) times the encoding of the text, and the memory of
    one more model.

    Args:
        old_model: whose keys a bank holds.
        new_model: the same architecture and settings, with weights that such changes lead to: a later checkpoint, or one
            fine-tuned on a little of what is to come.
        text_or_ids: of the kind that is memorized and read.
        target_recall: share of the best chunks that must still be found, above 0 and up to 1.
        num_chunks: how many best chunks are compared.
        steps: points that are measured.
        num_windows: windows of `segment_length` tokens at the end of the text that are read, and not memorized.
        progress: called with (points done, points in all).

    Raises:
        ValueError: an argument breaks these rules, the models differ in more than weights, or the text is too short.
    """
    length = old_model.config.segment_length
    ids = encodable(old_model, text_or_ids).token_ids
    validate(old_model, new_model, len(ids), target_recall, num_chunks, steps, num_windows)
    memorized, read = ids[: -num_windows * length], ids[-num_windows * length :]
    moved = copy.deepcopy(old_model).float().eval()
    sketch = moved.encoder.sketch()
    stale = search_keys(written_by(moved, memorized))
    points = [GapPoint(0.0, 0.0, 0.0, 1.0)]
    for step in range(steps):
        share = 2.0 ** (step - steps + 1)
        move(moved, old_model, new_model, share)
        bank = written_by(moved, memorized)
        fresh = search_keys(bank)
        found = [
            recall(top(queries, stale[layer], num_chunks), top(queries, fresh[layer], num_chunks))
            for layer, queries in asked(moved, bank, read).items()
        ]
        drifts = [float((fresh[layer] - old).norm() / fresh[layer].norm()) for layer, old in stale.items()]
        gap = moved.encoder.sketch().gap(sketch)
        points.append(GapPoint(share, gap, sum(drifts) / len(drifts), sum(found) / len(found)))
        if progress is not None:
            progress(step + 1, steps)
    gap, is_reached = largest_gap(points, target_recall)
    return GapCalibration(gap, is_reached, target_recall, num_chunks, tuple(points))


def largest_gap(points: Sequence[GapPoint], target_recall: float) -> tuple[float, bool]:
    """Return the gap at which recall first falls below the target, interpolated, and whether it ever does.

    >>> largest_gap([GapPoint(0, 0, 0, 1.0), GapPoint(0.5, 8.0, 0, 0.75), GapPoint(1, 16.0, 0, 0.25)], 0.5)
    (12.0, True)
    """
    for before, after in zip(points, points[1:], strict=False):
        if after.recall < target_recall:
            share = (before.recall - target_recall) / (before.recall - after.recall)
            return before.gap + share * (after.gap - before.gap), True
    return points[-1].gap, False


def move(moved: LongMemForCausalLM, old: LongMemForCausalLM, new: LongMemForCausalLM, share: float) -> None:
    """Set the weights of `moved` to those at a share of the way from the old model's to the new one's."""
    start, end = weights_of(old), weights_of(new)
    for name, tensor in weights_of(moved).items():  # shares its memory with the model
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(start[name].to(tensor), end[name].to(tensor), share))


def weights_of(model: LongMemForCausalLM) -> dict[str, Tensor]:
    """Return all weights by name, those of the side network and those of the backbone, which is no submodule of a model."""
    return {f"backbone.{name}": each for name, each in model.backbone.state_dict().items()} | model.state_dict()


def written_by(model: LongMemForCausalLM, ids: Tensor) -> MemoryBank:
    """Return a bank that holds these tokens, encoded by a model, and is searched exactly."""
    bank = MemoryBank.for_model(model, index="exact", capacity_tokens=None)
    model.memorize(bank, ids, "text")
    return bank


def search_keys(bank: MemoryBank) -> dict[int, Float[Tensor, "_kv_heads _chunks _dim"]]:
    """Return the search keys of each memory layer."""
    return {layer: bank.search_keys(layer) for layer in bank.memory_layers}


def asked(
    model: LongMemForCausalLM, bank: MemoryBank, ids: Tensor
) -> dict[int, Float[Tensor, "_kv_heads _queries _dim"]]:
    """Return for each memory layer the queries with which a model searches the bank while it reads these tokens."""
    recorder, length = QueryRecorder(bank), model.config.segment_length
    for start in range(0, len(ids), length):
        window, *_ = model.encoder.with_start(ids[None, start : start + length].to(model.input_device))
        model(window, memory=recorder, logits_to_keep=1)
    found = {layer: torch.cat(parts, dim=1) for layer, parts in recorder.queries.items()}
    return {
        layer: queries[:, torch.linspace(0, queries.shape[1] - 1, min(QUERIES, queries.shape[1])).long()]
        for layer, queries in found.items()
    }


def top(
    queries: Float[Tensor, "_kv_heads _queries _dim"], keys: Float[Tensor, "_kv_heads _chunks _dim"], num_chunks: int
) -> Tensor:
    """Return the best chunks of each query, by inner product."""
    return (queries.to(keys) @ keys.transpose(1, 2)).topk(num_chunks, dim=2).indices


def validate(
    old: LongMemForCausalLM,
    new: LongMemForCausalLM,
    num_tokens: int,
    target_recall: float,
    num_chunks: int,
    steps: int,
    num_windows: int,
) -> None:
    """Raise ValueError for what can't be measured."""
    if not 0 < target_recall <= 1:
        raise ValueError(f"`target_recall` must be above 0 and at most 1, got {target_recall}.")
    for name, value in (("num_chunks", num_chunks), ("steps", steps), ("num_windows", num_windows)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    shapes = [{name: tuple(each.shape) for name, each in weights_of(model).items()} for model in (old, new)]
    if shapes[0] != shapes[1]:
        names = sorted(shapes[0].items() ^ shapes[1].items())
        raise ValueError(
            f"`old_model` and `new_model` must have weights of the same names and shapes, and differ in {names[0][0]}; give "
            "two checkpoints of one model."
        )
    differing = [name for name in old.encoder_stamp().diff(new.encoder_stamp()) if name not in ("weights", "dtype")]
    if differing:
        raise ValueError(
            f"`old_model` and `new_model` must differ in weights only, and differ in {', '.join(differing)}; give both the "
            "same settings."
        )
    needed = num_windows * old.config.segment_length + 2 * num_chunks * old.config.chunk_size
    if num_tokens < needed:
        raise ValueError(
            f"`text_or_ids` must hold at least {needed} tokens, {num_windows} windows to read and twice {num_chunks} chunks to "
            f"choose from, got {num_tokens}; give a longer text."
        )
