"""The door of the memory bank: every argument is checked here, once, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from longmem.errors import did_you_mean, name_known
from longmem.memory.rows.documents import Document, SourcePart
from longmem.memory.rows.storage import STORAGE_DTYPES, LayerShape, largest_number

FIRST_DATE, LAST_DATE = -62_135_596_800, 253_402_300_799  # those that a calendar shows
SEARCHES = ("chunk_mean", "token")
LARGEST_TOKEN_ID = 2**31 - 1  # a bank on disk keeps ids in four bytes


def validate_choice(argument: str, value: object, known: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of the known names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"`{argument}` must be one of the known names, got {value!r}; {name_known(value, known)}")


def validate_storage_dtype(value: object, known: Mapping[str, torch.dtype] = STORAGE_DTYPES) -> torch.dtype:
    """Return the dtype, one of the `known`, that is meant by a torch dtype or by its name.

    >>> validate_storage_dtype("bfloat16")
    torch.bfloat16
    """
    name = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    validate_choice("storage_dtype", name, known)
    return known[str(name)]


def validate_count(argument: str, value: object) -> None:
    """Raise ValueError unless `value` is an integer of at least one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{argument}` must be an integer of at least 1, got {value!r}.")


def validate_search(search: str) -> str:
    """Return what a search compares; raise ValueError if there is no such thing."""
    if search not in SEARCHES:
        raise ValueError(
            f"`search` must be one of {', '.join(SEARCHES)}, got {search!r}.{did_you_mean(str(search), SEARCHES)}"
        )
    return search


def validate_sizes(
    memory_layers: Sequence[int], chunk_size: int, capacity_tokens: int | None, capacity_bytes: int | None
) -> None:
    """Raise ValueError unless the layers are distinct indices and the capacity, if any, is a whole number of chunks."""
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in memory_layers)
    if not whole or not memory_layers or len(set(memory_layers)) < len(memory_layers):
        raise ValueError(
            "`memory_layers` must be distinct backbone layer indices, counted from 0, and at least one of them, "
            f"got {tuple(memory_layers)}; for a model, `MemoryBank.for_model(model)` reads them from its config."
        )
    validate_count("chunk_size", chunk_size)
    if capacity_bytes is not None:
        validate_count("capacity_bytes", capacity_bytes)
    if capacity_tokens is None:
        return
    validate_count("capacity_tokens", capacity_tokens)
    if capacity_tokens < chunk_size:
        raise ValueError(
            f"`capacity_tokens` must hold at least one chunk, got {capacity_tokens} with `chunk_size` {chunk_size}; "
            f"the smallest capacity is {chunk_size}."
        )
    if capacity_tokens % chunk_size:
        below = capacity_tokens - capacity_tokens % chunk_size
        raise ValueError(
            f"`capacity_tokens` must be a multiple of `chunk_size`, got {capacity_tokens} and {chunk_size}; "
            f"the nearest below is {below}, the nearest above {below + chunk_size}."
        )


def validate_document_id(argument: str, document_id: object) -> None:
    """Raise ValueError unless the id is text that is not empty."""
    if not isinstance(document_id, str) or not document_id:
        raise ValueError(f"`{argument}` must be a string that is not empty, got {document_id!r}; name the document.")


def validate_known(argument: str, document_id: object, known: Collection[str]) -> None:
    """Raise ValueError unless the bank holds this document."""
    validate_document_id(argument, document_id)
    if document_id not in known:
        raise ValueError(
            f"`{argument}` must name a document of the bank, got {document_id!r}, which was never added or has been "
            f"deleted or evicted; {name_known(document_id, known)} `add` starts a new document."
        )


def validate_new(argument: str, document_id: object, known: Collection[str]) -> None:
    """Raise ValueError if the id is taken."""
    validate_document_id(argument, document_id)
    if document_id in known:
        raise ValueError(
            f"`{argument}` must be new to the bank, got {document_id!r}, which it holds already; `append` continues a "
            "document, `update` replaces it, `delete` makes room for another of that name."
        )


def validate_key_values(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    memory_layers: Sequence[int],
    known_shapes: Sequence[LayerShape] | None,
    storage_dtype: torch.dtype,
) -> int:
    """Return the number of tokens, after a check of shapes, dtypes and numbers.

    `known_shapes`: what earlier writes have fixed, None before the first.
    """
    for argument, tensors in (("keys", keys), ("values", values)):
        if not isinstance(tensors, Sequence | Tensor) or len(tensors) != len(memory_layers):
            got = f"{len(tensors)} of them" if isinstance(tensors, Sequence | Tensor) else type(tensors).__name__
            raise ValueError(
                f"`{argument}` must be a sequence with one tensor for each memory layer, got {got} for layers "
                f"{tuple(memory_layers)}; pass a list, also for one layer."
            )
        for layer, tensor in zip(memory_layers, tensors, strict=True):
            if not isinstance(tensor, Tensor) or tensor.ndim != 3 or not tensor.is_floating_point():
                got = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(
                    f"`{argument}` must be floating-point tensors (kv_heads, tokens, dim), got {got} for layer "
                    f"{layer}; a bank stores one row of a batch at a time."
                )
    num_tokens = keys[0].shape[1]
    if not num_tokens:
        raise ValueError("`keys` must hold at least one token, got zero tokens; leave out empty documents.")
    for position, (layer, key, value) in enumerate(zip(memory_layers, keys, values, strict=True)):
        if key.shape[:2] != value.shape[:2] or key.shape[1] != num_tokens or not key.numel() or not value.numel():
            raise ValueError(
                "`keys` and `values` must agree in heads, and in tokens across all layers, with no size of zero, got "
                f"{tuple(key.shape)} and {tuple(value.shape)} for layer {layer}, with {num_tokens} tokens in layer "
                f"{memory_layers[0]}; pass the keys and values of one forward pass."
            )
        known = None if known_shapes is None else known_shapes[position]
        shape = LayerShape(key.shape[0], key.shape[2], value.shape[2], known is not None and known.by_token)
        if known is not None and shape != known:
            raise ValueError(
                f"`keys` and `values` of layer {layer} must fit what the bank holds, {known}, got "
                f"{shape}; use one bank for each model, or `clear()` this one."
            )
    _validate_numbers(keys, values, memory_layers, storage_dtype)
    return num_tokens


def _validate_numbers(
    keys: Sequence[Tensor], values: Sequence[Tensor], memory_layers: Sequence[int], storage_dtype: torch.dtype
) -> None:
    """Raise ValueError for NaN, inf, and numbers that rounding to the storage dtype would turn into inf."""
    limit = largest_number(storage_dtype)
    for position, tensor in enumerate((*keys, *values)):
        # One pass over the numbers finds NaN too, which `aminmax` lets through.
        number = torch.stack(tensor.detach().aminmax()).abs().amax().item()
        if number <= limit:
            continue
        argument = "keys" if position < len(keys) else "values"
        place = f"`{argument}` of layer {memory_layers[position % len(keys)]}"
        if not math.isfinite(number):
            raise ValueError(
                f"{place} must be finite, got NaN or inf; the backbone overflowed or was fed bad input: try it in "
                "bfloat16 or float32."
            )
        raise ValueError(
            f"{place} must fit the storage dtype {storage_dtype} (largest {limit:.6g}), got {number:.6g}; create the "
            'bank with `storage_dtype="bfloat16"`, "float32" or "int8".'
        )


def validate_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Return the tags, each once. Raises ValueError unless they are words that are not empty, and not one string."""
    is_list = isinstance(tags, Iterable) and not isinstance(tags, str)
    words = list(tags) if is_list else []
    if not is_list or not all(isinstance(tag, str) and tag for tag in words):
        raise ValueError(f"`tags` must be a list of strings that are not empty, got {tags!r}.")
    return tuple(dict.fromkeys(words))


def validate_source(
    token_ids: Iterable[int] | Tensor | None,
    text: str | None,
    char_ends: Iterable[int] | Tensor | None,
    num_tokens: int,
    document: Document,
) -> SourcePart | None:
    """Return what tokens came from, None if that is not given; all parts of a document must give the same.

    The last token takes the text that follows it.
    """
    source = document.source
    for argument, given, known in (
        ("token_ids", token_ids, source is not None),
        ("text", text, source is not None and source.has_text),
    ):
        if document.serial >= 0 and known != (given is not None):
            raise ValueError(
                f"`{argument}` must be given for every part of a document or for none, got "
                f"{'none' if known else 'some'} for a document that was started {'with' if known else 'without'}."
            )
    if (text is None) != (char_ends is None) or (text is not None and token_ids is None):
        raise ValueError(
            "`text` needs `char_ends` and `token_ids`, and `char_ends` needs `text`; give all or leave out both."
        )
    if token_ids is None:
        return None
    if text is not None and not isinstance(text, str):
        raise ValueError(f"`text` must be a string, got {type(text).__name__}.")
    ids = _validate_integers("token_ids", token_ids, num_tokens)
    if int(ids.min()) < 0 or int(ids.max()) > LARGEST_TOKEN_ID:
        raise ValueError(
            f"`token_ids` must be from 0 to {LARGEST_TOKEN_ID}, got {int(ids.min())} to {int(ids.max())}; pass the ids "
            "of a tokenizer."
        )
    if text is None or char_ends is None:
        return SourcePart(ids)
    ends = _validate_integers("char_ends", char_ends, num_tokens).clone()
    if (ends.diff() < 0).any() or ends[0] < 0 or ends[-1] > len(text):
        raise ValueError(
            f"`char_ends` must rise from 0 to at most the length of `text`, {len(text)}, got {int(ends.min())} to "
            f"{int(ends.max())}{', not in order' if (ends.diff() < 0).any() else ''}; a tokenizer's offset mapping has them."
        )
    ends[-1] = len(text)
    return SourcePart(ids, text, ends)


def _validate_integers(argument: str, values: Iterable[int] | Tensor, num_tokens: int) -> Int[Tensor, " tokens"]:
    """Return the values as int64 on the CPU."""
    ids: Any = values if isinstance(values, Tensor) else torch.as_tensor(list(values))
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(
            f"`{argument}` must be a flat list of integers, got {tuple(ids.shape)} {ids.dtype}; pass one row of a batch."
        )
    if len(ids) != num_tokens:
        raise ValueError(
            f"`{argument}` must name each token of `keys`, got {len(ids)} ids for {num_tokens} tokens; pass the "
            "ids that were encoded, without padding."
        )
    return ids.detach().to("cpu", torch.int64)


def validate_scaling(scaling: object) -> None:
    """Raise ValueError unless `scaling` is a positive number."""
    if not isinstance(scaling, int | float) or isinstance(scaling, bool) or not 0 < scaling < math.inf:
        raise ValueError(
            f"`scaling` must be a positive number, got {scaling!r}; attention multiplies inner products by it."
        )


def refuse_search(queries: Tensor, num_chunks: object, shape: LayerShape | None) -> None:
    """Raise ValueError where queries do not fit the layer (None: nothing was ever written), or ask for no chunk."""
    validate_count("num_chunks", num_chunks)
    if queries.ndim != 3 or (shape is not None and (queries.shape[0], queries.shape[2]) != shape[:2]):
        wanted = "(kv_heads, queries, dim)" if shape is None else f"({shape.kv_heads}, queries, {shape.key_dim})"
        raise ValueError(
            f"`queries` must have the shape {wanted} of the stored keys, got {tuple(queries.shape)}; put the query "
            "heads that share a key-value head side by side in `queries`."
        )


def dated_document(
    document_id: str, tags: Iterable[str] = (), dated: object = None, valid_until: object = None
) -> Document:
    """Return the record of a new document, after a check of what is said of it."""
    start = None if dated is None else validate_date("dated", dated)
    end = None if valid_until is None else validate_date("valid_until", valid_until)
    if start is not None and end is not None and end <= start:
        raise ValueError(
            f"`valid_until` must be later than `dated`, got {end} and {start}; leave out what is not known."
        )
    return Document(document_id, tags=validate_tags(tags), dated=start, valid_until=end)


def validate_date(argument: str, date: object) -> float:
    """Return a date as a float. Raises ValueError unless it is a number of seconds since 1970."""
    if not isinstance(date, int | float) or isinstance(date, bool) or not FIRST_DATE <= date <= LAST_DATE:
        raise ValueError(
            f"`{argument}` must be a number of seconds since 1970, in the years 1 to 9999, or None, got {date!r}; a datetime "
            "has `.timestamp()`, and milliseconds are to be divided by 1,000."
        )
    return float(date)
