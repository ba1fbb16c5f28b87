"""Fewer memory heads: what a trained model loses without each, and the same model with those that matter.

Bytes per token, search and the overhead of each reading layer fall with the heads that are kept. A head's cost is measured, not
estimated: the loss on texts with hidden facts and questions, most of whose past is in memory, with that head reading nothing.
Training mends most of what is lost together.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from longmem.data.corpus import load_corpus
from longmem.memory.bank import MemoryBank
from longmem.model.attention import NO_MEMORY
from longmem.model.modeling import LongMemForCausalLM
from longmem.model.side_network import SideLayer
from longmem.settings import Below, From
from longmem.training.setup import reading_layers


class HeadCost(NamedTuple):
    """What a model loses without one key-value head of a memory layer: nats per token."""

    layer: int
    head: int
    cost: float


@dataclasses.dataclass(frozen=True)
class CostSettings:
    """How heads are weighed.

    Args:
        memory_tokens: of each text, in memory; the `segment_length` tokens behind them are read and scored.
        num_texts: texts that are read, the first that are long enough.
        recall_share: of the texts that is questions about hidden facts.
    """

    memory_tokens: Annotated[int, From(1)] = 6144
    num_texts: Annotated[int, From(1)] = 6
    recall_share: Annotated[float, From(0), Below(1)] = 0.3


def keep_heads(
    model: LongMemForCausalLM,
    number: int,
    texts: str | Path,
    settings: CostSettings | None = None,
    console: Console | None = None,
) -> LongMemForCausalLM:
    """Return the model with the `number` memory heads that are worth most (`head_costs`); a console is told what each is.

    Raises:
        ValueError: the model has not so many heads, or no text is long enough.
    """
    there = sum(len(heads_of(layer)) for layer in reading_layers(model))
    if not 1 <= number <= there:
        raise ValueError(f"`number` must be from 1 to {there}, the memory heads of this model, got {number}.")
    costs = head_costs(model, texts, settings)
    for place, each in enumerate(costs):
        if console is not None:
            kept = "kept" if place < number else "left out"
            console.print(
                f"layer {each.layer}, head {each.head}: {each.cost:+.4f} nats without it, {kept}", highlight=False
            )
    return with_heads(model, [each[:2] for each in costs[:number]])


@torch.no_grad()
def head_costs(model: LongMemForCausalLM, texts: str | Path, settings: CostSettings | None = None) -> list[HeadCost]:
    """Return what each memory head is worth, the dearest first: a forward pass for each head and text.

    Args:
        model: a trained model.
        texts: a source of texts, as for `longmem train`.
        settings: how they are weighed.

    Raises:
        ValueError: no text is long enough.
    """
    windows = list(_windows(model, texts, CostSettings() if settings is None else settings))

    def loss() -> float:
        logits = ((model(ids, memory=bank).logits[0, :-1], ids[0, 1:]) for bank, ids in windows)
        return sum(float(functional.cross_entropy(*each)) for each in logits) / len(windows)

    whole, costs = loss(), []
    for layer in reading_layers(model):
        assert layer.memory_layer is not None
        for head in heads_of(layer):
            with without(layer, head):
                costs.append(HeadCost(layer.memory_layer, head, loss() - whole))
    return sorted(costs, key=lambda each: -each.cost)


def heads_of(layer: SideLayer) -> list[int]:
    """Return the key-value heads by which a layer reads."""
    return list(range(layer.num_kv_heads)) if layer.reading_heads is None else list(layer.reading_heads)


@contextmanager
def without(layer: SideLayer, head: int) -> Iterator[None]:
    """Let the query heads of one key-value head read nothing inside the block."""
    assert layer.memory_bias is not None
    own = layer.memory_bias.unflatten(0, (layer.num_kv_heads, -1))[head]
    before = own.clone()
    own.fill_(10 * NO_MEMORY)
    try:
        yield
    finally:
        own.copy_(before)


def with_heads(model: LongMemForCausalLM, heads: Sequence[tuple[int, int]]) -> LongMemForCausalLM:
    """Return a model on the same backbone, with the same weights, that stores and reads by these (layer, head) alone.

    Its side network begins at the first layer that reads: what was trained in layers below is left out.

    Raises:
        ValueError: no head, or one that the model does not have.
    """
    known = {(layer.memory_layer, head) for layer in reading_layers(model) for head in heads_of(layer)}
    if not heads or not known.issuperset(heads):
        raise ValueError(f"`heads` must be some of the model's memory heads, as (layer, head), got {list(heads)}.")
    config = copy.deepcopy(model.config)
    layers = sorted({layer for layer, _ in heads})
    config.memory_heads = None  # the two must fit each other at any time
    config.memory_layers = layers
    config.memory_heads = [sorted(head for at, head in heads if at == layer) for layer in layers]
    made = type(model)(config, model.backbone, model.tokenizer)
    old = {layer.source_layer: layer for layer in model.side_network.layers}
    for layer in made.side_network.layers:
        state = old[layer.source_layer].state_dict()
        layer.load_state_dict({name: state[name] for name in layer.state_dict()})
    final, own = model.side_network.final_modules, made.side_network.final_modules
    if final is not None and own is not None:
        own.load_state_dict(final.state_dict())
    return made.eval()


def _windows(
    model: LongMemForCausalLM, texts: str | Path, settings: CostSettings
) -> Iterator[tuple[MemoryBank, Tensor]]:
    memory_tokens, given, most = settings.memory_tokens, 0, 4 * settings.num_texts
    needed = memory_tokens + model.config.segment_length
    for row in load_corpus(texts, model.tokenizer, recall_share=settings.recall_share, num_documents=most):
        ids = torch.tensor(row["input_ids"])
        if len(ids) < needed:
            continue
        bank = MemoryBank.for_model(model, capacity_tokens=None, index="flat")
        model.memorize(bank, ids[:memory_tokens], "text")
        window, *_ = model.encoder.with_start(ids[None, memory_tokens:needed].to(model.input_device))
        yield bank, window
        given += 1
        if given == settings.num_texts:
            return
    if not given:
        raise ValueError(
            f"`texts` must have documents of at least {needed} tokens, got {str(texts)!r} with none among the first {most}; "
            "ask for fewer `memory_tokens`."
        )
