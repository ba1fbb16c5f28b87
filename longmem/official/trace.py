"""What one forward pass of a converted model computes inside, under the names and in the layouts of a recording."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longmem.memory.protocols import Found
from longmem.model.modeling import LongMemForCausalLM
from longmem.official.memory import OfficialMemory
from longmem.official.newgpt import alibi_bias, alibi_slopes

Values = dict[str, Tensor]


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
    rows, scores = (
        part.unflatten(1, (lanes, tokens)).transpose(1, 2) for part in (memory.found.rows, memory.found.scores)
    )
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
    return counters | {
        "memory/index_keys": memory.search_keys,
        "memory/keys": memory.keys,
        "memory/vals": memory.values,
    }
