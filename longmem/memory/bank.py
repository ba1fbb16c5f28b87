"""The memory bank: documents in, chunks out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.encoder.history import Encoders
from longmem.encoder.stamp import EncoderStamp
from longmem.memory import checks
from longmem.memory.age_prior import AgePrior, make_age_prior
from longmem.memory.dated_bank import DatedBank
from longmem.memory.eviction import make_policy
from longmem.memory.freshness import KeptFresh
from longmem.memory.index import validate_index
from longmem.memory.locking import BankLock
from longmem.memory.refresh import refresh_name
from longmem.memory.rows.documents import Document, SourcePart
from longmem.memory.rows.segments import Joins
from longmem.memory.rows.storage import MemoryStorage, Storage
from longmem.memory.rows.table import BankContents
from longmem.memory.visibility import ContentClock, dated_document


class MemoryBank(KeptFresh, DatedBank):
    """Return an empty bank of named documents: attention keys and values of the `memory_layers` of one backbone.

    The bank is in memory: `save` writes it to a folder, `load` reads it back. `MemoryBank.create` makes one that lives in a
    folder, `MemoryBank.open` opens it; it is used in the same way, and what changes is on the disk when a call returns.

    Args:
        memory_layers: backbone layers whose keys and values are stored, in the order in which `add` gets them.
        chunk_size: tokens in a chunk, the unit of search.
        capacity_tokens: tokens that can be resident, a multiple of `chunk_size`; None: no limit; the default is the paper's.
        capacity_bytes: bytes of keys, values and search keys that can be resident; a limit beside the other one.
        index: "auto" (exact search by FAISS up to 8,192 chunks, clusters beyond), "flat" (exact at any size), "exact"
            (the same by torch), or "ivf", "hnsw" and "pq", whose settings follow a colon: "ivf:probed_share=0.06"
            (`longmem/memory/index/kinds.py`).
        eviction: what goes when the bank is full. "fifo": the chunks written first, whichever document owns them; "lru":
            the document that was not read for longest; "ttl:seconds=3600": what was written an hour ago, full or not.
        storage_dtype: of stored keys and values, "float16", "bfloat16", "float32" or "int8"; search keys are float32.
        device: where the tensors are.
        refresh: what happens when the encoder changes: "frozen" (nothing stale is ever read, the bank is refused), "eager",
            "bounded:max_lag=4,clock=version", "lazy" or "mapped" (`longmem/memory/refresh/`); also as a dict with a `name`.
        fingerprint: of the encoder that writes (`LongMemForCausalLM.encoder_stamp`, or its digest); None is not checked.
        age_prior: how much less old documents count when the bank is read, an `AgePrior` or its name, "exp:a=0.5"; None:
            age does not count.

    >>> bank = MemoryBank(memory_layers=[5], chunk_size=4)
    >>> keys = torch.eye(10).unsqueeze(0)  # one head, ten tokens, each with a direction of its own
    >>> bank.add("emma", [keys], [keys], tags=["novel"])
    >>> [(info.document_id, info.num_tokens, info.num_chunks, info.num_waiting_tokens) for info in bank.documents()]
    [('emma', 10, 2, 2)]
    >>> scores, rows = bank.search(5, keys[:, 6:7], num_chunks=3)  # three are asked for, two are there
    >>> scores, [place and place[:3] for place in bank.locate(rows)]
    (tensor([[[0.2500, 0.0000,   -inf]]]), [('emma', 4, 8), ('emma', 0, 4), None])
    """

    def __init__(
        self,
        *,
        memory_layers: Sequence[int],
        chunk_size: int,
        capacity_tokens: int | None = 65_536,
        capacity_bytes: int | None = None,
        index: str = "auto",
        eviction: str = "fifo",
        storage_dtype: torch.dtype | str = "float16",
        device: torch.device | str = "cpu",
        refresh: str | Mapping[str, Any] = "frozen",
        fingerprint: str | EncoderStamp | None = None,
        age_prior: AgePrior | str | None = None,
    ) -> None:
        checks.validate_sizes(memory_layers, chunk_size, capacity_tokens, capacity_bytes)
        validate_index(index)
        make_policy(eviction)
        self.memory_layers = tuple(memory_layers)
        self.chunk_size = chunk_size
        self.capacity_tokens = capacity_tokens
        self.capacity_bytes = capacity_bytes
        self.index = index
        self.eviction = eviction
        self.storage_dtype = checks.validate_storage_dtype(storage_dtype)
        self.device = torch.device(device)
        self.refresh = refresh_name(refresh)
        self._lock = BankLock()
        self._clock = ContentClock(make_age_prior(age_prior))
        self._contents = self._new_contents()
        self._contents.encoders = Encoders([] if fingerprint is None else [fingerprint])
        self._start_fresh()

    @classmethod
    def for_model(cls, model: Any, *, folder: str | PathLike[str] | None = None, **options: Any) -> MemoryBank:
        """Return an empty bank for what `model` writes; `options` are the other arguments of `MemoryBank`.

        `folder`: make the bank there (`MemoryBank.create`), and not in memory.
        """
        own = {
            "memory_layers": model.config.memory_layers or (),
            "chunk_size": model.config.chunk_size,
            "fingerprint": model.encoder_stamp(),
        }
        return cls(**own, **options) if folder is None else cls.create(folder, **own, **options)

    def empty_like(self) -> MemoryBank:
        """Return an empty bank with the same settings and encoders, in memory."""
        bank = type(self)(**self._settings(), device=self.device)
        bank._contents.encoders = self.encoders.copy()
        return bank

    # Writing.

    def add(
        self,
        document_id: str,
        keys: Sequence[Float[Tensor, "_kv_heads _tokens _dim"]],
        values: Sequence[Float[Tensor, "_kv_heads _tokens _dim"]],
        token_ids: Iterable[int] | Int[Tensor, " tokens"] | None = None,
        *,
        text: str | None = None,
        char_ends: Iterable[int] | Int[Tensor, " tokens"] | None = None,
        tags: Iterable[str] = (),
        segment: Literal["new"] | None = None,
        dated: float | None = None,
        valid_until: float | None = None,
    ) -> None:
        """Write a new document: one tensor of keys and one of values for each memory layer, and what they came from.

        The tail shorter than a chunk waits for `append`, and is found once its chunk is full. Raises ValueError, and
        writes nothing, for a known id, shapes that disagree, or numbers that are not finite or too large to store.

        Args:
            document_id: its name.
            keys: position-free.
            values: of the same tokens.
            token_ids: of the tokens.
            text: that they were made from, with `char_ends`: for each token the character after its last.
            tags: words to select documents by.
            segment: "new": the encoder saw these tokens and nothing before them, so they can be encoded again if it changes,
                and copied by an update that does not change them; None: not known, so when stale they are no longer read.
            dated: when the content was true, in seconds since 1970; None: when it was written.
            valid_until: when it ceases to be; from then on no search finds it. None: never.
        """
        with self.transaction():
            self._contents.drop_expired()
            checks.validate_new("document_id", document_id, self._ledger.documents)
            document = dated_document(document_id, tags, dated, valid_until)
            self._extend(document, keys, values, token_ids, text, char_ends, segment)

    def append(
        self,
        document_id: str,
        keys: Sequence[Float[Tensor, "_kv_heads _tokens _dim"]],
        values: Sequence[Float[Tensor, "_kv_heads _tokens _dim"]],
        token_ids: Iterable[int] | Int[Tensor, " tokens"] | None = None,
        *,
        text: str | None = None,
        char_ends: Iterable[int] | Int[Tensor, " tokens"] | None = None,
        segment: Joins = None,
    ) -> None:
        """Continue a document, as if these tokens had been written with those before; arguments as for `add`.

        `segment`: "same", the encoder saw them behind those of the document's last segment; "new" and None as for `add`.
        """
        with self.transaction():
            self._contents.drop_expired()  # before the document is looked up: it may be what goes
            document = self._document("document_id", document_id)
            self._extend(document, keys, values, token_ids, text, char_ends, segment)

    def update(self, document_id: str, text_or_ids: str | Iterable[int] | Tensor, *, model: Any, **options: Any) -> int:
        """Replace a document by the encoding of a new text, written now; return how many tokens had to be encoded.

        Tags, pin and dates stay. `options`: `batch_size` and `progress` of `LongMemForCausalLM.memorize`.

        Windows whose tokens are the same as those of some window before are copied, the others encoded; so a change costs
        as much as the text from there to the end of its window, if it keeps the length, and to the end of the document
        if it does not. The text is encoded into a bank of its own, so neither a failure nor an eviction on the way touches
        this one; the price is memory for the new version. Raises ValueError for an unknown id or another encoder.
        """
        self.refuse_reader()
        old = self._document("document_id", document_id)
        self.read_by(model)
        draft = self.empty_like()
        num_encoded = model.memorize(draft, text_or_ids, document_id=document_id, reuse=(self, document_id), **options)
        if draft._contents.shapes != self._contents.shapes:
            raise ValueError(
                f"`model` must write the sizes that the bank holds, {self._contents.shapes}, got "
                f"{draft._contents.shapes}; memorize all documents again, in `MemoryBank.for_model(model)`."
            )
        with self.transaction(), self._lock, torch.inference_mode(False):
            self._contents.replace(old, draft._contents, draft._ledger.documents[document_id])
        return num_encoded

    @torch.inference_mode(False)
    def copy_tokens(
        self,
        document_id: str,
        bank: MemoryBank,
        origin_id: str,
        origin: int,
        part: SourcePart,
        **said: Any,
    ) -> None:
        """Add, or append, a segment as it is stored in a document of another bank with the same settings and encoder.

        `origin` is the first of its tokens there; they begin and end with whole chunks, in both documents. `said`: `tags`,
        `dated` and `valid_until` of a new document.
        """
        document = bank._document("origin_id", origin_id)
        first = origin // self.chunk_size - document.first_chunk(self.chunk_size)
        rows = document.rows.values[first : first + len(part.token_ids) // self.chunk_size]
        chunks = bank._contents.storage.select(rows)
        with self.transaction():
            own = self._ledger.documents.get(document_id) or dated_document(document_id, **said)
            checks.validate_source(part.token_ids, part.text, part.char_ends, len(part.token_ids), own)
            with self._lock:
                self._contents.extend_with_chunks(own, chunks, part)

    def delete(self, document_id: str) -> None:
        """Forget a document; its chunks are never found again. Raises ValueError if there is none.

        In a folder its bytes stay until `compact`, though nothing reads them.
        """
        document = self._document("document_id", document_id)
        with self.transaction(), self._lock:
            self._contents.drop(document)

    def rename(self, old: str, new: str) -> None:
        """Give a document another id. Raises ValueError if there is no `old`, or already a `new`."""
        self._document("old", old)
        checks.validate_new("new", new, self._ledger.documents)
        with self.transaction():
            self._ledger.rename(old, new)

    def tag(self, document_id: str, tags: Iterable[str]) -> None:
        """Give a document these tags instead of those it had."""
        document = self._document("document_id", document_id)
        with self.transaction():
            self._ledger.label(document, checks.validate_tags(tags))

    def pin(self, document_id: str, is_pinned: bool = True) -> None:
        """Keep a document from eviction or, with False, no longer."""
        document = self._document("document_id", document_id)
        with self.transaction():
            self._ledger.pin(document, is_pinned)

    def use_index(self, index: str) -> None:
        """Search with another index from now on, named as for the class; it is built when it is first needed."""
        validate_index(index)
        with self.transaction():
            self.index = index
            self._contents.use_index(index)

    def clear(self) -> None:
        """Forget all documents; of a bank in memory also the sizes of heads that the first of them has fixed."""
        if self._folder is None:
            encoders = self.encoders
            self._contents = self._new_contents()
            self._contents.encoders = encoders
            return
        with self.transaction():
            for document in list(self._ledger.documents.values()):
                self._contents.drop(document)

    def __repr__(self) -> str:
        limit = "" if self.capacity_tokens is None else f"of {self.capacity_tokens} "
        place = "" if self._folder is None else f" in {str(self._folder.path)!r}"
        return (
            f"MemoryBank({len(self._ledger.documents)} documents, {self.num_tokens} {limit}tokens{place}, "
            f"memory_layers={self.memory_layers}, chunk_size={self.chunk_size}, index={self.index!r})"
        )

    # Inside.

    def _new_contents(self, storage: Storage | None = None) -> BankContents:
        return BankContents(
            self._new_storage() if storage is None else storage,
            make_policy(self.eviction),
            chunk_size=self.chunk_size,
            capacity_tokens=self.capacity_tokens,
            capacity_bytes=self.capacity_bytes,
            index=self.index,
            storage_dtype=self.storage_dtype,
            device=self.device,
        )

    def _new_storage(self) -> MemoryStorage:
        return MemoryStorage(None if self.capacity_tokens is None else self.capacity_tokens // self.chunk_size)

    def _settings(self) -> dict[str, Any]:
        return {
            "memory_layers": list(self.memory_layers),
            "chunk_size": self.chunk_size,
            "capacity_tokens": self.capacity_tokens,
            "capacity_bytes": self.capacity_bytes,
            "index": self.index,
            "eviction": self.eviction,
            "storage_dtype": str(self.storage_dtype).removeprefix("torch."),
            "refresh": self.refresh,
            "fingerprint": self.fingerprint,
        } | ({} if self.age_prior is None else {"age_prior": self.age_prior.name})

    @torch.inference_mode(False)  # whatever the caller's mode: what is made inside it can never be written to again
    def _extend(
        self,
        document: Document,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        token_ids: Iterable[int] | Tensor | None,
        text: str | None,
        char_ends: Iterable[int] | Tensor | None,
        joins: Joins,
    ) -> None:
        """Check everything, then write, inside a transaction: an error leaves the bank as it was."""
        num_tokens = checks.validate_key_values(
            keys,
            values,
            memory_layers=self.memory_layers,
            known_shapes=self._contents.shapes,
            storage_dtype=self.storage_dtype,
        )
        part = checks.validate_source(token_ids, text, char_ends, num_tokens, document)
        with self._lock:
            self._contents.extend(document, keys, values, part, joins)
