"""The memory bank: documents in, chunks out."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.encoder.history import Encoders
from longmem.encoder.stamp import EncoderStamp
from longmem.errors import ChangedMemoryError
from longmem.memory import checks
from longmem.memory.age_prior import AgePrior, make_age_prior
from longmem.memory.finding import FindingModel, FoundPassage, TextBank, find
from longmem.memory.folder.bank_folder import BankFolder, OnDisk, folder_path, has_bank
from longmem.memory.folder.foreign import said_by
from longmem.memory.freshness import Freshness
from longmem.memory.index import validate_index
from longmem.memory.memorize import memorize
from longmem.memory.protocols import EncodingModel, Found
from longmem.memory.reader import BankView
from longmem.memory.rows.documents import Document, DocumentInfo, SourcePart
from longmem.memory.rows.ledger import ChunkPlace
from longmem.memory.rows.segments import Joins, Segment
from longmem.memory.rows.storage import (
    KeysValues,
    LayerShape,
    bytes_by_name,
    decode,
    default_budget,
    searched_name,
)
from longmem.memory.rows.table import DEFAULT_CAPACITY, Table
from longmem.memory.visibility import READING, Selection, Snapshot, Visibility, has_expired, position_of, take

MUST_AGREE = ("memory_layers", "chunk_size", "storage_dtype", "by_token")  # of banks between which chunks are copied
# Names of the parts that were methods of the bank, for one release more.
MOVED = {
    **dict.fromkeys(("reencode", "sweep", "lags", "has_stale", "read_as_is", "refreshed", "may_write"), "freshness"),
    **dict.fromkeys(("verify", "compact", "reload", "num_dead_bytes"), "folder"),
}
RENAMED = {
    "staleness": ("freshness", "report"),
    "use_refresh": ("freshness", "use"),
    "refresh_policy": ("freshness", "policy"),
    "read_by": ("", "ready_for"),
}


@checks.checked_methods("search", "gather", "stored", "ready_for", "update")
class MemoryBank:
    """A store of named documents: the attention keys and values of the `memory_layers` of one backbone, in chunks.

    The bank is in memory: `save` writes it to a folder, `load` reads it back. One that `create` makes, or `open` opens, lives
    in a folder: what changes is on the disk when a call returns. Its parts: `freshness`, what it does when the encoder
    changes; `folder`, its place on disk.

    Args:
        memory_layers: backbone layers whose keys and values are stored, in the order in which `add` gets them.
        chunk_size: tokens in a chunk, the unit of search.
        capacity_tokens: tokens that can be resident, a multiple of `chunk_size`; the last chunk of a document takes the room
            of a whole one. None: no limit. The default is the paper's; a bank that has it warns, once, when it is full.
        capacity_bytes: bytes of keys, values and search keys that can be resident; a limit beside the other one.
        search: what a query is compared with, the mean key of each chunk ("chunk_mean") or the key of each token ("token"), by
            the best of which its chunk is found; then keys are searched themselves, and no mean keys are stored.
        index: "auto" (exact search by FAISS up to 8,192 chunks, clusters beyond), "flat" (exact at any size), "exact"
            (the same by torch), or "ivf", "hnsw" and "pq", whose settings follow a colon: "ivf:probed_share=0.06"
            (`longmem/memory/index/kinds.py`).
        eviction: what goes when the bank is full. "fifo": the chunks written first, whichever document owns them; "lru":
            the document that was not read for longest; "ttl:seconds=3600": what was written an hour ago, full or not.
        storage_dtype: of stored keys and values, "float16", "bfloat16", "float32" or "int8"; search keys are float32.
        device: where the bank is; `to` says how much of it, and moves it.
        refresh: what happens when the encoder changes: "frozen" (nothing stale is ever read, the bank is refused), "eager",
            "bounded:max_lag=4,clock=version" or "lazy" (`longmem/memory/refresh/`); also as a dict with a `name`.
        fingerprint: of the encoder that writes (`LongMemForCausalLM.encoder_stamp`, or its digest); None is not checked.
        age_prior: how much less old documents count when the bank is read, an `AgePrior` or its name, "exp:a=0.5"; None:
            age does not count.

    >>> bank = MemoryBank(memory_layers=[5], chunk_size=4)
    >>> keys = torch.eye(10).unsqueeze(0)  # one head, ten tokens, each with a direction of its own
    >>> bank.add("emma", [keys], [keys], tags=["novel"])
    >>> [(info.document_id, info.num_tokens, info.num_chunks, info.num_waiting_tokens) for info in bank.documents()]
    [('emma', 10, 3, 2)]
    >>> rows, scores, *_ = bank.search(5, keys[:, 9:10], num_chunks=4)  # four are asked for, three are there
    >>> best_and_missing = [0, 3]
    >>> scores[..., best_and_missing], [place and place[:3] for place in bank.locate(rows[..., best_and_missing])]
    (tensor([[[0.5000,   -inf]]]), [('emma', 8, 10), None])
    """

    def __init__(
        self,
        *,
        memory_layers: Sequence[int],
        chunk_size: int,
        capacity_tokens: int | None = DEFAULT_CAPACITY,
        capacity_bytes: int | None = None,
        search: Literal["chunk_mean", "token"] = "chunk_mean",
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
        self.memory_layers = tuple(memory_layers)
        self.chunk_size = chunk_size
        self.capacity_tokens, self.capacity_bytes = capacity_tokens, capacity_bytes
        self.eviction = eviction
        self.storage_dtype, self.device = checks.validate_storage_dtype(storage_dtype), torch.device(device)
        self._table = Table(
            eviction=eviction,
            chunk_size=chunk_size,
            capacity_tokens=capacity_tokens,
            capacity_bytes=capacity_bytes,
            index=index,
            storage_dtype=self.storage_dtype,
            device=self.device,
            by_token=checks.validate_choice("search", search, checks.SEARCHES) == "token",
        )
        self._table.encoders = Encoders([] if fingerprint is None else [fingerprint])
        self._on_disk: OnDisk | None = None
        self.freshness = Freshness(self._table, refresh)
        self._visibility = Visibility(self._table, make_age_prior(age_prior))

    # Making, opening, saving.

    @classmethod
    def for_model(
        cls, model: EncodingModel, *, folder: str | PathLike[str] | None = None, **options: Any
    ) -> MemoryBank:
        """Return an empty bank for what `model` writes, in memory or in `folder`; `options`: other arguments of the class.

        It is on the model's device unless `device` says another.
        """
        options.setdefault("device", model.input_device)
        own = {
            "memory_layers": model.config.memory_layers or (),
            "chunk_size": model.config.chunk_size,
            "search": model.config.search,
            "fingerprint": model.encoder.stamp(),
        }
        for name in own.keys() & options.keys():
            raise ValueError(
                f"`{name}` must be left to the model, whose {name} is {own[name]}, got {checks.got(options[name])}; "
                "leave it out, or make a bank for no model with `MemoryBank(...)`."
            )
        return cls(**own, **options) if folder is None else cls.create(folder, **own, **options)

    @classmethod
    def create(cls, folder: str | PathLike[str], **settings: Any) -> Self:
        """Return a new, empty bank in `folder`, open for writing; `settings`: arguments of the class, by default without limit.

        Raises ValueError if a bank is there already, or the folder cannot be written.
        """
        if has_bank(folder):
            raise ValueError(f"`folder` must not hold a bank yet, got {str(folder)!r}; open it with `MemoryBank.open`.")
        bank = cls(**{"capacity_tokens": None} | settings)
        bank._live_in(BankFolder(folder, write=True, create=bank._description(), device=bank.device))
        return bank

    @classmethod
    def open(
        cls,
        folder: str | PathLike[str],
        model: EncodingModel | None = None,
        *,
        read_only: bool = False,
        device: torch.device | str | None = None,
        mmap: bool = True,
        refresh: str | Mapping[str, Any] | None = None,
        strict: bool = True,
    ) -> Self:
        """Return the bank in `folder` as it was at the last commit; it stays on disk, and its changes go there.

        Search keys are read into memory when a layer is first searched; keys and values when they are needed. One process
        may write; any number may read, each the commit that was the last when it opened the bank or called `folder.reload`.
        What is checked: the catalogue; length and header of every file; search keys when they are read; all by
        `folder.verify`.

        Args:
            folder: that `create` or `save` wrote.
            model: that will read the bank; if its encoder is not the one that wrote it, the refresh policy acts.
            read_only: change nothing, and keep nobody from changing it.
            device: where the bank is, see `to`; None: with the model or, without one, in host memory.
            mmap: False: nothing of what was read stays in this process; reading takes two to five times as long.
            refresh: policy to follow from now on; None: the bank's own, by default "frozen", which refuses another encoder.
            strict: False: read what another encoder wrote as it is, from now on with every entry's encoder unknown.

        Raises ValueError if it is missing, damaged, of another version, or somebody is writing it; StaleMemoryError, which is
        one, if another encoder wrote it and the policy is "frozen".
        """
        checks.refuse_strict_alone(strict, model)
        device = torch.device(device or ("cpu" if model is None else model.input_device))
        opened = BankFolder(folder, write=not read_only, device=device, mapped=mmap)
        try:
            with said_by(opened.catalogue.path):
                bank = cls(**opened.read_content()["settings"], device=device)
            bank._live_in(opened)
            bank._open_for(model, refresh, strict)
        except BaseException:
            opened.close()
            raise
        return bank

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        model: EncodingModel | None = None,
        *,
        device: torch.device | str | None = None,
        refresh: str | Mapping[str, Any] | None = None,
        strict: bool = True,
    ) -> Self:
        """Return a copy, in memory, of the bank in `folder`, after a check of all of it; arguments and errors as for `open`."""
        checks.refuse_strict_alone(strict, model)
        with cls.open(folder, read_only=True) as saved:
            saved.folder.verify()
            bank = saved.copy(device=device or ("cpu" if model is None else model.input_device))
        bank._open_for(model, refresh, strict)
        return bank

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the bank to `folder`, in place of one that is there; a process killed meanwhile leaves that, or this one.

        Raises ValueError if the folder cannot be written.
        """
        if self._on_disk is not None and folder_path(folder).resolve() == self._on_disk.path:
            return
        target = BankFolder(folder, write=True, create=self._description(), with_first_commit=True)
        try:
            table = self._table.empty(target.new_storage(self.storage_dtype))
            with self._table.lock:
                target.replace(self._table, table, self._settings())
        finally:
            target.close()

    def empty_like(self) -> Self:
        """Return an empty bank with the same settings and encoders, in memory."""
        return self._empty(self.device)

    @torch.inference_mode(False)
    def copy(self, *, device: torch.device | str | None = None) -> Self:
        """Return a bank in memory, here or on another device, that holds the same documents and goes on by itself."""
        with self._table.lock:
            twin = self._empty(self.device if device is None else device)
            self._table.copy_to(twin._table)
        return twin

    def to(self, device: torch.device | str, *, device_budget: int | None = None) -> Self:
        """Keep this bank on a device from now on, and return it; `device_bytes` says before how much that is.

        What a search compares is on the device, and so are keys and values where all of them fit in the budget. Where they do
        not, or no longer do after a write, they stay in host memory or in the folder; of a GPU, what was found is copied to
        it through pinned memory, without waiting. A bank in a folder reads what it keeps when it is first needed, and in host
        memory keeps no more than what is searched.

        Args:
            device: "cpu", "cuda", "cuda:1".
            device_budget: bytes there, of tensors that grow by doubling as far as they may; None: half of what is free on a
                GPU now, and no limit elsewhere.

        Raises ValueError, with figures, where the budget has no room for what a search compares, now or at a later write.
        """
        device = torch.device(device)
        self._table.place(device, default_budget(device) if device_budget is None else device_budget)
        self.device = device
        return self

    def device_bytes(self) -> tuple[int, int]:
        """Return the bytes of what a search of all resident chunks compares, and of these with all keys and values."""
        if not self.shapes:
            return 0, 0
        sizes = bytes_by_name(self.shapes, self.chunk_size, self.storage_dtype)
        return self.num_chunks * sizes[searched_name(self.shapes[0])], self.num_chunks * sum(sizes.values())

    @property
    def folder(self) -> OnDisk:
        """Return the bank's place on disk. Raises ValueError for a bank in memory."""
        if self._on_disk is None:
            raise ValueError("this bank is in memory, without a folder; `save` it and `MemoryBank.open` the folder.")
        return self._on_disk

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return how a copy, or another process, gets this bank: with all it holds or, from a folder, by opening that to read.

        A bank opened so is of the last commit at that moment; `copy` returns one in memory that goes on by itself.
        """
        if self._on_disk is None:
            return super().__reduce_ex__(protocol)
        folder, mapped = self._on_disk.path_of_commit(), self._on_disk.is_mapped
        return functools.partial(type(self).open, folder, read_only=True, device=self.device, mmap=mapped), ()

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """Make all changes inside the block durable together at its end or, if it raises, none of them.

        Without it, every change is a transaction of its own. A block inside a block is part of it. One thread at a time may
        change a bank, and another that wants to waits for two minutes at most; then it raises ValueError. Of a bank in memory
        nothing is undone; a single change that is cut short, as by Ctrl-C, ends it.
        """
        return self._table.transaction()

    def refuse_reader(self) -> None:
        """Raise ValueError if the bank was opened to be read, or is closed: what is to be written later need not begin."""
        self._table.refuse_reader()

    def close(self) -> None:
        """Save indexes and how often documents were read, and let others write; the bank cannot be changed afterwards."""
        if self._on_disk is not None:
            self._on_disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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

        The last tokens make a shorter chunk, which is found like the others and which `append` goes on to fill. Raises
        ValueError, and writes nothing, for a known id, shapes that disagree, or numbers that are not finite or too large to
        store.

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
        if segment == "same":
            raise ValueError(
                "`segment` must be \"new\" or None for a new document, got 'same'; `append` continues a segment."
            )
        with self._table.change():
            self._table.drop_expired()
            checks.validate_new("document_id", document_id, self._table.ledger.documents)
            document = checks.dated_document(document_id, tags, dated, valid_until)
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
        with self._table.change():
            document = self._document("document_id", document_id)
            self._extend(document, keys, values, token_ids, text, char_ends, segment)

    def update(
        self,
        document_id: str,
        text_or_ids: str | Sequence[int] | Tensor,
        *,
        model: EncodingModel,
        batch_size: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Replace a document by the encoding of a new text, written now; return how many tokens had to be encoded.

        Tags, pin and dates stay. `batch_size` and `progress` are those of `LongMemForCausalLM.memorize`.

        Windows whose tokens are the same as those of some window before are copied, the others encoded; so a change costs
        as much as the text from there to the end of its window, if it keeps the length, and to the end of the document
        if it does not. The text is encoded into a bank of its own, so neither a failure nor an eviction on the way touches
        this one; the price is memory for the new version. Raises ValueError for an unknown id or another encoder.
        """
        self.refuse_reader()
        self._document("document_id", document_id)
        checks.validate_model("model", model)
        self.ready_for(model)
        draft = self.empty_like()
        draft._table.forgets_by_itself = False  # it counts as written when it takes the old one's place
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        if progress is not None:
            checks.validate_callable("progress", progress)
        written = memorize(model, draft, text_or_ids, document_id, reuse=(self, document_id), **options)
        self._take_version(document_id, draft)
        return written.num_encoded

    def _take_version(self, document_id: str, draft: MemoryBank) -> None:
        """Replace a document by that of the same name in a bank with the same settings; tags, pin and dates stay."""
        if draft._table.shapes != self._table.shapes:
            raise ValueError(
                f"`model` must write the sizes that the bank holds, {self._table.shapes}, got "
                f"{draft._table.shapes}; memorize all documents again, in `MemoryBank.for_model(model)`."
            )
        with self._table.change():
            old = self._document("document_id", document_id)
            self._table.replace(old, draft._table, draft._table.ledger.documents[document_id])

    def copy_tokens(
        self, document_id: str, bank: MemoryBank, origin_id: str, origin: int, part: SourcePart, **said: Any
    ) -> None:
        """Add, or append, a segment as it is stored in a document of another bank with the same settings and encoder.

        `origin` is the first of its tokens there; they begin and end with whole chunks, in both documents. `said`: `tags`,
        `dated` and `valid_until` of a new document. Raises ChangedMemoryError if other tokens are there.
        """
        size, count = self.chunk_size, len(part.token_ids)
        with bank._table.lock, torch.inference_mode(False):
            document = bank._document("origin_id", origin_id)
            first = origin // size - document.first_chunk(size)
            is_alike = all(getattr(bank, name) == getattr(self, name) for name in MUST_AGREE)
            is_whole = count and not (origin % size or count % size) and origin + count <= document.num_tokens
            if not (is_alike and is_whole and first >= 0):
                raise ValueError(
                    f"`origin` and `part` must be whole chunks that {origin_id!r} holds, of a `bank` with these settings, "
                    f"got {origin}, {count} tokens and {bank}; `memorize` encodes the text."
                )
            source, place = document.source, first * size
            if source is None or not torch.equal(source.ids_of(place, place + count), part.token_ids):
                raise ChangedMemoryError
            chunks = bank._table.storage.select(document.rows.values[first : first + count // size])
        with self._table.change():
            own = self._table.ledger.documents.get(document_id) or checks.dated_document(document_id, **said)
            if own.num_tokens % size:
                raise ValueError(
                    f"`document_id` must name a document of whole chunks, got {document_id!r} with {own.num_tokens} tokens; "
                    "`append` goes on with it."
                )
            checks.validate_source(part.token_ids, part.text, part.char_ends, count, own)
            self._table.extend_with_chunks(own, chunks, part, self.freshness.version_written())

    def delete(self, document_id: str) -> None:
        """Forget a document; in a folder its bytes stay until `compact`. Raises ValueError if there is none."""
        with self._table.change():
            self._table.drop(self._document("document_id", document_id))

    def rename(self, old: str, new: str) -> None:
        """Give a document another id. Raises ValueError if there is no `old`, or already a `new`."""
        with self._table.change():
            self._document("old", old)
            checks.validate_new("new", new, self._table.ledger.documents)
            self._table.ledger.rename(old, new)

    def tag(self, document_id: str, tags: Iterable[str]) -> None:
        """Give a document these tags instead of those it had."""
        tags = checks.validate_tags(tags)
        with self._table.change():
            self._table.ledger.label(self._document("document_id", document_id), tags)

    def pin(self, document_id: str, is_pinned: bool = True) -> None:
        """Keep a document from eviction or, with False, no longer."""
        with self._table.change():
            self._table.ledger.pin(self._document("document_id", document_id), is_pinned)

    def use_index(self, index: str) -> None:
        """Search with another index from now on, named as for the class; it is built when it is first needed."""
        validate_index(index)
        with self._table.change():
            self._table.use_index(index)

    def use_age_prior(self, age_prior: AgePrior | str | None) -> None:
        """Let age count in another way from now on; given as for the class."""
        chosen = make_age_prior(age_prior)
        with self._table.change():
            self._visibility.use(chosen)
            self._table.ledger.note_change()

    def clear(self) -> None:
        """Forget all documents; of a bank in memory also the sizes of heads that the first of them has fixed."""
        if self._on_disk is None:
            empty = self._table.empty()
            empty.encoders = self.encoders
            self._table.become(empty)
            return
        with self._table.change():
            for document in list(self._table.ledger.documents.values()):
                self._table.drop(document)

    def supersede(self, document_id: str, by: str | None = None) -> None:
        """Hide a document whose text no longer holds, from searches of the bank and of all views on it.

        It stays, with its text, takes room, and is evicted, as before. `by`: what took its place, followed when it is renamed
        or updated, and forgotten when it is deleted or evicted; None: nothing did. Raises ValueError for an unknown id, or a
        `by` that was itself superseded, in the end, by the old document.
        """
        with self._table.change():
            document = self._document("document_id", document_id)
            if by is not None:
                self._refuse_circle(document_id, by)
            self._table.ledger.supersede(document, True, by, document.valid_until)

    def restore(self, document_id: str) -> None:
        """Let searches find a document again that was superseded or has expired; a `valid_until` that is to come stays."""
        with self._table.change():
            document = self._document("document_id", document_id)
            has_ended = has_expired(document, self._visibility.moment)
            self._table.ledger.supersede(document, False, None, None if has_ended else document.valid_until)

    def expire(self, now: float | None = None) -> list[str]:
        """Return the documents whose `valid_until` has come, and hide by the same moment from now on.

        A search hides by itself what has expired when it runs. With `now`, seconds since 1970, searches are done as at that
        moment, whatever the time, until the next call: so runs can be repeated. The moment is not saved with the bank.
        """
        now = None if now is None else checks.validate_date("now", now)
        with self._table.lock:
            self._visibility.stop_at(now)
            self._table.ledger.note_change()
            moment = self._visibility.moment
            return [name for name, each in self._table.ledger.documents.items() if has_expired(each, moment)]

    # What is there.

    def documents(self) -> list[DocumentInfo]:
        """Return a summary of each document, in the order in which they were added."""
        with self._table.lock:
            self._table.drop_expired()
            return [document.info(self.chunk_size) for document in self._table.ledger.documents.values()]

    def info(self, document_id: str) -> DocumentInfo:
        """Return a summary of one document."""
        with self._table.lock:
            return self._document("document_id", document_id).info(self.chunk_size)

    def segments(self, document_id: str) -> list[Segment]:
        """Return copies of a document's segments: which of its tokens were encoded together, and by which encoder."""
        with self._table.lock:
            return list(self._document("document_id", document_id).segments.copy())

    def __contains__(self, document_id: object) -> bool:
        with self._table.lock:
            self._table.drop_expired()
            return document_id in self._table.ledger.documents

    def token_ids(self, document_id: str, start: int | None = None) -> Int[Tensor, " tokens"] | None:
        """Return the ids of resident tokens, or of those from token `start` on; None if none were given."""
        with self._table.lock:
            source, low, high = self._document("document_id", document_id).source_of(start, None, self.chunk_size)
            return None if source is None else source.ids_of(low, high)

    def text(self, document_id: str, start: int | None = None, stop: int | None = None) -> str | None:
        """Return the text of resident tokens, or of those from token `start` to `stop`; None if none was given."""
        with self._table.lock:
            source, low, high = self._document("document_id", document_id).source_of(start, stop, self.chunk_size)
            return None if source is None or not source.has_text else source.characters(low, high)[2]

    def parts(self) -> list[tuple[TextBank, list[str]]]:
        """Return this bank, with the names of its documents that a search can find."""
        with self._table.lock:
            self._table.drop_expired()
            moment, documents = self._visibility.moment, self._table.ledger.documents.items()
            return [(self, [name for name, each in documents if not (each.is_superseded or has_expired(each, moment))])]

    def find(self, text: str, model: FindingModel | None = None, k: int = 10) -> list[FoundPassage]:
        """Return the `k` passages of 32 tokens that have most to do with a text, best first.

        Args:
            text: a question, or any text.
            model: its own heads choose: what they would read for this text, by how much it stands out. None: words choose, by
                BM25, among documents that were memorized as text.
            k: passages at most.

        Raises ValueError for a text without words or tokens, `k` below 1, or the bank of another model.
        """
        return find(self, text, model, k)

    @property
    def by_token(self) -> bool:
        """Return whether chunks are found by their best token, and not by their mean key."""
        return self._table.by_token

    @property
    def index(self) -> str:
        """Return the index that searches, by name."""
        return self._table.index

    @property
    def refresh(self) -> str:
        """Return the refresh policy, by name."""
        return self.freshness.name

    @property
    def age_prior(self) -> AgePrior | None:
        """Return how age counts when the bank is read, None if it does not."""
        return self._visibility.prior

    @property
    def shapes(self) -> list[LayerShape] | None:
        """Return the sizes of the heads of each memory layer, None before the first write has fixed them."""
        return self._table.shapes

    @property
    def num_chunks(self) -> int:
        """Return the number of resident chunks: those that a search can find, and those of hidden documents."""
        return self._table.ledger.num_rows

    @property
    def num_tokens(self) -> int:
        """Return the number of resident tokens."""
        return self._table.ledger.num_tokens

    @property
    def num_evicted_tokens(self) -> int:
        """Return how many tokens were forgotten since the bank was made or opened because it was full."""
        return self._table.ledger.num_evicted

    @property
    def nbytes(self) -> int:
        """Return the bytes of all keys, values and search keys, with the room that growth has reserved."""
        return self._table.nbytes

    @property
    def encoders(self) -> Encoders:
        """Return the encoders that have written to the bank; the last one is current."""
        return self._table.encoders

    @property
    def fingerprint(self) -> str | None:
        """Return the digest of the encoder that the bank is kept for; None: it is not known, and not checked."""
        stamp = self._table.encoders.stamp
        return None if stamp is None else stamp.digest

    @property
    def version(self) -> int:
        """Return a number that changes with every change of what the bank holds."""
        return self._table.ledger.version

    @property
    def generation(self) -> int:
        """Return a number that changes when rows found before may hold something else: another chunk, or other numbers."""
        return self._table.ledger.generation

    @property
    def is_empty(self) -> bool:
        """Return whether a search can find nothing, also because nothing that is there may be read."""
        with self._table.lock:
            if self._table.forgets_by_itself:
                self._table.drop_expired()
            if not self._table.ledger.num_rows:
                return True
            readable = self.freshness.read_by((READING.get() or (None,))[0])[1]
        return readable is not None and not self.freshness.policy.encodes_on_read and not bool(readable.any())

    @property
    def newest_date(self) -> float:
        """Return the date of the newest document that a search can find, from which ages count; -inf if there is none."""
        with self._table.lock:
            return self._visibility.newest()

    # Reading.

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Return what keeps the bank as it is while it is held: what is asked inside a `with` block is of one state.

        Readers and writers wait meanwhile; a thread that holds it may itself read, and write where the bank is in memory.
        """
        return self._table.lock

    def ready_for(self, model: EncodingModel) -> None:
        """Make ready to be read by a model, which calls this before every read; see `Freshness.ready_for`."""
        if not hasattr(model, "encoder"):
            checks.validate_model("model", model)
        self.freshness.ready_for(model)

    def select(self, document_ids: str | Iterable[str] | None = None, *, tags: str | Iterable[str] = ()) -> BankView:
        """Return a view that reads these documents, and those with one of these tags. Raises ValueError for an unknown id."""
        return BankView(self, self._table, self._visibility, document_ids, tags)

    def search(
        self,
        layer: int,
        queries: Float[Tensor, "kv_heads queries dim"],
        num_chunks: int,
        *,
        scaling: float | None = None,
        newest: float | None = None,
        selection: Selection | None = None,
    ) -> Found:
        """Return rows and scores (float32), each `kv_heads queries num_chunks`, best first.

        A score is the inner product of the query with the mean key of a chunk. Where there are fewer than
        `num_chunks`, rows are -1 and scores -inf. Rows are good for `gather` and `locate` while `generation` stays.
        Documents that were superseded or have expired are not found. In a forward pass all searches are of the state that
        the first of them met, and so are rows that are gathered, whatever is written to the bank meanwhile.

        Args:
            layer: a memory layer.
            queries: for each key-value head.
            num_chunks: for each query.
            scaling: what attention multiplies inner products by, for a bank with an age prior: each score then has
                log w(age) / scaling added, and the best by that are found. Exact kinds of index find exactly these; the
                others rank four times as many chunks as are wanted anew. None: age does not count.
            newest: date from which ages count, None for that of the newest document that is read.
            selection: search these documents alone.
        """
        is_usual = scaling is None or (type(scaling) is float and 0 < scaling < math.inf)
        if not is_usual or newest is not None or selection is not None:
            checks.validate_weighing(scaling=scaling, newest=newest, selection=selection)
        with self._table.lock:
            read = take(self.memory_layers, self._table, self._visibility, self.freshness, selection, newest)
            return read.search(layer, queries, num_chunks, scaling)

    def nearest(
        self,
        layer: int,
        queries: Float[Tensor, "kv_heads queries dim"],
        num_chunks: int,
        *,
        selection: Selection | None = None,
    ) -> Found:
        """Return the chunks with the keys, or mean keys, at the smallest distance to each query.

        A score is `query key - key² / 2`. Arguments as for `search`; age does not count. Indexes that know
        inner products alone ("hnsw", and approximate ones on a GPU) rank eight times as many chunks as are wanted anew.
        """
        checks.validate_weighing(selection=selection)
        with self._table.lock:
            read = take(self.memory_layers, self._table, self._visibility, self.freshness, selection, None)
            return read.search(layer, queries, num_chunks, None, by_distance=True)

    def sample(self, num_chunks: int, *, selection: Selection | None = None) -> Found:
        """Return chunks spread evenly over what a search can find, for statistics: one head and query, all scores 0.

        There are `num_chunks` of them or, if the bank holds fewer, all. `selection` as for `search`. Nobody counts these as
        reads.
        """
        checks.validate_count("num_chunks", num_chunks)
        checks.validate_weighing(selection=selection)
        with self._table.lock:
            read = take(self.memory_layers, self._table, self._visibility, self.freshness, selection, None)
            return read.sample(num_chunks)

    def next_ids(self, rows: Int[Tensor, "*shape"], generation: Hashable) -> Int[Tensor, "*shape chunk_size"]:
        """Return the id of the token that follows each token of these rows in its document.

        It is -1 for row -1, behind a document's last token, and where the writer gave no ids. Raises ChangedMemoryError unless
        the bank is of the `generation` that the rows are of.
        """
        with self._table.lock:
            if isinstance(generation, Snapshot):
                return generation.edition.next_ids(rows, generation.num_rows)
            if generation != self._table.ledger.generation:
                raise ChangedMemoryError
            self._refuse_rows(rows)
            return self._table.edition().next_ids(rows, self._table.ledger.num_rows)

    def log_weights(
        self, rows: Int[Tensor, "*shape"], *, newest: float | None = None, selection: Selection | None = None
    ) -> Float[Tensor, "*shape"]:
        """Return log w(age) of these rows, all 0 without an age prior; the caller masks rows of -1."""
        checks.validate_weighing(newest=newest, selection=selection)
        self._refuse_rows(rows)
        with self._table.lock:
            weights = self._visibility.log_weights(self._visibility.newest(selection) if newest is None else newest)
        if weights is None:
            return torch.zeros(rows.shape, device=rows.device)
        return weights[rows.clamp(min=0).cpu()].to(rows.device)

    def search_keys(self, layer: int) -> Float[Tensor, "kv_heads chunks dim"]:
        """Return a copy of what a search of a layer compares, in float32: mean keys of all resident chunks, or all keys.

        In a bank that is searched by token, a shorter chunk is filled up with copies of its last key.
        """
        position = position_of(self.memory_layers, layer)
        if not self.num_chunks:
            raise ValueError("`search_keys` needs a bank that holds chunks, got an empty one; ask `num_chunks` first.")
        with self._table.lock:
            return decode(self._table.storage.layer(position).search_keys).to(torch.float32, copy=True)

    def gather(self, layer: int, rows: Int[Tensor, "kv_heads chunks"], generation: Hashable) -> KeysValues:
        """Return copies of the keys and values of these rows (float32 for int8, else in the storage dtype), where `rows` are.

        The caller masks rows of -1, and tokens beyond `Found.sizes`. Raises ChangedMemoryError unless the bank is of the
        `generation` that the rows are of.
        """
        position = position_of(self.memory_layers, layer)
        with self._table.lock:
            if isinstance(generation, Snapshot):
                return generation.edition.gather(position, rows)
            if generation != self._table.ledger.generation:
                raise ChangedMemoryError
            if not self._table.ledger.num_rows:
                raise ValueError("`gather` needs a bank that holds chunks, got an empty one; ask `num_chunks` first.")
            try:
                return self._table.storage.gather(position, rows)
            except (
                IndexError,
                TypeError,
                AttributeError,
                RuntimeError,
            ):  # looked for afterwards: the check costs a GPU time
                checks.validate_rows("rows", rows)
                self._refuse_rows(rows, kv_heads=self._table.storage.shapes[position].kv_heads)
                raise

    def stored(self, layer: int, generation: Hashable) -> tuple[Tensor, Tensor] | None:
        """Return keys and values of a layer as they are stored, for who reads rows without a copy of them.

        None where they are not on the bank's device, or not of that `generation`: then `gather` has them.
        """
        position, storage = position_of(self.memory_layers, layer), self._table.storage
        with self._table.lock:
            is_now = generation == self._table.ledger.generation
            if isinstance(generation, Snapshot):
                is_now = generation.edition.is_kept is None and generation.edition.table is self._table
            whole = storage.stored(position) if is_now else None
        return None if whole is None or {each.device for each in whole} != {storage.layer(position).device} else whole

    def locate(self, rows: Int[Tensor, "*shape"]) -> list[ChunkPlace | None]:
        """Return document, tokens, characters and text of each row, flattened; None for row -1.

        Characters and text are None where the writer gave no text, or where it was deleted since a reader opened the bank.
        """
        with self._table.lock:
            self._refuse_rows(rows)
            return self._table.ledger.locate(rows.detach().to("cpu", torch.int64).flatten())

    def __repr__(self) -> str:
        limit = "" if self.capacity_tokens is None else f"of {self.capacity_tokens} "
        place = "" if self._on_disk is None else f" in {str(self._on_disk.path)!r}"
        return (
            f"MemoryBank({len(self._table.ledger.documents)} documents, {self.num_tokens} {limit}tokens{place}, "
            f"memory_layers={self.memory_layers}, chunk_size={self.chunk_size}, index={self.index!r})"
        )

    def __getattr__(self, name: str) -> Any:
        part, new = RENAMED.get(name) or (MOVED.get(name), name)
        if part is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        place = f"{part}.{new}" if part else new
        warnings.warn(
            f"`bank.{name}` is `bank.{place}` now; the old name goes with the next release.", DeprecationWarning, 2
        )
        return getattr(getattr(self, part) if part else self, new)

    def _empty(self, device: torch.device | str) -> Self:
        bank = type(self)(**self._settings(), device=device)
        bank._table.encoders = self.encoders.copy()
        return bank

    def _live_in(self, opened: BankFolder) -> None:
        """Take over what an opened folder holds, and keep it there from now on."""
        try:
            self._on_disk = OnDisk(opened, self._table, self._settings, self._take_settings)
            self._table.journal = self._on_disk
        except BaseException:
            opened.close()
            raise

    def _open_for(self, model: EncodingModel | None, refresh: str | Mapping[str, Any] | None, strict: bool) -> None:
        """Follow a policy and, with a model, make ready to be read by it."""
        if refresh is not None:
            self.freshness.use(refresh)
        if model is not None:
            self.freshness.open_for(model, strict=strict)

    def _description(self) -> dict[str, Any]:
        """Return what a new folder says of the bank."""
        return {"settings": self._settings(), "encoders": self.encoders.to_json()}

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
            **({"search": "token"} if self.by_token else {}),
        } | ({} if self.age_prior is None else {"age_prior": self.age_prior.name})

    def _take_settings(self, settings: Mapping[str, Any]) -> None:
        """Follow those settings of the bank's folder that can change."""
        self._table.index = settings["index"]
        self.freshness.adopt(settings["refresh"])
        self._visibility.use(make_age_prior(settings.get("age_prior")))

    def _document(self, argument: str, document_id: str) -> Document:
        self._table.drop_expired()
        checks.validate_known(argument, document_id, self._table.ledger.documents)
        return self._table.ledger.documents[document_id]

    def _refuse_rows(self, rows: Tensor, kv_heads: int | None = None) -> None:
        if kv_heads is not None and (rows.ndim != 2 or len(rows) != kv_heads):
            raise ValueError(
                f"`rows` must have the shape ({kv_heads}, chunks), got {tuple(rows.shape)}; `search` returns them."
            )
        if rows.numel() and (rows.min() < -1 or rows.max() >= self.num_chunks):
            raise ValueError(
                f"`rows` must be from -1 to {self.num_chunks - 1}, got {rows.min()} to {rows.max()}; rows are good "
                "while `generation` stays, so search again."
            )

    def _refuse_circle(self, document_id: str, by: str) -> None:
        documents, chain = self._table.ledger.documents, [by]
        checks.validate_known("by", by, documents)
        while (follower := documents[chain[-1]].superseded_by) in documents and follower not in chain:
            chain.append(follower)
        if document_id in chain:
            raise ValueError(
                f"`by` must be another document, which {document_id!r} has not superseded itself, got {by!r}; "
                f"`restore({by!r})` first."
            )

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
        """Check everything, then write, inside a change: an error leaves the bank as it was."""
        num_tokens = checks.validate_key_values(
            keys,
            values,
            memory_layers=self.memory_layers,
            known_shapes=self._table.shapes,
            storage_dtype=self.storage_dtype,
        )
        part = checks.validate_source(token_ids, text, char_ends, num_tokens, document)
        self._table.extend(document, keys, values, part, joins, self.freshness.version_written())
