"""Writing documents: text to token ids, windows, position-free keys and values, bank."""

import contextlib
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from longmem.errors import ChangedMemoryError
from longmem.memory.checks import dated_document, got, validate_count, validate_new, validate_tags, validate_text
from longmem.memory.protocols import EncodingModel, WritableBank
from longmem.memory.rows.documents import SourcePart
from longmem.memory.rows.segments import Joins

# Tokenizers that put no space before a text, by those that do, and the tokens that these know.
_CONTINUING: weakref.WeakKeyDictionary[Any, tuple[int, Tokenizer | None]] = weakref.WeakKeyDictionary()
ANCHORS = ("\n", ".", "a", "0")  # texts to tokenise others behind


class Memorized(int):
    """How many tokens of the text can be read when `memorize` returns: all, unless the bank has no room for them.

    `num_encoded`: how many were encoded; the others were copied. `num_forgotten`: how many tokens, of this document and of
    others, the bank has forgotten meanwhile because it was full.
    """

    num_encoded: int
    num_forgotten: int

    @classmethod
    def of(cls, num_readable: int, num_encoded: int, num_forgotten: int) -> Self:
        """Return the three numbers as one."""
        made = cls(num_readable)
        made.num_encoded, made.num_forgotten = num_encoded, num_forgotten
        return made


def to_token_ids(model: EncodingModel, text_or_ids: str | Sequence[int] | Tensor) -> Int[Tensor, " tokens"]:
    """Return token ids of a text, or the given ids, after a check."""
    return encodable(model, text_or_ids).token_ids


def encodable(
    model: EncodingModel, text_or_ids: str | Sequence[int] | Tensor, *, is_piece: bool = False, continues: bool = False
) -> SourcePart:
    """Return token ids of a text, with their places in it where the tokenizer says them, or the given ids.

    Raises ValueError for nothing to encode, no flat sequence of integers, or ids outside the backbone's vocabulary.

    Args:
        model: whose tokenizer it is.
        text_or_ids: what to encode.
        is_piece: the text is part of a longer one, so it may be blank, and may hold no token.
        continues: something stands before it, so the tokens of both, one after the other, are to decode to both texts: no
            space is put before it, as SentencePiece tokenizers do.
    """
    text, char_ends = None, None
    if isinstance(text_or_ids, str):
        if not text_or_ids.strip() and not is_piece:
            raise ValueError("`text_or_ids` must hold some text, got an empty or blank string.")
        validate_text("text_or_ids", text_or_ids)
        ids_of_text, ends = tokenised(model.tokenizer, text_or_ids, continues)
        if ends is not None:
            # Ends never fall: tokens of one character that takes several all end with it.
            text, char_ends = text_or_ids, torch.tensor(ends, dtype=torch.int64).cummax(0).values
        if is_piece and not ids_of_text:
            return SourcePart(torch.empty(0, dtype=torch.int64), text, char_ends)
        if not ids_of_text:
            raise ValueError(
                f"`text_or_ids` must hold text that the tokenizer makes tokens of, got {got(text_or_ids)}, of which it makes "
                "none; leave it out."
            )
        text_or_ids = ids_of_text
    try:
        ids = torch.as_tensor(text_or_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "`text_or_ids` must be text or one flat sequence of token ids, at least one, got "
            f"{type(text_or_ids).__name__} ({error})."
        ) from error
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.numel() == 0:
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
    return SourcePart(ids.long().cpu(), text, char_ends)


def tokenised(tokenizer: Any, text: str, continues: bool) -> tuple[list[int], list[int] | None]:
    """Return the ids of a text and, where the tokenizer says it, the character after the last of each."""
    is_fast = getattr(tokenizer, "is_fast", False)
    options = {"add_special_tokens": False, "verbose": False}
    if not is_fast:
        for anchor in ANCHORS if continues else ():
            before, both = (tokenizer(each, **options)["input_ids"] for each in (anchor, anchor + text))
            if both[: len(before)] == before:
                return both[len(before) :], None
        return tokenizer(text, **options)["input_ids"], None
    if continues and (twin := continuing(tokenizer)) is not None:
        encoding = twin.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]
    encoded = tokenizer(text, **options, return_offsets_mapping=True)
    return encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]


