"""Writing documents: text to token ids, windows, position-free keys and values, bank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from longmem.memory import MemoryBank

if TYPE_CHECKING:
    from longmem.modeling import LongMemForCausalLM


def to_token_ids(model: LongMemForCausalLM, text_or_ids: str | Sequence[int] | Tensor) -> Int[Tensor, " tokens"]:
    """Return token ids of a text, or the given ids, checked.

    Raises:
        ValueError: nothing to encode, not a flat sequence of integers, or ids outside the backbone's vocabulary.
    """
    if isinstance(text_or_ids, str):
        if not text_or_ids.strip():
            raise ValueError("`text_or_ids` must hold some text, got an empty or blank string.")
        text_or_ids = model.tokenizer(text_or_ids, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.as_tensor(text_or_ids)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.is_floating_point() or ids.numel() == 0:
        raise ValueError(
            "`text_or_ids` must be text or one flat sequence of token ids, at least one, "
            f"got shape {tuple(ids.shape)} of {ids.dtype}."
        )
    vocabulary = model.config.get_text_config().vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(
            f"`text_or_ids` must hold ids from 0 to {vocabulary - 1}, the backbone's vocabulary, got "
            f"{int(ids.min())} to {int(ids.max())}; were they made by the tokenizer of another model?"
        )
    return ids.long()


def windows(ids: Int[Tensor, " tokens"], length: int, batch_size: int) -> Iterator[Int[Tensor, "lanes tokens"]]:
    """Yield batches of consecutive windows of `length` tokens; the shorter last one comes alone."""
    whole = ids[: len(ids) // length * length].view(-1, length)
    yield from whole.split(batch_size) if len(whole) else ()
    if len(ids) % length:
        yield ids[len(whole) * length :][None]


def memorize(
    model: LongMemForCausalLM,
    bank: MemoryBank,
    text_or_ids: str | Sequence[int] | Tensor,
    document_id: str,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Encode a document and write it to the bank; see `LongMemForCausalLM.memorize`."""
    ids = to_token_ids(model, text_or_ids)
    device = model.input_device
    done = 0
    write = bank.add
    try:
        for batch in windows(ids, model.config.segment_length, batch_size):
            keys, values = model.encode(batch.to(device))
            for lane, lane_ids in enumerate(batch):
                write(document_id, [k[lane] for k in keys], [v[lane] for v in values], token_ids=lane_ids)
                write = bank.append
            done += batch.numel()
            if progress is not None:
                progress(done, len(ids))
    except BaseException:
        if write == bank.append:
            bank.delete(document_id)
        raise
    return len(ids)
