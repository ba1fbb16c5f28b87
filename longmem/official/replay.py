"""Replaying one run of a recording, and the differences of every tensor in it."""

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from longmem.model.modeling import LongMemForCausalLM
from longmem.official.recording import Recording
from longmem.official.trace import Values, WatchedMemory, forward_values, memory_values
from longmem.official.weights import official_name

Select = Callable[[str, Tensor], Tensor]
TIE = 1e-5  # scores closer than this are equal: chunks of padding are, and their order means nothing
# Families of tensors, by the beginnings of their names, in the order in which they are shown.
FAMILIES: dict[str, tuple[str, ...]] = {
    "logits": ("logits",),
    "features": ("features",),
    "side hidden states": ("side_hidden/",),
    "side attention outputs": ("side_attn_out/", "mem_layer/attn_out", "mem_layer/ln_out"),
    "queries": ("mem_layer/query",),
    "retrieval scores": ("mem_layer/knn_score",),
    "retrieved keys and values": ("mem_layer/retrieved_",),
    "backbone hidden states": ("backbone_hidden/", "alibi"),
    "backbone logits": ("backbone_logits",),
    "backbone projections": ("backbone_qkv/",),
    "index keys": ("memory/index_keys",),
    "stored keys and values": ("memory/keys", "memory/vals"),
    "loss": ("loss_sum",),
    "gradients": ("grad/",),
    "weights copied at start": ("reload_sd/",),
    "retrieved indices": ("mem_layer/knn_index",),
    "memory counters": ("memory/ntotal", "memory/dstore"),
    "rows not bit-equal": ("rows",),
}
COUNTED = ("retrieved indices", "memory counters", "rows not bit-equal")  # numbers of entries that differ: 0 or wrong
STORED = ("retrieved keys and values", "stored keys and values")
INPUTS = ("input_ids", "target")
UNKNOWN = "not compared"  # the family of names that nothing here answers to


def replay(recording: Recording, model: LongMemForCausalLM, run: str, *, is_fed: bool) -> Iterator[tuple[str, float]]:
    """Yield (family, difference) for every recorded tensor of a run.

    Args:
        recording: what to compare with.
        model: the recorded model.
        run: its name.
        is_fed: write the recorded keys and values to the memory, not the model's own.

    Raises:
        ReleasedCodeError: the run needs what the released code gets wrong.
    """
    memory = recording.new_memory(run, WatchedMemory)
    for number in recording.runs[run]:
        recorded = without_sentinels(recording.step(run, number))
        values = memory_values(memory, "before")
        forward, select = forward_values(model, memory, recorded["input_ids"], recorded.get("target"), recording.pad_id)
        values |= forward
        for name, parameter in model.side_network.named_parameters():
            if parameter.grad is not None:
                values[f"grad/{official_name(name)}"] = parameter.grad
        if not is_read_only(recorded, recorded["input_ids"].numel() // memory.chunk_size):
            source = recorded if is_fed else values
            heads = model.backbone.config.num_attention_heads
            memory.write(*([source[f"backbone_qkv/{x}"].unflatten(-1, (heads, -1)).transpose(1, 2)] for x in "kv"))
        values |= memory_values(memory, "after")
        yield from differences(values, recorded, select, is_fed)


def is_read_only(recorded: Values, num_new: int) -> bool:
    """Return whether a step did not write, though it had chunks: its write pointer stayed where it was."""
    before, after = recorded.get("memory/dstore_before"), recorded.get("memory/dstore_after")
    return num_new > 0 and before is not None and after is not None and int(before) == int(after)


def without_sentinels(recorded: Values) -> Values:
    """Return a step with score 0, as it is used, where FAISS wrote the lowest number for a missing slot."""
    index, score = (recorded.get(f"mem_layer/knn_{what}") for what in ("index", "score"))
    if index is None or score is None:
        return recorded
    return {**recorded, "mem_layer/knn_score": score.masked_fill(index < 0, 0.0)}


def differences(values: Values, recorded: Values, select: Select, is_fed: bool) -> Iterator[tuple[str, float]]:
    """Yield (family, difference) for each recorded tensor, and for gradients that the released code has not."""
    for name, expected in recorded.items():
        family = next((family for family, starts in FAMILIES.items() if name.startswith(starts)), UNKNOWN)
        if name in INPUTS or (name.startswith("memory/") and name not in values):
            continue  # a memory that was never written to has no rows yet
        if family != "gradients" and name not in values:
            family = UNKNOWN
        if family == UNKNOWN:
            yield family, 1.0
        elif name not in values:
            yield family, math.inf  # a gradient that the released code has and this package has not
        elif family == "retrieved indices":
            yield family, misplaced(values, recorded, select)
        elif family in COUNTED:
            yield family, float((values[name] != expected).sum())
        else:
            scale = unit(family, expected, recorded)
            yield family, distance(select(name, values[name]), select(name, expected)) / scale
            if is_fed and family == "stored keys and values":
                yield "rows not bit-equal", float((values[name] != expected).sum())
    if any(name.startswith("grad/") for name in recorded):
        for name in values.keys() - recorded.keys():
            if name.startswith("grad/"):
                yield "gradients", float(values[name].abs().max())


def unit(family: str, expected: Tensor, recorded: Values) -> float:
    """Return what one unit of a family's difference is: sums are as imprecise in float32 as they are large."""
    if family == "retrieval scores":
        return max(1.0, float(expected.abs().max()))
    return float(recorded["target"].numel()) if family == "loss" else 1.0


def distance(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference, inf for another shape."""
    if one.shape != other.shape:
        return math.inf
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0


def misplaced(values: Values, recorded: Values, select: Select) -> float:
    """Return the number of retrieved chunks that are not the recorded ones, apart from ties."""
    index, score = "mem_layer/knn_index", "mem_layer/knn_score"
    if values[index].shape != recorded[index].shape:
        return math.inf
    wrong = values[index] != recorded[index]
    if score in recorded:
        wrong &= (values[score] - recorded[score]).abs() > TIE
    return float(select(index, wrong).sum())
