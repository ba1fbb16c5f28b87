"""Replaying one run of a recording: what the model computes inside, and the differences of every recorded tensor."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longmem.memory.protocols import Found
from longmem.model.modeling import LongMemForCausalLM
from longmem.official.memory import OfficialMemory
from longmem.official.newgpt import alibi_bias, alibi_slopes
from longmem.official.recording import Recording
from longmem.official.weights import official_name

Values = dict[str, Tensor]
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


class WatchedMemory(OfficialMemory):
    """A memory that keeps what was found last, or None."""

    found: Found | None = None

    def search(self, layer: int, queries: Tensor, num_chunks: int, *, scaling: float | None = None) -> Found:
        """Return and keep the best rows."""
        self.found = super().search(layer, queries, num_chunks)
        return self.found


@contextlib.contextmanager
def traced(model: LongMemForCausalLM) -> Iterator[Values]:
    """Yield a dictionary that fills with the model's inner values while it runs inside the block."""
    values: Values = {}
    handles: list[Any] = []

    def keep_input(module: Any, name: str) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            values[name] = args[0].detach()

        handles.append(module.register_forward_pre_hook(hook))

    def keep_output(module: Any, *names: str) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept = output[0] if isinstance(output, tuple) else output
            values.update(dict.fromkeys(names, kept.detach()))

        handles.append(module.register_forward_hook(hook))

    decoder: Any = model.backbone.transformer
    for number, layer in enumerate(decoder.h):
        keep_input(layer, f"backbone_hidden/{number}")
    keep_output(decoder.ln_f, f"backbone_hidden/{len(decoder.h)}")
    for letter in "qkv":
        stored = decoder.h[(model.config.memory_layers or [0])[0]].attn
        keep_output(getattr(stored, f"{letter}_proj"), f"backbone_qkv/{letter}")
    side: Any = model.side_network
    for number, layer in enumerate(side.layers):
        keep_input(layer, f"side_hidden/{number}")
        reads = layer.memory_layer is not None
        keep_output(layer.layer.attn, f"side_attn_out/{number}", *(["mem_layer/attn_out"] if reads else []))
        if reads:
            keep_output(layer.layer.ln_1, "mem_layer/ln_out")
            keep_output(layer.layer.attn.q_proj, "mem_layer/query")
    keep_input(side.final_modules[0], f"side_hidden/{len(side.layers)}")
    keep_output(side.final_modules[-1], "features")
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def forward_values(
    model: LongMemForCausalLM, memory: WatchedMemory, input_ids: Tensor, target: Tensor | None, pad_id: int
) -> tuple[Values, Callable[..., Tensor]]:
    """Return everything of one step that a recording may hold, before the step is written; and `select`.

    With a target the model is in training mode, and loss and gradients are there too. `select(name, tensor)` takes out
    what belongs to padding, where the released code's memory layer lets padding see more padding.
    """
    mask = input_ids.ne(pad_id)
    memory.found = None
    model.train(target is not None)
    model.zero_grad()
    with traced(model) as values, torch.set_grad_enabled(target is not None):
        output = model(input_ids, attention_mask=mask.long(), memory=memory)
        with torch.no_grad():
            values["backbone_logits"] = model.backbone(input_ids, attention_mask=mask.long()).logits
    values["logits"] = output.logits.detach()
    slopes = alibi_slopes(model.backbone.config.num_attention_heads)
    values["alibi"] = alibi_bias(slopes, mask.float())
    if memory.found is not None:
        values.update(retrieval_values(memory, *input_ids.shape))
    if target is not None:
        # Summed in double precision: a sum of float32 terms has a last digit above the tolerance.
        loss = nn.functional.cross_entropy(
            output.logits.double().flatten(0, 1), target.flatten(), ignore_index=pad_id, reduction="sum"
        )
        loss.backward()
        values["loss_sum"] = loss.detach()
    model.eval()

    def select(name: str, tensor: Tensor) -> Tensor:
        if mask.all() or not name.startswith(("logits", "features", "side_", "mem_layer/")):
            return tensor
        if name.startswith("mem_layer/knn"):
            return tensor[:, mask.T.flatten()]
        if name.startswith("mem_layer/retrieved"):
            return tensor[mask.repeat_interleave(len(tensor) // len(mask), dim=0)]
        return tensor[mask]

    return values, select


def retrieval_values(memory: WatchedMemory, lanes: int, tokens: int) -> Values:
    """Return what was found, in the released layouts: a search row is `t * lanes + lane`, a read row `lane * heads + head`."""
    assert memory.found is not None
    rows, scores = (part.unflatten(1, (lanes, tokens)).transpose(1, 2) for part in memory.found[:2])
    keys, values = (
        part.unflatten(1, rows.shape[1:]).permute(2, 0, 1, 3, 4, 5).flatten(3, 4).flatten(0, 1)
        for part in memory.gather(memory.memory_layers[0], rows.flatten(1), memory.generation)
    )
    return {
        "mem_layer/knn_index": rows.masked_fill(rows == memory.zero_row, -1).flatten(1, 2),
        "mem_layer/knn_score": scores.flatten(1, 2),
        "mem_layer/retrieved_k": keys,
        "mem_layer/retrieved_v": values,
    }


def memory_values(memory: OfficialMemory, when: str) -> Values:
    """Return the memory's counters and, after a step, its content."""
    count = torch.tensor(memory.num_chunks)
    counters = {f"memory/ntotal_{when}": count, f"memory/dstore_{when}": count}
    if when == "before" or not memory.keys.numel():
        return counters
    stored = {"memory/keys": memory.keys, "memory/vals": memory.values}
    return {**counters, **stored, "memory/index_keys": memory.search_keys}


def replay(recording: Recording, model: LongMemForCausalLM, run: str, *, is_fed: bool) -> Iterator[tuple[str, float]]:
    """Yield (family, difference) for every recorded tensor of a run of the recorded model.

    `is_fed`: write the recorded keys and values to the memory, not the model's own.
    Raises ReleasedCodeError if the run needs what the released code gets wrong.
    """
    memory = recording.new_memory(run, WatchedMemory)
    for number in recording.runs[run]:
        recorded = recording.step(run, number)
        if recorded.keys() >= {"mem_layer/knn_index", "mem_layer/knn_score"}:
            # Score 0, as it is used, where FAISS wrote the lowest number for a missing slot.
            is_missing = recorded["mem_layer/knn_index"] < 0
            recorded["mem_layer/knn_score"] = recorded["mem_layer/knn_score"].masked_fill(is_missing, 0.0)
        values = memory_values(memory, "before")
        forward, select = forward_values(model, memory, recorded["input_ids"], recorded.get("target"), recording.pad_id)
        values |= forward
        for name, parameter in model.side_network.named_parameters():
            if parameter.grad is not None:
                values[f"grad/{official_name(name)}"] = parameter.grad
        # A step that did not write, though it had chunks, has left its write pointer where it was.
        before, after = (recorded.get(f"memory/dstore_{when}") for when in ("before", "after"))
        has_moved = before is None or after is None or int(before) != int(after)
        if has_moved or recorded["input_ids"].numel() < memory.chunk_size:
            source = recorded if is_fed else values
            heads = model.backbone.config.num_attention_heads
            memory.write(*([source[f"backbone_qkv/{x}"].unflatten(-1, (heads, -1)).transpose(1, 2)] for x in "kv"))
        values |= memory_values(memory, "after")
        yield from differences(values, recorded, select, is_fed)


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
            scale = 1.0  # sums are as imprecise in float32 as they are large
            if family == "retrieval scores":
                scale = max(1.0, float(expected.abs().max()))
            elif family == "loss":
                scale = float(recorded["target"].numel())
            yield family, distance(select(name, values[name]), select(name, expected)) / scale
            if is_fed and family == "stored keys and values":
                yield "rows not bit-equal", float((values[name] != expected).sum())
    if any(name.startswith("grad/") for name in recorded):
        for name in values.keys() - recorded.keys():
            if name.startswith("grad/"):
                yield "gradients", float(values[name].abs().max())


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
