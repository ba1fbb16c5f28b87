"""Why a bank and an encoder do not go together, said so that the reader knows what to do."""

from __future__ import annotations

from longmem.encoder.stamp import TOKENIZER, EncoderStamp
from longmem.errors import StaleMemoryError

FOR_LIFE = ("memory_layers", "chunk_size", TOKENIZER)  # what a bank holds can't be encoded again to fit another


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


def refuse_unknown_encoder(known: EncoderStamp | None) -> None:
    """Raise StaleMemoryError if nobody knows which encoder wrote a bank that is opened for a model."""
    if known is None:
        raise StaleMemoryError(
            "the bank names no encoder, so nobody knows whether this model can read it; open it without `model`, or make one "
            "with `MemoryBank.for_model(model)`."
        )
