"""A memory read once more: the tokens that followed its most similar tokens are mixed into what the model predicts.

This is kNN-LM (Khandelwal et al., 2020, arXiv 1911.00172) without a datastore of its own: two tokens are compared by the keys
and values that a bank holds of them anyway, of all its memory layers and heads side by side. How much the neighbours count
depends on how near they are, as in adaptive retrieval (He et al., 2021, arXiv 2109.04212), by a formula in the place of a
trained network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.backbone.cache_names import as_keyword, cache_of
from longmem.evaluation.systems import MemorySystem, Question
from longmem.evaluation.systems.system import LocalModel
from longmem.memory import MemoryBank
from longmem.memory.protocols import Memory
from longmem.model.modeling import LongMemForCausalLM

ROWS_AT_ONCE = 4096  # of a bank, whose keys and values are copied


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How neighbours are weighed; distances are squared, and relative to that of two tokens of the memory drawn by chance.

    With r the mean distance of the `near` nearest, all neighbours together have the share `1 / (1 + (r / half) ** power)`, and
    each of them, at distance d, a part of it in proportion to `exp(-d / (sharpness * r))`.
    """

    half: float = 0.04
    power: float = 2.0
    sharpness: float = 0.3
    neighbours: int = 64
    near: int = 16


@dataclasses.dataclass(frozen=True)
class Store:
    """What a memory knows of its tokens: the features and the next token of each that has one.

    `scale` is the mean squared distance of two of them drawn by chance.
    """

    features: Float[Tensor, "tokens dim"]
    next_ids: Int[Tensor, " tokens"]
    scale: float

    @classmethod
    def of(cls, model: LongMemForCausalLM, memory: Memory, token_ids: Sequence[int]) -> Store:
        """Return the store of a memory of one document, of which all tokens are there. ValueError for less than two of them."""
        if len(token_ids) < 2:
            raise ValueError(f"`token_ids` must be at least two, got {len(token_ids)}: none has a next one.")
        count, parts = -(-len(token_ids) // memory.chunk_size), []
        generation = memory.generation  # type: ignore[attr-defined]
        for start in range(0, count, ROWS_AT_ONCE):
            rows = torch.arange(start, min(start + ROWS_AT_ONCE, count))
            layers = [
                memory.gather(layer, rows.expand(heads_stored(model, layer), -1), generation)
                for layer in memory.memory_layers
            ]
            parts.append(side_by_side([[part.flatten(1, 2)[None] for part in layer] for layer in layers])[0].half())
        features = torch.cat(parts)[: len(token_ids) - 1]
        variance = features.float().var(dim=0, correction=0).sum()
        return cls(features, torch.tensor(list(token_ids[1:])), max(float(2 * variance), 1e-12))

    def shares(
        self, features: Float[Tensor, "queries dim"], vocab_size: int, mixing: Mixing
    ) -> tuple[Float[Tensor, " queries"], Float[Tensor, "queries vocabulary"]]:
        """Return what share the neighbours of each query have, and what they predict."""
        near = torch.cdist(features.float(), self.features.float()).square() / self.scale
        near, places = near.topk(min(mixing.neighbours, len(self.next_ids)), largest=False)
        typical = near[:, : mixing.near].mean(dim=1, keepdim=True).clamp_min(1e-6)
        weights = (-near / (mixing.sharpness * typical)).softmax(dim=-1)
        predicted = torch.zeros(len(near), vocab_size).scatter_add_(1, self.next_ids[places], weights)
        return 1 / (1 + (typical[:, 0] / mixing.half) ** mixing.power), predicted


def heads_stored(model: LongMemForCausalLM, layer: int) -> int:
    """Return how many key-value heads of a memory layer are stored."""
    heads = model.config.heads_of(layer)
    return model.config.get_text_config().num_key_value_heads if heads is None else len(heads)


def side_by_side(
    layers: Sequence[Sequence[Float[Tensor, "lanes _heads tokens _dim"]]],
) -> Float[Tensor, "lanes tokens dim"]:
    """Return keys and values of all layers and heads as one vector of each token."""
    return torch.cat([part.float().transpose(1, 2).flatten(2) for layer in layers for part in layer], dim=-1)


@dataclasses.dataclass(frozen=True)
class NeighbourModel:
    """What runs in the window: a model that reads a memory, its predictions mixed with those of the memory's neighbours."""

    local: LocalModel
    store: Store
    mixing: Mixing = Mixing()

    def __call__(self, input_ids: Int[Tensor, "rows tokens"], *, logits_to_keep: int = 0, **options: Any) -> Any:
        """Return the model's output; its logits are log-probabilities of the mixture."""
        output = self.local(input_ids, output_memory_keys=True, logits_to_keep=logits_to_keep, **options)
        pairs = zip(output.memory_keys, output.memory_values, strict=True)
        features = side_by_side([[part[:, :, -logits_to_keep:] for part in pair] for pair in pairs])
        share, predicted = self.store.shares(features.flatten(0, 1), output.logits.shape[-1], self.mixing)
        own = output.logits.float().softmax(dim=-1).flatten(0, 1)
        mixed = (1 - share[:, None]) * own + share[:, None] * predicted
        output.logits = mixed.clamp_min(1e-30).log().view_as(output.logits)
        return output

    def generate(self, input_ids: Int[Tensor, "rows tokens"], *, max_new_tokens: int, **options: Any) -> Tensor:
        """Return the tokens and their greedy continuation, up to a stop string."""
        from transformers import StopStringCriteria

        unused = ("attention_mask", "do_sample", "pad_token_id")
        options = {name: value for name, value in options.items() if name not in unused}
        strings, tokenizer = options.pop("stop_strings", None), options.pop("tokenizer", None)
        stops = StopStringCriteria(tokenizer, strings) if strings else lambda ids, _: [False]
        ids, cache = input_ids, options
        for _ in range(max_new_tokens):
            known = next((each.get_seq_length() for each in cache.values() if each is not None), 0)
            output = self(ids[:, known:], logits_to_keep=1, use_cache=True, **cache)
            cache = as_keyword(cache_of(output))
            ids = torch.cat([ids, output.logits[:, -1:].argmax(dim=-1)], dim=1)
            if bool(stops(ids, None)[0]):
                break
        return ids


class NeighbourSystem(MemorySystem):
    """LongMem with memory on, and neighbours in the same memory; as an evaluation's system its name is "neighbours"."""

    mixing = Mixing()
    _store: tuple[MemoryBank, int, Store] | None = None  # of the bank that was read last, and of so many tokens

    def context(self, prefix: Sequence[int], room: int, questions: Sequence[Question]) -> tuple[Any, list[int]]:
        """Return what runs in the window, and the tokens before the questions; without a memory, as with memory on."""
        local, ids = super().context(prefix, room, questions)
        bank = local.memory
        if bank is None or bank.num_tokens < 2:
            return local, ids
        if self._store is None or self._store[:2] != (bank, bank.num_tokens):
            (document,) = bank.documents()
            memorized = bank.token_ids(document.document_id).tolist()
            self._store = bank, bank.num_tokens, Store.of(self.model, bank, memorized)
        return NeighbourModel(local, self._store[2], self.mixing), ids
