"""A shard: the process that has one folder open, and answers for it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longmem.cluster.wire import Request, failure_of, pack, unpack
from longmem.encoder.history import UNKNOWN
from longmem.encoder.sketch import Sketch
from longmem.encoder.stamp import EncoderStamp
from longmem.errors import ChangedMemoryError, StaleMemoryError
from longmem.memory import BankView, MemoryBank
from longmem.memory.folder.foreign import model_in
from longmem.memory.protocols import Found
from longmem.memory.refresh import RefreshReport
from longmem.memory.visibility import reading_as
from longmem.model.attention import GroupRead, attend_found, beside_all_queries, choosers

KEPT_READS = 16  # forward passes whose state is kept; one that is older goes on only if nothing has changed
SECONDS_TO_OPEN = 30  # for whom to let go of a folder: a shard on a node that is being given up
UNKNOWN_ENCODER = "this shard does not know the encoder"  # it was started again; who asks says it once more


class NoEncoderError(RuntimeError):
    """Something is to be encoded again where there is no encoder."""


class DistantWriter:
    """An encoder that is somewhere else: known here by its stamp and, where there is a way to it, asked to encode."""

    is_moving = True  # a sketch would need the weights

    def __init__(self, stamp: EncoderStamp, encode: Callable[[Tensor], Any] | None = None) -> None:
        self._stamp, self._encode = stamp, encode

    @property
    def encoder(self) -> DistantWriter:
        """Return itself: it stands for a model, too."""
        return self

    def stamp(self, *, exact: bool = False) -> EncoderStamp:
        return self._stamp

    def stamp_for_reading(self) -> EncoderStamp:
        return self._stamp

    def sketch(self) -> Sketch:
        """Raise ValueError: a shard has no weights to summarise."""
        raise ValueError(
            'a refresh policy must not use the clock "gap" on a cluster, whose shards have no weights; use "version".'
        )

    def encode(self, input_ids: Tensor) -> Any:
        """Return keys and values from where the encoder is; raise NoEncoderError if nobody has said where that is."""
        if self._encode is None:
            raise NoEncoderError
        return self._encode(input_ids)


class Read(NamedTuple):
    """A forward pass that is under way somewhere: who reads what, and the word for its state."""

    reader: DistantWriter | None
    taken: dict[Any, Any]  # the bank's snapshot, once something was searched
    memory: MemoryBank | BankView | None
    state: str
    found: dict[int, tuple[Request, Found]]  # by layer, of a search whose best chunks somebody is choosing


class Shard:
    """One folder, open for writing, and the answers to what is asked of it.

    All calls come through `ask`, which returns errors as words. Threads may call at once: the bank has locks.

    Args:
        folder: of a bank.
        waits: seconds that an other process may take to close it.
    """

    def __init__(self, folder: str, waits: float = SECONDS_TO_OPEN) -> None:
        deadline = time.monotonic() + waits
        while True:
            try:
                self.bank = MemoryBank.open(folder)
                break
            except ValueError as error:
                if "somebody is writing" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        self._folder = Path(folder)
        self._writers: dict[str, DistantWriter] = {}
        self._reads: OrderedDict[str, Read] = OrderedDict()
        self._known_state: tuple[int, str] | None = None

    def ask(self, method: str, *given: Any, **options: Any) -> Any:
        """Return what a method makes of the arguments, or its error."""
        try:
            return pack(getattr(self, method)(*unpack(given), **unpack(options)))
        except Exception as error:
            return failure_of(error)

    # What is there.

    def describe(self) -> dict[str, Any]:
        """Return settings that never change, and the encoder."""
        bank, stamp = self.bank, self.bank.encoders.stamp
        return {
            "settings": bank._settings(),
            "stamp": None if stamp is None else stamp.to_json(),
            "folder": str(self._folder.resolve()),
            "model": model_in(self._folder),
            "age_prior": bank.age_prior is not None,
        }

    def status(self, stamp: dict[str, Any] | None = None, selection: Any = None) -> dict[str, Any]:
        """Return sizes and state; with a stamp, after the bank was made ready to be read by that encoder."""
        if stamp is not None:
            self._ready_for(EncoderStamp.from_json(stamp))
        memory = self._chosen(selection)
        mask = self.bank.freshness.mask()
        reader = None if stamp is None else self._writers[EncoderStamp.from_json(stamp).digest]
        with reading_as(reader or DistantWriter(EncoderStamp("")), {}):  # type: ignore[arg-type]
            is_empty = memory is None or memory.is_empty
        return {
            "state": self._state(),
            "num_chunks": 0 if memory is None else memory.num_chunks,
            "num_tokens": 0 if memory is None else memory.num_tokens,
            "num_evicted_tokens": self.bank.num_evicted_tokens,
            "is_empty": is_empty,
            "newest_date": -torch.inf if memory is None else memory.newest_date,
            "masked_chunks": 0 if mask is None else int((~mask).sum()),
        }

    def _ready_for(self, stamp: EncoderStamp) -> None:
        writer = self._writers.setdefault(stamp.digest, DistantWriter(stamp))
        with contextlib.suppress(NoEncoderError):  # what is stale is not read, until `ClusterBank.reencode`
            self.bank.ready_for(writer)  # type: ignore[arg-type]

    def _state(self) -> str:
        """Return a word for rows and what they hold, the same after this folder was opened anew."""
        with self.bank.lock:
            ledger = self.bank._table.ledger
            if self._known_state is None or self._known_state[0] != ledger.version:
                digest = hashlib.blake2b(ledger._table[:, : ledger.num_rows].numpy().tobytes(), digest_size=12)
                digest.update(repr(sorted((each.serial, name) for name, each in ledger.documents.items())).encode())
                self._known_state = ledger.version, digest.hexdigest()
            return self._known_state[1]

    def _chosen(self, selection: tuple[Sequence[str], Sequence[str]] | None) -> MemoryBank | BankView | None:
        """Return what is read: all, or those of the named documents and tags that are here; None if none is."""
        if selection is None:
            return self.bank
        documents = self.bank.documents()
        names = [each.document_id for each in documents if each.document_id in selection[0]]
        tags = sorted({tag for each in documents for tag in each.tags} & set(selection[1]))
        return self.bank.select(names or None, tags=tags) if names or tags else None

    def names(self, selection: Any = None) -> list[str]:
        """Return the documents that a search can find."""
        memory = self._chosen(selection)
        return [] if memory is None else [name for _, names in memory.parts() for name in names]

    def look(self, method: str, *given: Any) -> Any:
        """Return what the bank says of its documents."""
        assert method in ("documents", "info", "text", "token_ids", "segments", "__contains__")
        answer = getattr(self.bank, method)(*given)
        if method == "segments":  # versions are a matter of each shard: 0 is the encoder that all agree on
            lags = [*self.bank.encoders.lags(), 1]
            return [dataclasses.replace(each, version=UNKNOWN if lags[each.version] else 0) for each in answer]
        return answer

    # Reading.

    def search(self, request: Request) -> dict[str, Any]:
        """Return rows and scores of the best chunks, and the word for the state that was searched."""
        known, found = self._search(request)
        return _told(known, found)

    def attend(self, request: Request) -> dict[str, Any]:
        """Return, of each query's best chunks, also log-sum-exp and output, as if it attended to that chunk alone."""
        known, found = self._search(request)
        if found is None or request.queries is None:
            return _told(known, found)
        chunks, (_, _, ages, _, sizes) = found.rows.shape[2], found
        pairs = [None if each is None else each.flatten(1).unsqueeze(-1) for each in (ages, sizes)]
        alone = found._replace(rows=found.rows.flatten(1).unsqueeze(-1), log_weights=pairs[0], sizes=pairs[1])
        read = _attended(request, request.queries.repeat_interleave(chunks, dim=1), alone, known)
        parts = {"output": read.output.to(request.wire), "logsumexp": read.logsumexp}
        return _told(known, found) | {name: each.unflatten(1, (-1, chunks)) for name, each in parts.items()}

    def rank(self, request: Request) -> dict[str, Any]:
        """Return the scores of the best chunks, which are kept for `attend_best`."""
        known, found = self._search(request)
        if found is None:
            return _told(known, None)
        known.found[request.layer] = request, found
        return {"state": known.state, "scores": found.scores}

    def attend_best(self, request: Request, wanted: Tensor) -> dict[str, Any]:
        """Return attention over so many of the best chunks that `rank` has found, for queries that want any, one after another.

        Raises ChangedMemoryError if they are forgotten, as by a shard that was started again.
        """
        with self.bank.lock:
            known = self._reads.get(request.read)
            if known is None or request.layer not in known.found:
                raise ChangedMemoryError
            ranked, found = known.found.pop(request.layer)
        queries = wanted.any(0).nonzero().flatten()
        width, wanted = int(wanted.max()), wanted[:, queries].to(found.rows.device)
        is_wanted = torch.arange(width, device=wanted.device) < wanted.unsqueeze(-1)
        rows = found.rows[:, queries, :width].masked_fill(~is_wanted, -1)
        extra = [None if each is None else each[:, queries, :width] for each in (found.log_weights, found.sizes)]
        chosen = found._replace(rows=rows, log_weights=extra[0], sizes=extra[1])
        assert ranked.queries is not None
        read = _attended(request, ranked.queries[:, queries], chosen, known)
        told = _told(known, chosen) | {"logsumexp": read.logsumexp.unsqueeze(-1) + read.chunk_weights.log()}
        flat = {name: each[is_wanted] for name, each in told.items() if name not in ("state", "scores")}
        return {"state": known.state, **flat, "output": read.output[wanted > 0].to(request.wire)}

    def sample(self, request: Request) -> dict[str, Any]:
        """Return chunks spread evenly over what may be read, and the word for the state that they are of."""
        known, found = self._find(request, lambda memory: memory.sample(request.num_chunks))
        return _told(known, found)

    def _search(self, request: Request) -> tuple[Read, Found | None]:
        """Return what a search finds in the state that the earlier requests of this read have met; None if nothing is there."""
        queries = request.queries
        assert queries is not None

        def find(memory: MemoryBank | BankView) -> Found:
            given = request.layer, choosers(queries, request.shared).float(), request.num_chunks
            if request.by_distance:
                return memory.nearest(*given)
            return memory.search(*given, scaling=request.scaling, newest=request.newest)

        known, found = self._find(request, find)
        return known, None if found is None else beside_all_queries(found, queries)

    def _find(self, request: Request, find: Callable[[MemoryBank | BankView], Found]) -> tuple[Read, Found | None]:
        """Return what is found in the state that the earlier requests of this read have met; None if nothing is there."""
        if request.encoder is not None and request.encoder not in self._writers:
            raise StaleMemoryError(UNKNOWN_ENCODER)
        with self.bank.lock:
            if request.read not in self._reads:
                reader = None if request.encoder is None else self._writers[request.encoder]
                self._reads[request.read] = Read(reader, {}, self._chosen(request.selection), self._state(), {})
                while len(self._reads) > KEPT_READS:
                    self._reads.popitem(last=False)
            known = self._reads[request.read]
            # As if a backward pass were to come: then no policy encodes again while it searches.
            # Or, with None, as the current encoder: not as the one that this thread has last read or written as.
            reader = known.reader or DistantWriter(EncoderStamp(""))
            with reading_as(reader, known.taken), torch.enable_grad():  # type: ignore[arg-type]
                if known.memory is None or known.memory.is_empty:
                    return known, None
                found = find(known.memory)
        return known, None if found.generation is None else found

    def gather(self, read: str, state: str, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of rows that a read has found or, if it is forgotten here, that are of the present state."""
        with self.bank.lock:
            return self.bank.gather(layer, rows, self._generation(read, state))

    def next_ids(self, read: str, state: str, rows: Tensor) -> Tensor:
        """Return which token follows each token of rows; of the state that `gather` reads."""
        with self.bank.lock:
            return self.bank.next_ids(rows, self._generation(read, state))

    def _generation(self, read: str, state: str) -> Hashable:
        """Return what the rows are of that a read has found."""
        known = self._reads.get(read)
        if known is None and state != self._state():
            raise ChangedMemoryError
        snapshot = None if known is None else next(iter(known.taken.values()), None)
        return self.bank.generation if snapshot is None else snapshot

    def locate(self, rows: Tensor) -> list[Any]:
        """Return the place of each row."""
        return self.bank.locate(rows)

    # Writing.

    def commit(
        self, changes: Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]], before: dict[str, int | None], stamp: Any
    ) -> None:
        """Make changes in one transaction, if documents have the number of tokens that whoever asks has seen.

        Raises ChangedMemoryError if they have another one: somebody else has written, or this very commit was made before.
        """
        with self.bank.transaction(), self._as_written_by(stamp) as writer:
            for name, count in before.items():
                if (self.bank.info(name).num_tokens if name in self.bank else None) != count:
                    raise ChangedMemoryError
            for method, given, options in changes:
                assert method in CHANGES
                if method == "replace":
                    self._replace(writer, *given[:2])
                else:
                    getattr(self.bank, method)(*given, **options)

    def _replace(self, writer: DistantWriter | None, document_id: str, parts: Sequence[Any]) -> None:
        """Put a new version of a document in the place of the old one: segments that are encoded, or copied from it."""
        draft = self.bank.empty_like()
        if writer is not None:
            draft.freshness.write_as(writer)
        for method, given, options in parts:
            given = (given[0], self.bank, *given[1:]) if method == "copy_tokens" else given
            getattr(draft, method)(*given, **options)
        self.bank._take_version(document_id, draft)

    @contextlib.contextmanager
    def _as_written_by(self, stamp: dict[str, Any] | None) -> Iterator[DistantWriter | None]:
        """Note an encoder as the one that has encoded what is written; refuse one that the policy would not read."""
        if stamp is None:
            yield None
            return
        known, freshness = EncoderStamp.from_json(stamp), self.bank.freshness
        if self.bank.encoders.stamp is None:
            self._ready_for(known)
        writer = self._writers.setdefault(known.digest, DistantWriter(known))
        version = freshness.write_as(writer)
        if not bool(freshness.policy.readable(freshness.lags())[version]):
            raise StaleMemoryError(
                f"what is written must be of an encoder that the policy {freshness.name!r} reads, got one that is "
                f"{self.bank.encoders.lags()[version]} changes behind; encode it again with newer weights."
            )
        yield writer

    def close(self) -> None:
        """Save indexes, and let others write."""
        self.bank.close()

    def compact(self) -> None:
        """Give back the space of what was deleted."""
        self.bank.folder.compact()

    def reencode(self, stamp: dict[str, Any], workers: Sequence[Any], budget_tokens: int | None) -> RefreshReport:
        """Encode again what is stale, by workers that are asked over the network; each takes the next when it is free."""
        import ray

        def by(worker: Any) -> Callable[[Tensor], Any]:
            return lambda ids: unpack(ray.get(worker.encode.remote(stamp, pack(ids))))

        known = EncoderStamp.from_json(stamp)
        first, *others = [DistantWriter(known, by(worker)) for worker in workers]
        return self.bank.freshness.reencode(first, workers=others, budget_tokens=budget_tokens)  # type: ignore[arg-type]


def _told(known: Read, found: Found | None) -> dict[str, Any]:
    """Return what is said of a search: the word for the state, and what was found, if anything is there."""
    if found is None:
        return {"state": known.state}
    told = {"rows": found.rows, "scores": found.scores, "log_weights": found.log_weights}
    if found.sizes is not None:
        told["sizes"] = found.sizes.to(torch.int16 if int(found.sizes.max()) < 2**15 else torch.int32)
    return {"state": known.state} | {name: each for name, each in told.items() if each is not None}


@torch.no_grad()
def _attended(request: Request, queries: Tensor, found: Found, known: Read) -> GroupRead:
    """Return the queries' attention over what was found for each of them."""
    assert known.memory is not None
    queries = queries.to(request.dtype)
    return attend_found(queries, found, known.memory, request.layer, request.scaling or 1.0, request.softcap)


LABELS = frozenset(("tag", "pin", "supersede", "restore"))
CHANGES = LABELS | {"add", "append", "replace", "delete"}
