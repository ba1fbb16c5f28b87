"""The memory bank: documents in, chunks out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.memory import checks
from longmem.memory.contents import BankContents
from longmem.memory.index import Found, validate_index
from longmem.memory.ledger import Document, DocumentInfo, IntQueue, Ledger
from longmem.memory.persistence import read_bank, write_bank
from longmem.memory.view import BankView

# Another policy will name other rows in `Ledger.evict`.
EVICTION_POLICIES = ("fifo",)


class MemoryBank:
    """Return an empty bank of named documents: attention keys and values of the `memory_layers` of one backbone.

    Args:
        memory_layers: backbone layers whose keys and values are stored, in the order in which `add` gets them.
        chunk_size: tokens in a chunk, the unit of search.
        capacity_tokens: tokens that can be resident, a multiple of `chunk_size`; the default is the paper's.
        index: "auto" (exact search by FAISS up to 8,192 chunks, clusters beyond), "flat" (exact at any size), "exact"
            (the same by torch), or "ivf", "hnsw" and "pq", whose settings follow a colon: "ivf:probed_share=0.06"
            (`longmem/memory/index/kinds.py`).
        eviction: "fifo": when the bank is full, the chunks written first go first, whichever document owns them.
        storage_dtype: of stored keys and values, "float16", "bfloat16" or "float32"; search keys are float32.
        device: where the tensors are.
        fingerprint: of the encoder that writes (`LongMemForCausalLM.encoder_fingerprint`); None is not checked.

    >>> bank = MemoryBank(memory_layers=[5], chunk_size=4)
    >>> keys = torch.eye(10).unsqueeze(0)  # one head, ten tokens, each with a direction of its own
    >>> bank.add("emma", [keys], [keys])
    >>> bank.documents()
    [DocumentInfo(document_id='emma', num_tokens=10, num_chunks=2, num_waiting_tokens=2, first_resident_token=0)]
    >>> scores, rows = bank.search(5, keys[:, 6:7], num_chunks=3)  # three are asked for, two are there
    >>> scores, bank.locate(rows)
    (tensor([[[0.2500, 0.0000,   -inf]]]), [('emma', 4, 8), ('emma', 0, 4), None])
    """

    def __init__(
        self,
        *,
        memory_layers: Sequence[int],
        chunk_size: int,
        capacity_tokens: int = 65_536,
        index: str = "auto",
        eviction: str = "fifo",
        storage_dtype: torch.dtype | str = "float16",
        device: torch.device | str = "cpu",
        fingerprint: str | None = None,
    ) -> None:
        checks.validate_sizes(memory_layers, chunk_size, capacity_tokens)
        validate_index(index)
        checks.validate_choice("eviction", eviction, EVICTION_POLICIES)
        self.memory_layers = tuple(memory_layers)
        self.chunk_size = chunk_size
        self.capacity_tokens = capacity_tokens
        self.index = index
        self.eviction = eviction
        self.storage_dtype = checks.validate_storage_dtype(storage_dtype)
        self.device = torch.device(device)
        self.fingerprint = fingerprint
        self.clear()

    @classmethod
    def for_model(cls, model: Any, **options: Any) -> MemoryBank:
        """Return an empty bank for what `model` writes; `options` are the other arguments of `MemoryBank`."""
        return cls(
            memory_layers=model.config.memory_layers or (),
            chunk_size=model.config.chunk_size,
            fingerprint=model.encoder_fingerprint(),
            **options,
        )

    def empty_like(self) -> MemoryBank:
        """Return an empty bank with the same settings."""
        return type(self)(**self._settings(), device=self.device)

    # Writing.

    def add(
        self,
        document_id: str,
        keys: Sequence[Float[Tensor, "_kv_heads _tokens _dim"]],
        values: Sequence[Float[Tensor, "_kv_heads _tokens _dim"]],
        token_ids: Iterable[int] | Int[Tensor, " tokens"] | None = None,
    ) -> None:
        """Write a new document: one tensor of keys and one of values for each memory layer, and the ids of its tokens.

        The tail shorter than a chunk waits for `append`, and is found once its chunk is full. Raises ValueError, and
        writes nothing, for a known id, shapes that disagree, or numbers that are not finite or too large to store.
        """
        checks.validate_new("document_id", document_id, self._ledger.documents)
        self._extend(Document(document_id), keys, values, token_ids)

    def append(
        self,
        document_id: str,
        keys: Sequence[Float[Tensor, "_kv_heads _tokens _dim"]],
        values: Sequence[Float[Tensor, "_kv_heads _tokens _dim"]],
        token_ids: Iterable[int] | Int[Tensor, " tokens"] | None = None,
    ) -> None:
        """Continue a document, as if these tokens had been written with those before; arguments as for `add`."""
        checks.validate_known("document_id", document_id, self._ledger.documents)
        self._extend(self._ledger.documents[document_id], keys, values, token_ids)

    def update(self, document_id: str, text_or_ids: str | Iterable[int] | Tensor, *, model: Any) -> None:
        """Replace a document by the encoding of a new text, which counts as written now.

        The text is encoded into a bank of its own, so neither a failure nor an eviction on the way touches this one;
        the price is memory for both versions. Raises ValueError for an unknown id or another encoder.
        """
        checks.validate_known("document_id", document_id, self._ledger.documents)
        if self.fingerprint is not None and (fingerprint := model.encoder_fingerprint()) != self.fingerprint:
            raise ValueError(
                f"`model` must be the encoder of the bank, {self.fingerprint}, got {fingerprint}; memorize all "
                "documents again, in `MemoryBank.for_model(model)`."
            )
        draft = self.empty_like()
        model.memorize(draft, text_or_ids, document_id=document_id)
        if draft._contents.shapes != self._contents.shapes:
            raise ValueError(
                f"`model` must write the sizes that the bank holds, {self._contents.shapes}, got "
                f"{draft._contents.shapes}; memorize all documents again, in `MemoryBank.for_model(model)`."
            )
        written = draft._ledger.documents[document_id]
        chunks = [store.select(written.rows.values) for store in draft._contents.stores]
        new = dataclasses.replace(written, serial=-1, rows=IntQueue())
        self._contents.replace(self._ledger.documents[document_id], new, chunks)

    def delete(self, document_id: str) -> None:
        """Forget a document; its chunks are never found again. Raises ValueError if there is none."""
        checks.validate_known("document_id", document_id, self._ledger.documents)
        self._contents.drop(self._ledger.documents[document_id])

    def rename(self, old: str, new: str) -> None:
        """Give a document another id. Raises ValueError if there is no `old`, or already a `new`."""
        checks.validate_known("old", old, self._ledger.documents)
        checks.validate_new("new", new, self._ledger.documents)
        self._ledger.rename(old, new)

    def clear(self) -> None:
        """Forget all documents, and the sizes of heads that the first of them has fixed; free the memory."""
        self._contents = BankContents(
            chunk_size=self.chunk_size,
            capacity=self.capacity_tokens // self.chunk_size,
            index=self.index,
            storage_dtype=self.storage_dtype,
            device=self.device,
        )

    # What is there.

    def documents(self) -> list[DocumentInfo]:
        """Return a summary of each document, in the order in which they were added."""
        return [document.info(self.chunk_size) for document in self._ledger.documents.values()]

    def __contains__(self, document_id: object) -> bool:
        return document_id in self._ledger.documents

    def __repr__(self) -> str:
        return (
            f"MemoryBank({len(self._ledger.documents)} documents, {self.num_tokens} of {self.capacity_tokens} tokens, "
            f"memory_layers={self.memory_layers}, chunk_size={self.chunk_size}, index={self.index!r})"
        )

    def token_ids(self, document_id: str) -> Int[Tensor, " tokens"] | None:
        """Return the ids of resident and waiting tokens, from `first_resident_token` on; None if none were given."""
        checks.validate_known("document_id", document_id, self._ledger.documents)
        ids = self._ledger.documents[document_id].token_ids
        return None if ids is None else ids.values.clone()

    @property
    def num_chunks(self) -> int:
        """Return the number of resident chunks: those that a search can find."""
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
    def version(self) -> int:
        """Return a number that changes with every change of what the bank holds."""
        return self._ledger.version

    @property
    def is_empty(self) -> bool:
        """Return whether a search can find nothing."""
        return not self.num_chunks

    @property
    def nbytes(self) -> int:
        """Return the bytes of all keys, values and search keys, with the room that growth has reserved."""
        return self._contents.nbytes

    # Reading.

    def select(self, document_ids: str | Iterable[str]) -> BankView:
        """Return a view that reads these documents only. Raises ValueError for an unknown id."""
        return BankView(self, document_ids)

    def search(self, layer: int, queries: Float[Tensor, "kv_heads queries dim"], num_chunks: int) -> Found:
        """Return scores (float32) and rows (int64), each (kv_heads, queries, num_chunks), best first.

        A score is the inner product of the query with the mean key of a chunk. Where there are fewer than
        `num_chunks`, rows are -1 and scores -inf. Rows are good for `gather` and `locate` while `generation` stays.
        """
        return self._search(layer, queries, num_chunks, None)

    def gather(
        self, layer: int, rows: Int[Tensor, "kv_heads chunks"]
    ) -> tuple[
        Float[Tensor, "kv_heads chunks chunk_size key_dim"],
        Float[Tensor, "kv_heads chunks chunk_size value_dim"],
    ]:
        """Return copies of the keys and values of these rows, in the storage dtype; the caller masks rows of -1."""
        position = self._position(layer)
        if self.is_empty:
            raise ValueError("`gather` needs a bank that holds chunks, got an empty one; ask `is_empty` first.")
        return self._contents.stores[position].gather(rows)

    def locate(self, rows: Int[Tensor, ...]) -> list[tuple[str, int, int] | None]:
        """Return (document id, first token, token after the last) for each row, flattened; None for row -1."""
        rows = rows.detach().to("cpu", torch.int64).flatten()
        if len(rows) and (rows.min() < -1 or rows.max() >= self.num_chunks):
            raise ValueError(
                f"`rows` must be from -1 to {self.num_chunks - 1}, got {rows.min()} to {rows.max()}; rows are good "
                "while `generation` stays, so search again."
            )
        return self._ledger.locate(rows)

    # Saving.

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the bank to `folder`; a process killed meanwhile leaves the bank before, or this one.

        Raises ValueError if the folder cannot be written.
        """
        layers = [store.live for store in self._contents.stores]
        write_bank(folder, self._settings(), list(self._ledger.documents.values()), self._ledger.runs(), layers)

    @classmethod
    def load(cls, folder: str | PathLike[str], model: Any = None, *, device: torch.device | str = "cpu") -> MemoryBank:
        """Return the bank saved in `folder`, memory-mapped on the CPU, or copied to another device.

        Raises ValueError if it is missing, damaged, of a newer version or, where `model` is given, of another encoder.
        """
        saved = read_bank(folder, torch.device(device), None if model is None else model.encoder_fingerprint())
        bank = cls(**saved.settings, device=device)
        bank._contents.restore(saved.documents, saved.runs, saved.layers)
        return bank

    # Inside.

    @property
    def _ledger(self) -> Ledger:
        return self._contents.ledger

    def _settings(self) -> dict[str, Any]:
        return {
            "memory_layers": self.memory_layers,
            "chunk_size": self.chunk_size,
            "capacity_tokens": self.capacity_tokens,
            "index": self.index,
            "eviction": self.eviction,
            "storage_dtype": str(self.storage_dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint,
        }

    def _position(self, layer: int) -> int:
        if layer not in self.memory_layers:
            raise ValueError(f"`layer` must be one of the memory layers {self.memory_layers}, got {layer!r}.")
        return self.memory_layers.index(layer)

    def _search(self, layer: int, queries: Tensor, num_chunks: int, rows: Tensor | None) -> Found:
        position = self._position(layer)
        shapes = self._contents.shapes
        checks.validate_search(queries, num_chunks, None if shapes is None else shapes[position])
        return self._contents.search(position, queries, num_chunks, rows)

    @torch.inference_mode(False)  # whatever the caller's mode: what is made inside it can never be written to again
    def _extend(
        self,
        document: Document,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        token_ids: Iterable[int] | Tensor | None,
    ) -> None:
        """Check everything, then write: an error leaves the bank as it was."""
        num_tokens = checks.validate_key_values(
            keys,
            values,
            memory_layers=self.memory_layers,
            known_shapes=self._contents.shapes,
            storage_dtype=self.storage_dtype,
        )
        with_ids = None if document.serial < 0 else document.token_ids is not None
        self._contents.extend(document, keys, values, checks.validate_token_ids(token_ids, num_tokens, with_ids))
