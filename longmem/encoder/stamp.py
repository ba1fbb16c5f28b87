"""The encoder stamp: which encoder wrote stored keys and values, said so that two of them can be told apart.

It is plain values. How they come from a model is in `path.py`, so whoever holds a bank alone need not import transformers.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longmem.errors import StaleMemoryError

WEIGHTS, TOKENIZER = "weights", "tokenizer"
# What stamps mean that do not say, so they are no part of a digest.
ALL_HEADS, SINKS_STORED, NO_START = "all", "stored", "no start tokens"
FOR_LIFE = ("memory_layers", "chunk_size", TOKENIZER)  # what a bank holds can't be encoded again to fit another


@dataclass(frozen=True)
class EncoderStamp:
    """What is known of an encoder: a hash of its path's tensors and what else determines what it writes.

    `weights`: hash of names, shapes, dtypes and numbers. `recipe`: plain values by name (sizes, layers, tokenizer, the
    backbone's configuration); empty where only a hash is known. The tokenizer is compared, but no part of `digest`: encoders
    with one digest write the same numbers for the same token ids.
    """

    weights: str
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        """Return one hash of weights and recipe, the encoder's fingerprint; without a recipe, that of the weights."""
        if not self.recipe:
            return self.weights
        numbers = sorted(
            (name, value)
            for name, value in self.recipe.items()
            if name != TOKENIZER and value not in (ALL_HEADS, SINKS_STORED, NO_START)
        )
        text = json.dumps([self.weights, numbers], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def diff(self, other: "EncoderStamp") -> list[str]:
        """Return the names of what differs, `weights` last; a value that one of them does not know is equal to any.

        >>> EncoderStamp("1f", {"chunk_size": 4}).diff(EncoderStamp("2a", {"chunk_size": 8}))
        ['chunk_size', 'weights']
        """
        shared = sorted(self.recipe.keys() | other.recipe.keys()) if self.recipe and other.recipe else []
        pairs = {name: (self.recipe.get(name), other.recipe.get(name)) for name in shared}
        names = [name for name, (mine, theirs) in pairs.items() if mine != theirs and None not in (mine, theirs)]
        return names + [WEIGHTS] * (self.weights != other.weights)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `from_json`."""
        return {"weights": self.weights, "recipe": plain(self.recipe)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "EncoderStamp":
        return cls(content["weights"], content["recipe"])


def plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON makes of a dictionary, so that it equals what was read from a file."""
    return dict(json.loads(json.dumps(dict(content), default=str)))


def refuse_stale(known: EncoderStamp, stamp: EncoderStamp) -> None:
    """Raise StaleMemoryError: the bank was written by the encoder `known`, and is to be read with `stamp`'s."""
    refuse_other_recipe(known, stamp)
    raise StaleMemoryError(
        f"the memory bank was written by encoder {known.digest}, this model's encoder is {stamp.digest}; they differ in "
        f"{', '.join(known.diff(stamp)) or 'weights'}, so what is stored is not what this model would store. Ways out: "
        'encode the bank again, all at once (`refresh="eager"`) or when it is read (`refresh="lazy"`); read it as it is '
        "(`strict=False`): arguments of `MemoryBank.open` and `load`. `longmem bank refresh` does the first for a folder."
    )


def refuse_other_recipe(known: EncoderStamp | None, stamp: EncoderStamp) -> None:
    """Raise StaleMemoryError if the encoders differ in something that no encoding again would put right."""
    if known is None:
        return
    differing = differs_for_life(known, stamp)
    if differing:
        values = "; ".join(f"`{name}` {known.recipe[name]} and {stamp.recipe[name]}" for name in differing)
        raise StaleMemoryError(
            f"the memory bank (encoder {known.digest}) and this model (encoder {stamp.digest}) differ for good: {values}. "
            "Memorize the documents again from their texts, in `MemoryBank.for_model(model)`, or with `longmem bank export` "
            "and `longmem bank add`; without `model` a bank opens for inspection."
        )


def differs_for_life(known: EncoderStamp, stamp: EncoderStamp) -> list[str]:
    """Return in what the encoders differ that no encoding again would put right."""
    return [name for name in known.diff(stamp) if name in FOR_LIFE]
