"""Documents as rows of the catalogue, and back, with a check of all that the rows say of each other and of the files."""

import contextlib
import gc
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors.torch import load
from torch import Tensor

from longmem.encoder.history import UNKNOWN, Encoders
from longmem.memory.checks import is_word
from longmem.memory.folder.catalogue import DOCUMENTS, SOURCES, SPANS, USAGE, Catalogue
from longmem.memory.folder.disk_storage import DiskStorage, Segment
from longmem.memory.folder.foreign import damaged, fits, parse_json
from longmem.memory.rows.documents import (
    Document,
    IntQueue,
    LayerTokens,
    Run,
    Source,
    SourcePart,
    SourceReader,
    StoredSource,
)
from longmem.memory.rows.segments import Segments
from longmem.memory.rows.storage import STORAGE_DTYPES, LayerShape, stored_width
from longmem.memory.rows.table import Table

DATES = ("dated", "valid_until", "is_superseded", "superseded_by")
NOT_SAID = None, None, False, None
NEVER = 0, 0.0  # how often it was read, and when last
NO_ROWS = IntQueue()
DOCUMENT = {
    "document_id": str,
    "num_tokens": int,
    "tags": [str],
    "is_pinned": bool,
    "segments": [list],
    "written_at": float,
    "has_source": bool,
    "dated?": float,
    "valid_until?": float,
    "is_superseded?": bool,
    "superseded_by?": str,
}
MUST_SAY = tuple(name for name in DOCUMENT if not name.endswith("?"))
KINDS_SAID = tuple(list if isinstance(DOCUMENT[name], list) else DOCUMENT[name] for name in MUST_SAY)
PARSED_AT_ONCE, LINES = 1000, ",\n"
MANY_OBJECTS = 100_000  # made at once: enough to be worth a look at what is frozen
LARGEST_WIDTH = 2**20  # of a key or a value, and the largest number of heads
CHANGEABLE = ("index", "refresh", "fingerprint", "age_prior")  # settings that may change in the life of a bank


def fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a bank keeps for life."""
    return {name: value for name, value in settings.items() if name not in CHANGEABLE}


def put_document(catalogue: Catalogue, document: Document, chunk_size: int) -> None:
    """Write all that changed of a document."""
    content = {
        "document_id": document.document_id,
        "num_tokens": document.num_tokens,
        "tags": document.tags,
        "is_pinned": document.is_pinned,
        "segments": document.segments.to_json(),
        "written_at": document.written_at,
        "has_source": document.source_or_stored is not None,
    }
    # Only what was said, so that a bank without dates is as it was before there were any.
    said = ((name, getattr(document, name)) for name in DATES)
    content |= {name: value for name, value in said if value is not None and value is not False}  # 0.0 is a date
    catalogue.put(DOCUMENTS, (document.serial, json.dumps(content), b""))
    put_usage(catalogue, document)
    _put_spans(catalogue, document, chunk_size)
    _put_source(catalogue, document, chunk_size)


def put_usage(catalogue: Catalogue, document: Document) -> None:
    """Write how often a document was read; of one that never was there is no row."""
    if document.num_reads:
        catalogue.put(USAGE, (document.serial, document.num_reads, document.last_read))
    else:
        catalogue.remove(USAGE, (document.serial,))


def remove_document(catalogue: Catalogue, serial: int) -> None:
    """Remove all rows of a document."""
    for table in (DOCUMENTS, USAGE, SPANS, SOURCES):
        catalogue.remove(table, (serial,))


def _put_spans(catalogue: Catalogue, document: Document, chunk_size: int) -> None:
    start = document.first_chunk(chunk_size)
    catalogue.remove(SPANS, (document.serial,), below=start)
    for run in document.runs:
        place = start, run.num_chunks, run.slot
        if run.stored != place:
            catalogue.put(SPANS, (document.serial, *place, run.order, run.written_at))
            run.stored = place
        start += run.num_chunks


def _put_source(catalogue: Catalogue, document: Document, chunk_size: int) -> None:
    if (held := document.source_or_stored) is None:
        return
    resident = document.first_chunk(chunk_size) * chunk_size
    if resident:
        catalogue.remove(SOURCES, (document.serial,), below=catalogue.floor(SOURCES, document.serial, resident))
    start = max(held.stored_to, resident)
    if start == document.num_tokens:  # else it is in memory: nothing is read inside a transaction of the catalogue
        return
    assert (source := document.newest_source) is not None
    first = document.num_tokens - source.num_tokens
    part, first_char = source.part(start - first, source.num_tokens), source.behind(start - first).first_char
    ends, text = (b"", b"") if part.char_ends is None or part.text is None else (_int32(part.char_ends), part.text)
    text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    row = (document.serial, start, len(part.token_ids), first_char, _int32(part.token_ids), ends, text)
    catalogue.put(SOURCES, row)


def trim_source(catalogue: Catalogue, document: Document, chunk_size: int) -> None:
    """Write the source of a document anew, without the tokens that were evicted."""
    if (source := document.source) is not None:
        catalogue.remove(SOURCES, (document.serial,))
        source.stored_to = 0
        _put_source(catalogue, document, chunk_size)
        source.stored_to = document.num_tokens


def read_source(rows: Sequence[tuple[Any, ...]], start: int, stop: int) -> Source | None:
    """Return the source of tokens from `start` to `stop`, of the rows of one document; None if they are not all there."""
    rows = [row for row in rows if row[1] + row[2] > start and row[1] < stop]
    if sum(row[2] for row in rows) < stop - start or (rows and rows[0][1] > start):
        return None
    source = Source(has_text=bool(rows) and bool(rows[0][5]), first_char=rows[0][3] if rows else 0, read_to=stop)
    for _, first_token, num_tokens, _, token_ids, char_ends, text in rows:
        ids, ends, words = _from_int32(token_ids), _from_int32(char_ends), text.decode("utf-8", "surrogatepass")
        goes_up = not len(ends) or bool(ends[0] >= 0 and ends[-1] <= len(words) and (ends.diff() >= 0).all())
        if len(ids) != num_tokens or len(ends) not in ((num_tokens,) if source.has_text else (0,)) or not goes_up:
            raise ValueError(f"the text and the ids of {num_tokens} tokens from {first_token} on do not fit")
        part = SourcePart(ids, words, ends) if source.has_text else SourcePart(ids)
        source.push(part.part(0, min(stop - first_token, num_tokens)))
    source.drop(max(0, start - rows[0][1]) if rows else 0)
    return source


def check_files(content: dict[str, Any], segments: Sequence[Segment]) -> None:
    """Raise ValueError, which names the file, unless files hold what the description says: so many slots of such chunks."""
    settings, end = content["settings"], 0
    dtype = STORAGE_DTYPES[settings["storage_dtype"]]
    if len(content["shapes"]) not in (0, len(settings["memory_layers"])):
        raise ValueError(f"{len(settings['memory_layers'])} layers cannot have {len(content['shapes'])} shapes")
    shapes = [LayerShape(*shape) for shape in content["shapes"]]
    if any(not 1 <= size <= LARGEST_WIDTH for shape in shapes for size in shape.sizes):
        raise ValueError(f"heads and widths are from 1 to {LARGEST_WIDTH}, not {content['shapes']}")
    for segment in segments:
        assert segment.file is not None
        if segment.first_slot < end or segment.num_slots < 1 or not shapes:
            raise ValueError(f"slots from {segment.first_slot} are in two files, or in none")
        end = segment.first_slot + segment.num_slots
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for position, (heads, key_dim, value_dim, by_token) in enumerate(shapes):
            for name, width in (("keys", key_dim), ("values", value_dim)):
                sizes = heads, segment.num_slots, settings["chunk_size"], stored_width(width, dtype)
                expected[f"{position}.{name}"] = dtype, sizes
            expected[f"{position}.search_keys"] = torch.float32, (heads, segment.num_slots, 0 if by_token else key_dim)
        if segment.file.shapes != expected:
            raise damaged(segment.file.path, "does not have the tensors that the catalogue says")
    if end > content["next_slot"]:
        raise ValueError(f"slots beyond {content['next_slot']}, the next to be given, are in use")


def check_places(content: dict[str, Any], segments: Sequence[Segment], spans: Int[np.ndarray, "spans 5"]) -> None:
    """Raise ValueError unless every run of chunks is in a file, in no two of them, and follows the one before it.

    `spans`: serial, first chunk, number of chunks, slot and order of writing; sorted by serial and first chunk.
    """
    serials, first, count, slot, order = spans.T
    end, starts = slot + count, np.array([segment.first_slot for segment in segments], dtype=np.int64)
    place = np.searchsorted(starts, slot, side="right") - 1
    limits = starts + np.array([segment.num_slots for segment in segments], dtype=np.int64)
    if (spans >= 2**62).any() or (count < 1).any() or (place < 0).any() or (end > limits[place]).any():
        raise ValueError("chunks are said to be where no file is")
    by_slot = slot.argsort()
    if (slot[by_slot][1:] < end[by_slot][:-1]).any():
        raise ValueError("two runs of chunks are in one place")
    same = serials[1:] == serials[:-1]
    if (same & ((first + count)[:-1] != first[1:])).any() or (same & (order[1:] <= order[:-1])).any():
        raise ValueError("the chunks of a document do not follow one another")
    if len(np.unique(order)) < len(order) or order.max(initial=-1) >= content["next_order"]:
        raise ValueError("two runs of chunks were written at once, or one after the last")


def _checked_segments(
    runs: Sequence[Sequence[int]], num_tokens: int, num_kept: int, num_versions: int
) -> Sequence[Sequence[int]]:
    """Return what is said of the segments of so many tokens, of which so many are kept; there is one a token at most."""
    stop, total = None, 0
    for run in runs:
        if len(run) != 6 or any(type(each) is not int or not -1 <= each < 2**62 for each in run):
            raise ValueError(f"{run} is no run of segments")
        start, length, count, version, _, mapped_to = run
        if start < 0 or length < 1 or count < 1 or start != (start if stop is None else stop):
            raise ValueError(f"{run} does not follow the segments before it")
        if version >= max(num_versions, 1) or mapped_to >= max(num_versions, 1):
            raise ValueError(f"{run} names an encoder that the bank does not know")
        stop, total = start + length * count, total + count
    if total > num_kept + 1 or (stop is not None and stop > num_tokens):
        raise ValueError(f"{total} segments are more than {num_tokens} tokens can have, of which {num_kept} are kept")
    return runs


def _end_of(waiting: bytes, shapes: Sequence[LayerShape]) -> list[LayerTokens]:
    """Return the keys and values of each layer of a last, shorter chunk of schema version 3, which stood here in float32."""
    tensors = load(waiting) if waiting else {}
    tails = [(tensors[f"{each}.keys"], tensors[f"{each}.values"]) for each in range(len(tensors) // 2)]
    for shape, pair in zip(shapes if tails else (), tails, strict=True):
        for tensor, width in zip(pair, shape.sizes[1:], strict=True):
            num_waiting = tails[0][0].shape[1]
            if tensor.dtype != torch.float32 or tensor.shape != (shape.kv_heads, num_waiting, width):
                raise ValueError(f"a tail of {tuple(tensor.shape)} does not fit the bank")
    return tails


def restore(
    contents: Table,
    content: dict[str, Any],
    segments: Sequence[Segment],
    rows: dict[str, list[tuple[Any, ...]]],
    read_source_of: SourceReader,
) -> None:
    """Fill empty contents, over a storage in the folder, with what the catalogue says, after a check that it can be so.

    Args:
        contents: to be filled.
        content: what is said about the bank as a whole.
        segments: open files, by slot.
        rows: of all tables, by their names.
        read_source_of: given a document's serial and a range of tokens, returns their source.
    """
    storage, ledger, chunk_size = contents.storage, contents.ledger, contents.chunk_size
    assert isinstance(storage, DiskStorage)
    check_files(content, segments)
    # In the order of writing, which is that of rows; checked in the order of documents.
    spans = np.array([row[:5] for row in rows["spans"]], dtype=np.int64).reshape(-1, 5)
    check_places(content, segments, spans)
    storage.restore(segments, content["next_slot"], content["shapes"])
    contents.encoders = Encoders.from_json(content["encoders"])
    documents = _documents_of(content, rows, spans, contents, read_source_of)
    by_order = spans[:, 4].argsort()
    # A clock that was set back has dated some runs after others that were written later (`Ledger.not_after`).
    written_at = np.array([row[5] for row in rows["spans"]], dtype=np.float64)[by_order]
    written_at = np.minimum.accumulate(written_at[::-1])[::-1]
    runs = _enter_runs(spans[by_order], written_at.tolist(), documents)
    serials, first, count, slot, _ = spans[by_order].T
    within = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)  # the place of a chunk in its run
    table = np.empty((5, len(within)), dtype=np.int64)
    table[0], table[1] = np.repeat(serials, count), np.repeat(first, count) + within
    num_tokens = np.array([run.document.num_tokens for run in runs], dtype=np.int64)
    table[2] = np.minimum(np.repeat(num_tokens, count) - table[1] * chunk_size, chunk_size)
    kinds = [run.document.segments.of_all_chunks() for run in runs]
    known = [(UNKNOWN, UNKNOWN) if kind is None else kind for kind in kinds]
    table[3:] = np.repeat(np.array(known, dtype=np.int64).reshape(-1, 2).T, count, axis=1)
    ledger.fill((document for document, _ in documents.values()), runs, torch.from_numpy(table))
    storage.point(torch.from_numpy(np.repeat(slot, count) + within))
    ledger.next_serial, ledger.next_order = content["next_serial"], content["next_order"]
    contents.put_ends([(document, end) for document, end in documents.values() if end])
    for document in {run.document for run, kind in zip(runs, kinds, strict=True) if kind is None}:
        ledger.read_versions(document)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Make many objects, none of them garbage, without looking for garbage among them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            # Asking what is frozen walks through all that is. Where there is something, it would not stay so.
            if gc.get_count()[0] > MANY_OBJECTS and not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()  # into the oldest generation: all are here to stay, so the next look need not be at them
            gc.enable()


# A document of the catalogue, and what stood in `waiting` of its last, shorter chunk.
Described = tuple[Document, list[LayerTokens]]


def _documents_of(
    content: dict[str, Any],
    rows: dict[str, list[tuple[Any, ...]]],
    spans: Int[np.ndarray, "spans 5"],
    contents: Table,
    read_source_of: SourceReader,
) -> dict[int, Described]:
    """Return all documents by their serials, without their rows."""
    chunk_size, num_versions = contents.chunk_size, len(contents.encoders.versions)
    serials = [row[0] for row in rows["documents"]]
    usage = {serial: (num_reads, last_read) for serial, num_reads, last_read in rows["usage"]}
    if not usage.keys() <= {*serials} or (serials and serials[-1] >= content["next_serial"]):
        raise ValueError("a document that was read, or the last one, is not described")
    kept, first = _kept_of(serials, spans)
    documents: dict[int, Described] = {}
    tags: dict[tuple[str, ...], tuple[str, ...]] = {}
    # Most short documents are encoded alike: what is known to be right need not be checked, nor kept, once more.
    alike: dict[tuple[Any, ...], Sequence[Sequence[int]]] = {}
    described = zip(rows["documents"], _described(rows["documents"]), kept, first, strict=True)
    for (serial, _, waiting), told, num_chunks, first_chunk in described:
        name, num_tokens, said, is_pinned, runs, written_at, has_source, dates = told
        end = _end_of(waiting, contents.storage.shapes) if waiting else []
        num_waiting = end[0][0].shape[1] if end else 0
        whole = num_tokens - num_waiting
        is_end = not end or (0 < num_waiting < chunk_size and not whole % chunk_size)
        num_dropped = -(-whole // chunk_size) - num_chunks
        if not is_end or (num_chunks and num_dropped != first_chunk):
            raise ValueError(f"document {serial} has not the tokens of its chunks")
        key = *map(tuple, runs), num_tokens, num_chunks, num_waiting
        if key not in alike:
            num_kept = num_chunks * chunk_size + num_waiting
            alike[key] = _checked_segments(runs, num_tokens, num_kept, num_versions)
        if (words := tuple(said)) not in tags:
            if not all(map(is_word, words)):
                raise ValueError(f"document {serial} has tags that are no words")
            tags[words] = words
        # By position, which takes half the time; the rows of chunks follow.
        segments, reads = Segments.from_json(alike[key]), usage.get(serial, NEVER)
        about: tuple[Any, ...] = name, serial, num_tokens, tags[words], is_pinned, *dates, segments, *reads, written_at
        document = Document(*about + (NO_ROWS if num_chunks else IntQueue(),))
        if has_source:
            document.source_or_stored = StoredSource(read_source_of, serial, num_dropped * chunk_size, num_tokens)
        documents[serial] = document, end
    names = {document.document_id for document, _ in documents.values()}
    if len(names) < len(documents):
        raise ValueError("two documents have one name")
    if names and not (all(names) and is_word("".join(names))):
        raise ValueError("a document has a name that none can have")
    return documents


def _kept_of(serials: Sequence[int], spans: Int[np.ndarray, "spans 5"]) -> tuple[list[int], list[int]]:
    """Return for each document how many chunks of it are kept, and which is the first; `spans` as for `check_places`."""
    places = np.searchsorted(serials, spans[:, 0])
    kept, first = np.zeros((2, len(serials) + 1), dtype=np.int64)
    np.add.at(kept, places, spans[:, 2])
    first[places[::-1]] = spans[::-1, 1]
    return kept[:-1].tolist(), first[:-1].tolist()


def _described(rows: Sequence[tuple[int, str, bytes]]) -> Iterator[tuple[Any, ...]]:
    """Yield what is said of each document: `MUST_SAY`, and `DATES`. Many together are read, and checked, much faster."""
    for start in range(0, len(rows), PARSED_AT_ONCE):
        part = rows[start : start + PARSED_AT_ONCE]
        # No string of JSON goes on in another line, so each text begins anew.
        described = parse_json(f"[{LINES.join(text for _, text, _ in part)}]")
        if len(described) != len(part):
            raise ValueError(f"documents from {part[0][0]} on are not described")
        is_usual = {*map(type, described)} == {dict} and {*map(tuple, described)} == {MUST_SAY}
        columns = list(zip(*map(dict.values, described), strict=True)) if is_usual else []
        if (
            [{*map(type, column)} for column in columns] == [{kind} for kind in KINDS_SAID]
            and fits([min(columns[1]), max(columns[1])], [int])
            and all(map(math.isfinite, columns[5]))
        ):
            yield from zip(*columns, itertools.repeat(NOT_SAID))
            continue
        for fields in described:
            if not fits(fields, DOCUMENT) or {*fields} - {name.removesuffix("?") for name in DOCUMENT}:
                raise ValueError(f"one of the documents from {part[0][0]} on is not described")
            yield *map(fields.get, MUST_SAY), tuple(map(fields.get, DATES, NOT_SAID))


def _enter_runs(
    spans: Int[np.ndarray, "spans 5"], written_at: Sequence[float], documents: dict[int, Described]
) -> list[Run]:
    """Return all runs, after giving them, and their rows, to their documents."""
    runs, row = [], 0
    for (serial, first, count, slot, order), moment in zip(spans.tolist(), written_at, strict=True):
        document = documents[serial][0]
        run = Run(document, count, moment, order, slot, (first, count, slot))
        document.runs.append(run)
        runs.append(run)
        if len(document.runs) == 1:
            document.rows = IntQueue.of_range(range(row, row + count))
        else:
            document.rows.push(torch.arange(row, row + count))
        row += count
    return runs


def _int32(values: Tensor) -> bytes:
    return values.numpy().astype("<i4").tobytes()


def _from_int32(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype="<i4").astype(np.int64))
