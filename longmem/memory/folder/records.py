"""Documents as rows of the catalogue, and back."""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from longmem.encoder.history import Encoders
from longmem.memory.folder.catalogue import DOCUMENTS, SOURCES, SPANS, USAGE, Catalogue
from longmem.memory.folder.disk_storage import DiskStorage, Segment
from longmem.memory.rows.documents import Document, Run, Source, SourcePart
from longmem.memory.rows.segments import Segments
from longmem.memory.rows.table import Table

DATES = ("dated", "valid_until", "is_superseded", "superseded_by")
CHANGEABLE = ("index", "refresh", "fingerprint", "age_prior")  # settings that may change in the life of a bank


def fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a bank keeps for life."""
    return {name: value for name, value in settings.items() if name not in CHANGEABLE}


def put_document(catalogue: Catalogue, document: Document, chunk_size: int, stored_tokens: int) -> None:
    """Write all that changed of a document; the source of its first `stored_tokens` tokens is there already."""
    content = {
        "document_id": document.document_id,
        "num_tokens": document.num_tokens,
        "tags": document.tags,
        "is_pinned": document.is_pinned,
        "segments": document.segments.to_json(),
        "written_at": document.written_at,
        "has_source": document.source_or_reader is not None,
    }
    # Only what was said, so that a bank without dates is as it was before there were any.
    content |= {name: getattr(document, name) for name in DATES if getattr(document, name) not in (None, False)}
    catalogue.put(DOCUMENTS, (document.serial, json.dumps(content), b""))
    put_usage(catalogue, document)
    _put_spans(catalogue, document, chunk_size)
    if isinstance(document.source_or_reader, Source):
        _put_source(catalogue, document, document.source_or_reader, chunk_size, stored_tokens)


def put_usage(catalogue: Catalogue, document: Document) -> None:
    """Write how often a document was read."""
    catalogue.put(USAGE, (document.serial, document.num_reads, document.last_read))


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


def _put_source(catalogue: Catalogue, document: Document, source: Source, chunk_size: int, stored_tokens: int) -> None:
    resident = document.first_chunk(chunk_size) * chunk_size
    if resident:
        catalogue.remove(SOURCES, (document.serial,), below=catalogue.floor(SOURCES, document.serial, resident))
    start = max(stored_tokens, resident)
    if start == document.num_tokens:
        return
    part = source.part(start - resident, document.num_tokens - resident)
    first_char = source.characters(start - resident, start - resident)[0] if source.has_text else 0
    ends, text = (b"", b"") if part.char_ends is None or part.text is None else (_int32(part.char_ends), part.text)
    text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    row = (document.serial, start, len(part.token_ids), first_char, _int32(part.token_ids), ends, text)
    catalogue.put(SOURCES, row)


def trim_source(catalogue: Catalogue, document: Document, chunk_size: int) -> None:
    """Write the source of a document anew, without the tokens that were evicted."""
    if document.source is not None:
        catalogue.remove(SOURCES, (document.serial,))
        _put_source(catalogue, document, document.source, chunk_size, 0)


def read_source(rows: Sequence[tuple[Any, ...]], start: int, stop: int) -> Source | None:
    """Return the source of tokens from `start` to `stop`, of the rows of one document; None if they are not all there."""
    rows = [row for row in rows if row[1] + row[2] > start and row[1] < stop]
    if sum(row[2] for row in rows) < stop - start or (rows and rows[0][1] > start):
        return None
    source = Source(has_text=bool(rows) and bool(rows[0][5]), first_char=rows[0][3] if rows else 0)
    for _, _, _, _, token_ids, char_ends, text in rows:
        ids = _from_int32(token_ids)
        if char_ends:
            source.push(SourcePart(ids, text.decode("utf-8", "surrogatepass"), _from_int32(char_ends)))
        else:
            source.push(SourcePart(ids))
    source.drop(max(0, start - rows[0][1]) if rows else 0)
    source.shorten(stop - start)
    return source


def read_document(serial: int, fields: dict[str, Any], usage: tuple[int, float]) -> Document:
    """Return a document without its rows and its source."""
    fields = fields | {"tags": tuple(fields["tags"]), "segments": Segments.from_json(fields["segments"])}
    return Document(serial=serial, num_reads=usage[0], last_read=usage[1], **fields)


def restore(
    contents: Table,
    content: dict[str, Any],
    segments: Sequence[Segment],
    rows: dict[str, list[tuple[Any, ...]]],
    read_source_of: Callable[[int, int, int], Source | None],
) -> None:
    """Fill empty contents, over a storage in the folder, with what the catalogue says.

    Args:
        contents: to be filled.
        content: what is said about the bank as a whole.
        segments: open files.
        rows: of all tables, by their names.
        read_source_of: given a document's serial and a range of tokens, returns their source.
    """
    storage, ledger, chunk_size = contents.storage, contents.ledger, contents.chunk_size
    assert isinstance(storage, DiskStorage)
    storage.restore(segments, content["next_slot"], content["shapes"])
    contents.encoders = Encoders.from_json(content["encoders"])
    usage = {serial: (num_reads, last_read) for serial, num_reads, last_read in rows["usage"]}
    with_source, ends = [], []
    for serial, text, end in rows["documents"]:
        fields = json.loads(text)
        if fields.pop("has_source"):
            with_source.append(serial)
        ledger.open(read_document(serial, fields, usage[serial]))
        if end:  # of schema version 3: a last, shorter chunk stood here, in float32
            tensors = load(end)
            layers = range(len(tensors) // 2)
            ends.append((ledger.by_serial[serial], [(tensors[f"{n}.keys"], tensors[f"{n}.values"]) for n in layers]))
    for serial, first, count, slot, order, written_at in sorted(rows["spans"], key=lambda row: row[4]):
        document, new_rows = ledger.by_serial[serial], ledger.num_rows + torch.arange(count)
        ledger.enter_run(Run(document, count, written_at, order, slot, stored=(first, count, slot)))
        ledger.place(document, new_rows, first)
        storage.point(new_rows, slot)
    ledger.next_serial, ledger.next_order = content["next_serial"], content["next_order"]
    ledger.changed.clear()
    contents.put_ends(ends)
    for serial in with_source:
        if serial not in ledger.by_serial:
            continue
        document = ledger.by_serial[serial]
        start = document.first_chunk(chunk_size) * chunk_size
        document.source_or_reader = functools.partial(read_source_of, serial, start, document.num_tokens)


def _int32(values: Tensor) -> bytes:
    return values.numpy().astype("<i4").tobytes()


def _from_int32(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype="<i4").astype(np.int64))
