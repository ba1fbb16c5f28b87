"""Reading a memory bank: the interface that attention sees, for a whole bank or for some of its documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from longmem.memory.checks import validate_known, validate_tags
from longmem.memory.index import Found
from longmem.memory.rows.documents import Document
from longmem.memory.rows.ledger import ChunkPlace

if TYPE_CHECKING:  # a view is made by its bank, so the bank's module imports this one
    from longmem.memory.reader import BankReader


class BankView:
    """Return a read-only view of some documents of a bank: those named, and those with one of the tags.

    A view holds names and tags, not chunks: it sees what is later appended to its documents, follows an update, and finds
    nothing of a document once it is deleted, evicted or renamed. A document that gets one of the tags later is seen.
    """

    def __init__(
        self, bank: BankReader, document_ids: str | Iterable[str] | None, tags: str | Iterable[str] = ()
    ) -> None:
        self._bank = bank
        document_ids = (document_ids,) if isinstance(document_ids, str) else document_ids or ()
        self.document_ids = tuple(dict.fromkeys(document_ids))
        self.tags = validate_tags((tags,) if isinstance(tags, str) else tags)
        if not self.document_ids and not self.tags:
            raise ValueError(
                "`document_ids` or `tags` must name at least one document or tag, got none; read the bank itself for all."
            )
        for document_id in self.document_ids:
            validate_known("document_ids", document_id, bank._ledger.documents)
        # The rows found last, and the version of the ledger that they are from.
        self._seen: tuple[int, Tensor] | None = None

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Return the backbone layers whose keys and values are stored."""
        return self._bank.memory_layers

    @property
    def chunk_size(self) -> int:
        """Return the tokens in a chunk."""
        return self._bank.chunk_size

    @property
    def fingerprint(self) -> str | None:
        """Return the encoder fingerprint of the bank."""
        return self._bank.fingerprint

    @property
    def encodings(self) -> int:
        """Return what `MemoryBank.encodings` returns."""
        return self._bank.encodings

    def read_by(self, model: Any) -> None:
        """Make the bank ready to be read by a model, as `MemoryBank.read_by` does."""
        self._bank.read_by(model)

    @property
    def num_chunks(self) -> int:
        """Return the number of resident chunks of these documents."""
        return len(self._rows())

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens in these chunks."""
        return self.num_chunks * self.chunk_size

    @property
    def generation(self) -> int:
        """Return what `MemoryBank.generation` returns."""
        return self._bank.generation

    @property
    def version(self) -> int:
        """Return what `MemoryBank.version` returns."""
        return self._bank.version

    @property
    def is_empty(self) -> bool:
        """Return whether a search can find nothing of these documents, as far as the bank knows."""
        return self._bank.is_empty or not self.num_chunks

    @property
    def has_age_prior(self) -> bool:
        """Return what `MemoryBank.has_age_prior` returns."""
        return self._bank.has_age_prior

    @property
    def newest_date(self) -> float:
        """Return the date of the newest of these documents that a search can find; -inf if there is none."""
        with self._bank._lock:
            return self._bank._clock.newest(self._bank._ledger, self._documents())

    def search(
        self,
        layer: int,
        queries: Float[Tensor, "kv_heads queries dim"],
        num_chunks: int,
        *,
        scaling: float | None = None,
        newest: float | None = None,
    ) -> Found:
        """Return what `MemoryBank.search` returns, for the chunks of these documents alone; ages count from their newest."""
        self._bank._drop_expired()
        if scaling is not None and newest is None and self.has_age_prior:
            newest = self.newest_date
        return self._bank._search(layer, queries, num_chunks, self._rows(), scaling, newest)

    def log_weights(self, rows: Int[Tensor, "*shape"], *, newest: float | None = None) -> Float[Tensor, "*shape"]:
        """Return what `MemoryBank.log_weights` returns, with ages from the newest of these documents."""
        return self._bank.log_weights(rows, newest=self.newest_date if newest is None else newest)

    def gather(
        self, layer: int, rows: Int[Tensor, "kv_heads chunks"]
    ) -> tuple[
        Float[Tensor, "kv_heads chunks chunk_size key_dim"],
        Float[Tensor, "kv_heads chunks chunk_size value_dim"],
    ]:
        """Return what `MemoryBank.gather` returns."""
        return self._bank.gather(layer, rows)

    def locate(self, rows: Int[Tensor, ...]) -> list[ChunkPlace | None]:
        """Return what `MemoryBank.locate` returns."""
        return self._bank.locate(rows)

    def _rows(self) -> Int[Tensor, " rows"]:
        ledger = self._bank._ledger
        if self._seen is None or self._seen[0] != ledger.version:
            self._seen = ledger.version, ledger.rows_of(self._documents())
        return self._seen[1]

    def _documents(self) -> list[Document]:
        names, tags = set(self.document_ids), set(self.tags)
        documents = self._bank._ledger.documents
        return [each for name, each in documents.items() if name in names or not tags.isdisjoint(each.tags)]
