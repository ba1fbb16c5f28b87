"""What a memory bank answers: which documents it holds, which chunks fit a query, what is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.encoder.history import Encoders
from longmem.memory import checks
from longmem.memory.index import Found
from longmem.memory.locking import BankLock
from longmem.memory.rows.chunks import LayerShape
from longmem.memory.rows.documents import Document, DocumentInfo
from longmem.memory.rows.ledger import ChunkPlace, Ledger
from longmem.memory.rows.segments import Segment
from longmem.memory.rows.table import BankContents
from longmem.memory.view import BankView
from longmem.memory.visibility import ContentClock


class BankReader:
    """The reading half of `MemoryBank`."""

    memory_layers: tuple[int, ...]
    chunk_size: int
    _contents: BankContents
    _clock: ContentClock
    _lock: BankLock

    # What is there.

    def documents(self) -> list[DocumentInfo]:
        """Return a summary of each document, in the order in which they were added."""
        self._drop_expired()
        return [document.info(self.chunk_size) for document in self._ledger.documents.values()]

    def info(self, document_id: str) -> DocumentInfo:
        """Return a summary of one document."""
        return self._document("document_id", document_id).info(self.chunk_size)

    def segments(self, document_id: str) -> list[Segment]:
        """Return copies of a document's segments: which of its tokens were encoded together, and by which encoder."""
        return list(self._document("document_id", document_id).segments.copy())

    def __contains__(self, document_id: object) -> bool:
        self._drop_expired()
        return document_id in self._ledger.documents

    def token_ids(self, document_id: str) -> Int[Tensor, " tokens"] | None:
        """Return the ids of resident and waiting tokens, from `first_resident_token` on; None if none were given."""
        source = self._document("document_id", document_id).source
        return None if source is None else source.token_ids.clone()

    def text(self, document_id: str) -> str | None:
        """Return the text of resident and waiting tokens; None if none was given."""
        source = self._document("document_id", document_id).source
        return source.text if source is not None and source.has_text else None

    @property
    def num_chunks(self) -> int:
        """Return the number of resident chunks: those that a search can find, and those of hidden documents."""
        return self._ledger.num_rows

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens in resident chunks; tails that wait are not counted."""
        return self.num_chunks * self.chunk_size

    @property
    def generation(self) -> int:
        """Return a number that changes when rows found before may hold other chunks: eviction, deletion, clearing."""
        return self._ledger.generation

    @property
    def fingerprint(self) -> str | None:
        """Return the digest of the encoder that the bank is kept for; None: it is not known, and not checked."""
        stamp = self._contents.encoders.stamp
        return None if stamp is None else stamp.digest

    @property
    def encoders(self) -> Encoders:
        """Return the encoders that have written to the bank; the last one is current."""
        return self._contents.encoders

    @property
    def encodings(self) -> int:
        """Return a number that changes when chunks that are where they were have been encoded again."""
        return self._ledger.encodings

    @property
    def version(self) -> int:
        """Return a number that changes with every change of what the bank holds."""
        return self._ledger.version

    @property
    def is_empty(self) -> bool:
        """Return whether nothing is resident."""
        return not self.num_chunks

    @property
    def has_age_prior(self) -> bool:
        """Return whether age counts when the bank is read (`age_prior`)."""
        return self._clock.prior is not None

    @property
    def newest_date(self) -> float:
        """Return the date of the newest document that a search can find, from which ages count; -inf if there is none."""
        with self._lock:
            return self._clock.newest(self._ledger)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all keys, values and search keys, with the room that growth has reserved."""
        return self._contents.nbytes

    # Reading.

    def read_by(self, model: Any) -> None:
        """Make ready to be read by a model; a bank with a refresh policy lets it act."""

    def select(self, document_ids: str | Iterable[str] | None = None, *, tags: str | Iterable[str] = ()) -> BankView:
        """Return a view that reads these documents, and those with one of these tags. Raises ValueError for an unknown id."""
        return BankView(self, document_ids, tags)

    def search(
        self,
        layer: int,
        queries: Float[Tensor, "kv_heads queries dim"],
        num_chunks: int,
        *,
        scaling: float | None = None,
        newest: float | None = None,
    ) -> Found:
        """Return scores (float32) and rows (int64), each (kv_heads, queries, num_chunks), best first.

        A score is the inner product of the query with the mean key of a chunk. Where there are fewer than
        `num_chunks`, rows are -1 and scores -inf. Rows are good for `gather` and `locate` while `generation` stays.
        Documents that were superseded or have expired are not found.

        Args:
            layer: a memory layer.
            queries: for each key-value head.
            num_chunks: for each query.
            scaling: what attention multiplies inner products by, for a bank with an age prior: each score then has
                log w(age) / scaling added, and the best by that are found. Exact kinds of index find exactly these; the
                others rank four times as many chunks as are wanted anew. None: age does not count.
            newest: date from which ages count, None for `newest_date`.
        """
        self._drop_expired()
        return self._search(layer, queries, num_chunks, None, scaling, newest)

    def log_weights(self, rows: Int[Tensor, "*shape"], *, newest: float | None = None) -> Float[Tensor, "*shape"]:
        """Return log w(age) of these rows, all 0 without an age prior; the caller masks rows of -1."""
        with self._lock:
            weights = self._clock.log_weights(self._ledger, self.newest_date if newest is None else newest)
        if weights is None:
            return torch.zeros(rows.shape, device=rows.device)
        return weights[rows.clamp(min=0).cpu()].to(rows.device)

    def search_keys(self, layer: int) -> Float[Tensor, "kv_heads chunks dim"]:
        """Return a copy of the mean keys of all resident chunks of a layer, in float32: what a search compares."""
        position = self._position(layer)
        if not self.num_chunks:
            raise ValueError("`search_keys` needs a bank that holds chunks, got an empty one; ask `num_chunks` first.")
        with self._lock:
            return self._contents.storage.layer(position).search_keys.clone()

    def gather(
        self, layer: int, rows: Int[Tensor, "kv_heads chunks"]
    ) -> tuple[
        Float[Tensor, "kv_heads chunks chunk_size key_dim"],
        Float[Tensor, "kv_heads chunks chunk_size value_dim"],
    ]:
        """Return copies of the keys and values of these rows (float32 for int8, else in the storage dtype).

        The caller masks rows of -1.
        """
        position = self._position(layer)
        if not self.num_chunks:
            raise ValueError("`gather` needs a bank that holds chunks, got an empty one; ask `num_chunks` first.")
        with self._lock:
            return self._contents.storage.gather(position, rows)

    def locate(self, rows: Int[Tensor, ...]) -> list[ChunkPlace | None]:
        """Return document, tokens, characters and text of each row, flattened; None for row -1.

        Characters and text are None where the writer gave no text, or where it was deleted since a reader opened the bank.
        """
        rows = rows.detach().to("cpu", torch.int64).flatten()
        if len(rows) and (rows.min() < -1 or rows.max() >= self.num_chunks):
            raise ValueError(
                f"`rows` must be from -1 to {self.num_chunks - 1}, got {rows.min()} to {rows.max()}; rows are good "
                "while `generation` stays, so search again."
            )
        return self._ledger.locate(rows)

    # Inside.

    @property
    def _ledger(self) -> Ledger:
        return self._contents.ledger

    @property
    def _shapes(self) -> list[LayerShape] | None:
        return self._contents.shapes

    def _drop_expired(self) -> None:
        with self._lock:
            self._contents.drop_expired()

    def _document(self, argument: str, document_id: str) -> Document:
        checks.validate_known(argument, document_id, self._ledger.documents)
        return self._ledger.documents[document_id]

    def _position(self, layer: int) -> int:
        if layer not in self.memory_layers:
            raise ValueError(f"`layer` must be one of the memory layers {self.memory_layers}, got {layer!r}.")
        return self.memory_layers.index(layer)

    def _search(
        self,
        layer: int,
        queries: Tensor,
        num_chunks: int,
        rows: Tensor | None,
        scaling: float | None = None,
        newest: float | None = None,
    ) -> Found:
        position = self._position(layer)
        shapes = self._contents.shapes
        checks.validate_search(queries, num_chunks, None if shapes is None else shapes[position])
        with self._lock:
            rows, bonus = self._clock.visible(self._ledger, rows), None
            if scaling is not None and self.has_age_prior:
                checks.validate_scaling(scaling)
                weights = self._clock.log_weights(self._ledger, self.newest_date if newest is None else newest)
                bonus = None if weights is None else weights / scaling
            found = self._find(lambda some: self._contents.search(position, queries, num_chunks, some, bonus), rows)
            self._ledger.count_reads(found[1])
        return found

    def _find(self, search: Callable[[Tensor | None], Found], rows: Tensor | None) -> Found:
        """Return what a search of some rows finds; a bank with a refresh policy lets it act."""
        return search(rows)
