"""Reading some documents of a bank: the same searches, over a selection."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from longmem.memory.checks import validate_choice, validate_known, validate_names, validate_tags
from longmem.memory.finding import FindableMemory, FindingModel, FoundPassage, TextBank, find
from longmem.memory.protocols import EncodingModel, Found
from longmem.memory.rows.ledger import ChunkPlace
from longmem.memory.rows.storage import KeysValues
from longmem.memory.rows.table import Table
from longmem.memory.visibility import Selection, Visibility


class Selectable(FindableMemory, Protocol):
    """A memory of which some documents can be read by themselves."""

    @property
    def fingerprint(self) -> str | None: ...

    def search(
        self,
        layer: int,
        queries: Tensor,
        num_chunks: int,
        *,
        scaling: float | None = None,
        newest: float | None = None,
        selection: Selection | None = None,
    ) -> Found: ...

    def nearest(self, layer: int, queries: Tensor, num_chunks: int, *, selection: Selection | None = None) -> Found: ...

    def sample(self, num_chunks: int, *, selection: Selection | None = None) -> Found: ...

    def next_ids(self, rows: Tensor, generation: Hashable) -> Tensor: ...

    def log_weights(
        self, rows: Tensor, *, newest: float | None = None, selection: Selection | None = None
    ) -> Tensor: ...

    def stored(self, layer: int, generation: Hashable) -> tuple[Tensor, Tensor] | None: ...


class BankView:
    """A read-only view of some documents of a bank: those named, and those with one of the tags.

    A view holds names and tags, not chunks: it sees what is later appended to its documents, follows an update, and finds
    nothing of a document once it is deleted, evicted or renamed. A document that gets one of the tags later is seen; a tag that
    no document has when the view is made is refused, as a misspelt id is.
    """

    def __reduce__(self) -> Any:
        """Return how a copy, or another process, gets this view: as a selection of the bank that it gets."""
        return type(self)._of, (self.bank, self.document_ids, self.tags)

    @staticmethod
    def _of(bank: Any, document_ids: tuple[str, ...], tags: tuple[str, ...]) -> BankView:
        return bank.select(document_ids, tags=tags)

    def __init__(
        self,
        bank: Selectable,
        table: Table,
        visibility: Visibility,
        document_ids: str | Iterable[str] | None = None,
        tags: str | Iterable[str] = (),
    ) -> None:
        self.bank, self.memory_layers, self.chunk_size = bank, bank.memory_layers, bank.chunk_size
        self.by_token = table.by_token
        self._table, self._visibility = table, visibility
        self.document_ids = validate_names("document_ids", document_ids)
        self.tags = validate_tags((tags,) if isinstance(tags, str) else tags)
        self.selection = Selection(self.document_ids, self.tags)
        if not self.document_ids and not self.tags:
            raise ValueError(
                "`document_ids` or `tags` must name at least one document or tag, got none; read the bank itself for all."
            )
        with table.lock:
            known_tags = (
                {tag for document in table.ledger.documents.values() for tag in document.tags} if self.tags else ()
            )
            for tag in self.tags:
                validate_choice("tags", tag, sorted(known_tags))
            for document_id in self.document_ids:
                validate_known("document_ids", document_id, table.ledger.documents)

    @property
    def fingerprint(self) -> str | None:
        return self.bank.fingerprint

    @property
    def generation(self) -> int:
        return self._table.ledger.generation

    @property
    def version(self) -> int:
        return self._table.ledger.version

    @property
    def num_chunks(self) -> int:
        """Return the number of resident chunks of these documents."""
        with self._table.lock:
            return len(self.selection.rows(self._table.ledger))

    @property
    def num_tokens(self) -> int:
        with self._table.lock:
            return int(self._table.ledger.sizes(self.selection.rows(self._table.ledger)).sum())

    @property
    def is_empty(self) -> bool:
        """Return whether a search can find nothing of these documents, as far as the bank knows."""
        return self.bank.is_empty or not self.num_chunks

    @property
    def newest_date(self) -> float:
        """Return the date of the newest of these documents that a search can find; -inf if there is none."""
        with self._table.lock:
            return self._visibility.newest(self.selection)

    def documents(self) -> list[str]:
        """Return the ids of these documents that are there."""
        with self._table.lock:
            return [document.document_id for document in self.selection.documents(self._table.ledger)]

    def parts(self) -> list[tuple[TextBank, list[str]]]:
        """Return the bank, with the names of these documents that a search can find."""
        own = set(self.documents())
        return [(bank, [name for name in names if name in own]) for bank, names in self.bank.parts()]

    def find(self, text: str, model: FindingModel | None = None, k: int = 10) -> list[FoundPassage]:
        """Return passages of these documents alone; arguments as for `MemoryBank.find`."""
        return find(self, text, model, k)

    def ready_for(self, model: EncodingModel) -> None:
        self.bank.ready_for(model)

    def search(
        self,
        layer: int,
        queries: Float[Tensor, "kv_heads queries dim"],
        num_chunks: int,
        *,
        scaling: float | None = None,
        newest: float | None = None,
    ) -> Found:
        """Return the best chunks of these documents alone; arguments as for `MemoryBank.search`."""
        return self.bank.search(layer, queries, num_chunks, scaling=scaling, newest=newest, selection=self.selection)

    def log_weights(self, rows: Int[Tensor, "*shape"], *, newest: float | None = None) -> Float[Tensor, "*shape"]:
        """Return log w(age) of rows, with ages from the newest of these documents."""
        return self.bank.log_weights(rows, newest=newest, selection=self.selection)

    def nearest(self, layer: int, queries: Float[Tensor, "kv_heads queries dim"], num_chunks: int) -> Found:
        """Return the chunks of these documents whose keys are nearest; see `MemoryBank.nearest`."""
        return self.bank.nearest(layer, queries, num_chunks, selection=self.selection)

    def sample(self, num_chunks: int) -> Found:
        """Return chunks spread evenly over these documents; see `MemoryBank.sample`."""
        return self.bank.sample(num_chunks, selection=self.selection)

    def next_ids(self, rows: Int[Tensor, "*shape"], generation: Hashable) -> Int[Tensor, "*shape chunk_size"]:
        return self.bank.next_ids(rows, generation)

    def gather(self, layer: int, rows: Int[Tensor, "kv_heads chunks"], generation: Hashable) -> KeysValues:
        return self.bank.gather(layer, rows, generation)

    def stored(self, layer: int, generation: Hashable) -> tuple[Tensor, Tensor] | None:
        return self.bank.stored(layer, generation)

    def locate(self, rows: Int[Tensor, "*shape"]) -> list[ChunkPlace | None]:
        return self.bank.locate(rows)