def continuing(tokenizer: Any) -> Tokenizer | None:
    """Return a fast tokenizer's twin that puts no space before a text; None if it puts none itself."""
    known = _CONTINUING.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        parts = {name: described[name] for name in ("normalizer", "pre_tokenizer")}
        changed = {name: without_prefix(part) for name, part in parts.items()}
        twin = None
        if changed != parts:
            twin = Tokenizer.from_str(json.dumps({**described, **changed, "truncation": None, "padding": None}))
            twin.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
        known = _CONTINUING[tokenizer] = len(tokenizer), twin
    return known[1]


def without_prefix(part: Any) -> Any:
    """Return a step of a tokenizer, as JSON describes it, without what puts a space before a text.

    >>> without_prefix({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}, {"type": "NFC"}]})
    {'type': 'Sequence', 'normalizers': [{'type': 'NFC'}]}
    """
    if isinstance(part, list):
        return [each for each in map(without_prefix, part) if each is not None]
    if not isinstance(part, dict) or part.get("type") == "Prepend":
        return None if isinstance(part, dict) else part
    changes: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
    }
    return {name: without_prefix(each) for name, each in part.items()} | changes.get(part.get("type", ""), {})


def memorize(
    model: EncodingModel,
    bank: WritableBank,
    text_or_ids: str | Sequence[int] | Tensor,
    document_id: str,
    *,
    append: bool = False,
    tags: Sequence[str] = (),
    dated: float | None = None,
    valid_until: float | None = None,
    reuse: tuple[WritableBank, str] | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Memorized:
    """Encode a document and write it to the bank; see `LongMemForCausalLM.memorize`."""
    source = encodable(model, text_or_ids, is_piece=append, continues=append)
    validate_options(bank, reuse, batch_size)
    labels: dict[str, Any] = {"tags": validate_tags(tags), "dated": dated, "valid_until": valid_until}
    if not append:  # what the bank would refuse once the first window is encoded
        validate_new("document_id", document_id, bank)
        dated_document(document_id, **labels)
    for name, label in labels.items():
        if append and label not in (None, ()):
            raise ValueError(
                f"`{name}` must be left out with `append`, got {got(label)}: it is said of a new document; `bank.tag` changes "
                "tags, and what has another date goes under a name of its own."
            )
    length = model.config.segment_length
    context = open_window(bank, document_id, length) if append else torch.empty(0, dtype=torch.int64)
    # What is appended goes on with the window that the document ends in; if that is not known, windows start here.
    # Of a document whose windows are not known, new windows may begin inside a chunk, or without the ids before them.
    known = {} if reuse is None or context is None else known_windows(*reuse, length)
    context = torch.empty(0, dtype=torch.int64) if context is None else context
    is_new = not append
    num_encoded, evicted_before = 0, bank.num_evicted_tokens

    def write(start: int, stop: int, keys: list[Tensor], values: list[Tensor]) -> None:
        nonlocal is_new
        part = source.part(start, stop)
        options: dict[str, Any] = {"text": part.text, "char_ends": part.char_ends}
        if is_new:
            bank.add(document_id, keys, values, part.token_ids, segment="new", **labels, **options)
        else:
            joins: Joins = "same" if start == 0 and len(context) else "new"
            bank.append(document_id, keys, values, part.token_ids, segment=joins, **options)
        is_new = False

    with bank.transaction():
        try:
            for group in groups(source.token_ids, len(context), length, batch_size, known):
                start, stop = group[0][0], group[-1][1]
                origin, is_copied = known.get(window_key(source.token_ids[start:stop])), False
                if reuse is not None and origin is not None and is_resident(*reuse, origin):
                    copied = source.part(start, stop)
                    with contextlib.suppress(ChangedMemoryError):  # somebody else has replaced it since
                        bank.copy_tokens(document_id, *reuse, origin, copied, **(labels if is_new else {}))
                        is_new, is_copied = False, True
                if not is_copied:
                    before = context if start == 0 else context[:0]
                    batch = torch.stack([torch.cat([before, source.token_ids[first:last]]) for first, last in group])
                    keys, values = model.encoder.encode(batch)
                    num_encoded += stop - start
                    for lane, place in enumerate(group):
                        write(*place, *([layer[lane, :, len(before) :] for layer in part] for part in (keys, values)))
                if progress is not None:
                    progress(stop, len(source.token_ids))
        except BaseException:
            if not append and not is_new:
                with contextlib.suppress(ValueError):  # the bank refuses everything, or has let go of it
                    bank.delete(document_id)
            raise
    resident = bank.info(document_id).num_resident_tokens if document_id in bank else 0
    num_readable = min(len(source.token_ids), resident)
    return Memorized.of(num_readable, num_encoded, bank.num_evicted_tokens - evicted_before)


def groups(
    ids: Int[Tensor, " tokens"], offset: int, length: int, batch_size: int, known: Mapping[bytes, int]
) -> Iterator[list[tuple[int, int]]]:
    """Yield windows, as (start, stop), that can be encoded together; the first is shorter by `offset`.

    Known windows, and those that are not whole, come alone.
    """
    group: list[tuple[int, int]] = []
    start = 0
    while start < len(ids):
        stop = min(len(ids), start + length - (0 if start else offset))
        is_alone = stop - start < length or window_key(ids[start:stop]) in known
        if group and (is_alone or len(group) == batch_size):
            yield group
            group = []
        group.append((start, stop))
        if is_alone:
            yield group
            group = []
        start = stop
    if group:
        yield group


def window_key(ids: Int[Tensor, " tokens"]) -> bytes:
    """Return what two windows of the same tokens have in common."""
    return ids.numpy().tobytes()


def known_windows(bank: WritableBank, document_id: str, length: int) -> dict[bytes, int]:
    """Return the first token of every whole window of a document that can be copied, by its tokens.

    Those can't be that were encoded in another way, by an earlier encoder, or that begin or end inside a chunk.
    """
    ids, info = bank.token_ids(document_id), bank.info(document_id)
    if ids is None:
        return {}
    offset, stop = info.first_resident_token, info.num_tokens - info.num_waiting_tokens
    lags = bank.encoders.lags()
    return {
        window_key(ids[each.start - offset : each.stop - offset]): each.start
        for each in bank.segments(document_id)
        if each.is_known
        and each.mapped_to < 0
        and (not lags or (each.version >= 0 and lags[each.version] == 0))
        and each.stop - each.start == length
        and each.start % bank.chunk_size == each.stop % bank.chunk_size == 0
        and each.stop <= stop
    }


def is_resident(bank: WritableBank, document_id: str, token: int) -> bool:
    """Return whether a token is still there: what is written meanwhile may evict it from the same bank."""
    return document_id in bank and bank.info(document_id).first_resident_token <= token


def validate_options(bank: WritableBank, reuse: tuple[WritableBank, str] | None, batch_size: int) -> None:
    """Raise ValueError unless windows can be copied from `reuse` as they are stored, and `batch_size` is a count."""
    validate_count("batch_size", batch_size)
    if reuse is None:
        return
    if not isinstance(reuse, tuple) or len(reuse) != 2 or not isinstance(reuse[0], type(bank)):
        raise ValueError(f"`reuse` must be a MemoryBank and the name of a document in it, got {reuse!r}.")
    for name in ("memory_layers", "chunk_size", "storage_dtype", "fingerprint"):
        own, other = getattr(bank, name), getattr(reuse[0], name)
        if own != other:
            raise ValueError(
                f"`reuse` must be a bank with the `{name}` of the one to write to, {own}, got {other}; leave it out to "
                "encode all windows."
            )


def open_window(bank: WritableBank, document_id: str, length: int) -> Int[Tensor, " tokens"] | None:
    """Return the tokens of the window that a document ends in, None if they are not known."""
    last = bank.segments(document_id)[-1]
    if not last.is_known or last.stop - last.start > length:
        return None
    return bank.token_ids(document_id, last.stop - (last.stop - last.start) % length)
