"""A bank on several machines: a memory like any other, whose keys and values stay where they are."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import secrets
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.cluster import engine, merge
from longmem.cluster.engine import RayShards, Shards, refuse_missing
from longmem.cluster.shard import LABELS, UNKNOWN_ENCODER
from longmem.cluster.wire import Request
from longmem.encoder.history import Encoders
from longmem.encoder.stamp import EncoderStamp
from longmem.errors import ChangedMemoryError, StaleMemoryError
from longmem.files import make_folder, read_json, remove, write_file
from longmem.memory import MemoryBank, SourcePart, checks, has_bank
from longmem.memory.finding import FindingModel, FoundPassage, TextBank, find
from longmem.memory.memorize import memorize, to_token_ids
from longmem.memory.protocols import Attended, EncodingModel, Found
from longmem.memory.refresh import RefreshReport
from longmem.memory.rows.documents import DocumentInfo
from longmem.memory.rows.ledger import ChunkPlace
from longmem.memory.rows.segments import Segment
from longmem.memory.visibility import READING
from longmem.model.attention import nothing_found

ON_MISSING = ("error", "skip")
SHARDS = "shards.json"  # beside the shards: how many there are
BYTES_OF_A_TRIP = 2**20  # that a network of 10 Gbit/s carries in about the time of a call


@dataclasses.dataclass(eq=False)
class Pass:
    """One forward pass that reads the bank, or one search outside of any: its name, and the state of each shard it reads."""

    read: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    states: dict[int, str] = dataclasses.field(default_factory=dict)
    missing: set[int] = dataclasses.field(default_factory=set)
    newest: float | None = None
    some: int = 0  # a shard that holds chunks, for places where nothing was found


Changes = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


class Own(threading.local):
    """What is a thread's own: the encoder as which it reads and writes, what shards told it last, its open transaction."""

    stamp: EncoderStamp | None = None
    status: Sequence[dict[str, Any]] = ()
    changes: Changes | None = None
    shard: int | None = None  # of these changes


class ClusterBank:
    """A bank whose shards run on the machines of a Ray cluster, each with a folder of its own.

    It is read like a `MemoryBank`, and gives what `BankShards` over the same folders gives. Queries, and what attention makes
    of them, cross the network; keys and values do when something is written, and in a backward pass. A document is in the
    shard that a hash of its name chooses. A transaction is of one shard.

    A shard that died is started again from its folder, on another node if need be, and asked again. So every node that may run
    it must see that folder under the same path.

    Args:
        shards: who answers for them; `connect` finds those that run.
        timeout: seconds within which all shards must have answered.
        on_missing: what happens if one has not: "error", or "skip", which reads the others and warns; `missing` names them.
        wire_dtype: in which queries and outputs are sent, such as "float16"; None: that of the queries.
        trips: calls to a shard for each reading layer, 1 or 2 (docs/scaling.md, section 3, C or E); None: which sends less.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        timeout: float = 60.0,
        on_missing: str = "error",
        wire_dtype: str | None = None,
        trips: int | None = None,
    ) -> None:
        checks.validate_choice("on_missing", on_missing, ON_MISSING)
        if wire_dtype is not None:
            checks.validate_choice("wire_dtype", wire_dtype, ("float16", "bfloat16", "float32"))
        if not 0 < timeout < torch.inf:
            raise ValueError(f"`timeout` must be seconds above 0, got {timeout!r}.")
        if trips not in (None, 1, 2):
            raise ValueError(f"`trips` must be 1, 2 or None, which takes the one that sends less, got {trips!r}.")
        self.shards, self.timeout, self.on_missing, self.wire_dtype = shards, timeout, on_missing, wire_dtype
        self.trips = trips
        self.missing: tuple[int, ...] = ()
        self._selection: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self._latest: EncoderStamp | None = None  # as which a thread reads and writes that has not said
        self._own = Own()
        self._is_draft = False
        told = self._told = [each for each in self._ask_all("describe", may_skip=True) if each is not None]
        settings = told[0]["settings"]
        for name in ("memory_layers", "chunk_size", "search", "storage_dtype"):
            values = [each["settings"].get(name) for each in told]
            if any(value != values[0] for value in values):
                raise ValueError(f"shards must agree in `{name}`, got {values}; make them by `ClusterBank.create`.")
        self.memory_layers, self.chunk_size = tuple(settings["memory_layers"]), settings["chunk_size"]
        self.by_token = settings.get("search") == "token"
        self.storage_dtype = checks.validate_storage_dtype(settings["storage_dtype"])
        self.capacity_tokens, self.refresh = settings["capacity_tokens"], settings["refresh"]
        self.has_age_prior = any(each["age_prior"] for each in told)

    # Making and finding.

    @classmethod
    def connect(cls, name: str, **options: Any) -> Self:
        """Return the bank of this name that runs on the cluster; `options`: arguments of the class.

        Raises ValueError if none does, or there is no cluster.
        """
        return cls(RayShards(engine.name_of(name), options.get("on_missing") == "skip"), **options)

    @classmethod
    def create(cls, root: str | Path, num_shards: int, model: EncodingModel, **options: Any) -> list[str]:
        """Return the folders of new, empty shards in a folder; `options`: as for `MemoryBank.for_model`."""
        checks.validate_count("num_shards", num_shards)
        folders = [Path(root) / f"shard-{number}" for number in range(num_shards)]
        if taken := [each.name for each in Path(root).glob("shard-*")]:
            raise ValueError(
                f"`root` must hold no shards before they are made, got {str(root)!r} with {sorted(taken)}; "
                "`ClusterBank.start`, or `longmem cluster start` without `--shards`, starts those."
            )
        try:
            write_file(make_folder(root) / SHARDS, json.dumps({"num_shards": num_shards}))
            for folder in folders:
                MemoryBank.for_model(model, folder=folder, **options).close()
        except BaseException:
            for path in (*folders, Path(root) / SHARDS):
                remove(path)
            raise
        return [str(folder) for folder in folders]

    @classmethod
    def start(
        cls, name: str, root: str | Path, *, actor_options: Mapping[str, Any] | None = None, **options: Any
    ) -> Self:
        """Start the shards that are in a folder, under a name, and connect to them.

        `actor_options`: of Ray's actors, such as `{"num_cpus": 2}`. Raises ValueError if there are none, or a folder can't be
        opened, as when the bank is running already.
        """
        plain, folders = engine.name_of(name), shard_folders(root)
        engine.start(plain, [str(each.resolve()) for each in folders], actor_options or {})
        return cls.connect(name, **options)

    def __reduce__(self) -> Any:
        own = {name: getattr(self, name) for name in ("timeout", "on_missing", "wire_dtype", "trips")}
        return functools.partial(type(self), **own), (self.shards,), {"_selection": self._selection}

    def __copy__(self) -> Self:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__ | {"_own": Own(), "_latest": self._stamp})
        return twin

    @property
    def _stamp(self) -> EncoderStamp | None:
        return self._latest if self._own.stamp is None else self._own.stamp

    @_stamp.setter
    def _stamp(self, stamp: EncoderStamp) -> None:
        self._own.stamp = self._latest = stamp

    def __repr__(self) -> str:
        return (
            f"ClusterBank({len(self.shards)} shards, memory_layers={self.memory_layers}, chunk_size={self.chunk_size})"
        )

    def select(self, document_ids: str | Iterable[str] | None = None, *, tags: str | Iterable[str] = ()) -> ClusterBank:
        """Return these documents, and those with one of these tags, by themselves. Raises ValueError for an unknown one."""
        names = checks.validate_names("document_ids", document_ids)
        chosen = checks.validate_tags((tags,) if isinstance(tags, str) else tags)
        if not names and not chosen:
            raise ValueError(
                "`document_ids` or `tags` must name at least one document or tag, got none; read the bank itself for all."
            )
        documents = self.documents()
        for name in names:
            checks.validate_known("document_ids", name, [each.document_id for each in documents])
        for tag in chosen:
            checks.validate_choice("tags", tag, sorted({known for each in documents for known in each.tags}))
        view = copy.copy(self)
        view._selection = names, chosen
        return view

    def close(self) -> None:
        """Do nothing: the shards go on, for others; `longmem cluster stop` ends them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Asking.

    def _ask_all(self, method: str, *given: Any, may_skip: bool = False) -> list[Any]:
        """Return what all shards answer, in order; None for those left out. Raises MissingShardError."""
        everyone = range(len(self.shards))
        answers = self.shards.ask(dict.fromkeys(everyone, (method, *given)), timeout=self.timeout)
        if may_skip and self.on_missing == "skip" and answers:
            self._leave_out(set(everyone) - answers.keys())
        else:
            refuse_missing(everyone, answers, self.timeout)
        return [answers.get(number) for number in everyone]

    def _ask(self, number: int, method: str, *given: Any, repeats: bool = True) -> Any:
        answers = self.shards.ask({number: (method, *given)}, timeout=self.timeout, repeats=repeats)
        refuse_missing([number], answers, self.timeout)
        return answers[number]

    def _leave_out(self, missing: set[int]) -> None:
        self.missing = tuple(sorted(missing))
        if missing:
            warnings.warn(
                f"shards {sorted(missing)} of {len(self.shards)} did not answer within {self.timeout:g} s: what they hold is "
                "left out of what is read.",
                stacklevel=4,
            )

    def shard_of(self, document_id: str) -> int:
        """Return the shard that a document belongs to, by a hash of its name that is the same everywhere."""
        digest = hashlib.blake2b(document_id.encode(errors="surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") % len(self.shards)

    def _statuses(self) -> list[dict[str, Any]]:
        """Return what the shards last said in this forward pass or, outside of one, say now."""
        if READING.get() is None or not self._own.status:
            self._own.status = [each for each in self._ask_all("status", None, self._selection, may_skip=True) if each]
        return list(self._own.status)

    @property
    def num_chunks(self) -> int:
        return sum(each["num_chunks"] for each in self._statuses())

    @property
    def num_tokens(self) -> int:
        return sum(each["num_tokens"] for each in self._statuses())

    @property
    def num_evicted_tokens(self) -> int:
        return sum(each["num_evicted_tokens"] for each in self._statuses())

    @property
    def is_empty(self) -> bool:
        """Return whether a search can find nothing."""
        return all(each["is_empty"] for each in self._statuses())

    @property
    def newest_date(self) -> float:
        """Return the date of the newest document that a search can find; -inf if there is none."""
        return max(each["newest_date"] for each in self._statuses())

    @property
    def generation(self) -> Hashable:
        """Return a word for the state of all shards; it stays when one is started again."""
        return tuple(each["state"] for each in self._statuses())

    version = generation

    @property
    def encoders(self) -> Encoders:
        """Return the encoder of the shards, as the only one of a history: they may differ in what was before."""
        stamp = self._told[0]["stamp"] if self._stamp is None else self._stamp.to_json()
        return Encoders([] if stamp is None else [EncoderStamp.from_json(stamp)])

    @property
    def model_name(self) -> str | None:
        """Return the name of the model that `longmem cluster start` made the bank for; None where that is not known."""
        return self._told[0]["model"]

    @property
    def fingerprint(self) -> str | None:
        stamp = self.encoders.stamp
        return None if stamp is None else stamp.digest

    # Reading.

    def ready_for(self, model: EncodingModel) -> None:
        """Make every shard ready to be read by a model; see `Freshness.ready_for`. `reencode` encodes what is stale."""
        stamp = self._stamp = model.encoder.stamp_for_reading()
        answers = self._ask_all("status", stamp.to_json(), self._selection, may_skip=True)
        self._own.status = [each for each in answers if each is not None]
        if masked := sum(each["masked_chunks"] for each in self._own.status):
            warnings.warn(
                f"{masked} chunks of an earlier encoder are not read until `reencode` has encoded them again.",
                stacklevel=2,
            )

    def attend(
        self,
        layer: int,
        queries: Float[Tensor, "kv_heads queries dim"],
        num_chunks: int,
        *,
        scaling: float,
        softcap: float | None = None,
        dtype: torch.dtype | None = None,
        shared: int = 1,
    ) -> Attended | None:
        """Return each query's attention over the best chunks of all shards, put together from what each computes of its own.

        Of all shards' best chunks the best by score are kept (`merge`); the result is as exact as the numbers that were sent.
        """
        own = self._pass()
        dtype = queries.dtype if dtype is None else dtype
        wire = dtype if self.wire_dtype is None else getattr(torch, self.wire_dtype)
        sent = queries if self.wire_dtype is None else queries.to(wire)
        given = {"scaling": scaling, "newest": self._newest(own), "softcap": softcap, "dtype": dtype, "wire": wire}
        request = self._request(own, layer, sent, num_chunks, shared=shared, **given)
        # At least that is not sent if shards hear which chunks are wanted before they attend to any.
        saved = len(self.shards) * (num_chunks - 1) * sent.nbytes
        if self.trips == 2 or (self.trips is None and saved > BYTES_OF_A_TRIP):
            with contextlib.suppress(ChangedMemoryError):  # a shard was started again between the two: then one
                return self._attend_twice(own, request)
        answers = self._read(own, "attend", request)
        ranking = merge.rank(answers, num_chunks, queries.device)
        return None if ranking is None else merge.attended(answers, ranking, self._found(own, answers, ranking))

    def _attend_twice(self, own: Pass, request: Request) -> Attended | None:
        """Return attention in two trips: the shards say how good their best chunks are, and attend to those of all."""
        assert request.queries is not None
        answers = self._read(own, "rank", request)
        ranking = merge.rank(answers, request.num_chunks, request.queries.device)
        if ranking is None:
            return None
        wanted = {number: ranking.wanted(number).cpu() for number in ranking.numbers}
        holders = {number: count for number, count in wanted.items() if count.any()}
        if not holders:
            return None
        picked = self._read(own, "attend_best", request._replace(queries=None), holders)
        answers = merge.in_places(answers, picked, wanted, self.chunk_size)
        return merge.attended(answers, ranking, self._found(own, answers, ranking))

    def search(
        self,
        layer: int,
        queries: Float[Tensor, "kv_heads queries dim"],
        num_chunks: int,
        *,
        scaling: float | None = None,
        newest: float | None = None,
    ) -> Found:
        """Return the best chunks of all shards; row r of shard s is row `r * len(shards) + s` here, as in `BankShards`."""
        own = self._pass()
        newest = self._newest(own) if newest is None and scaling is not None else newest
        return self._searched(own, self._request(own, layer, queries, num_chunks, scaling=scaling, newest=newest))

    def nearest(self, layer: int, queries: Float[Tensor, "kv_heads queries dim"], num_chunks: int) -> Found:
        """Return the chunks of all shards whose keys are nearest; see `MemoryBank.nearest`."""
        own = self._pass()
        return self._searched(own, self._request(own, layer, queries, num_chunks, by_distance=True))

    def _searched(self, own: Pass, request: Request) -> Found:
        queries, num_chunks = request.queries, request.num_chunks
        assert queries is not None
        answers = self._read(own, "search", request)
        ranking = merge.rank(answers, num_chunks, queries.device)
        return nothing_found(queries, num_chunks).found if ranking is None else self._found(own, answers, ranking)

    def sample(self, num_chunks: int) -> Found:
        """Return chunks spread evenly over each shard, as many of one as of another; see `MemoryBank.sample`."""
        own = self._pass()
        request = self._request(own, self.memory_layers[0], None, -(-num_chunks // len(self.shards)))
        answers = {number: each for number, each in self._read(own, "sample", request).items() if "rows" in each}
        if not answers:
            return Found(torch.empty(1, 1, 0, dtype=torch.int64), torch.empty(1, 1, 0), None, None)
        own.some = min(answers)
        rows = torch.cat([each["rows"] * len(self.shards) + number for number, each in answers.items()], dim=2)
        whole = [each.get("sizes", torch.full_like(each["rows"], self.chunk_size)) for each in answers.values()]
        return Found(rows, torch.zeros(rows.shape), None, own, torch.cat([each.long() for each in whole], dim=2))

    def next_ids(self, rows: Int[Tensor, "*shape"], generation: Hashable) -> Int[Tensor, "*shape chunk_size"]:
        """Return the id of the token that follows each token of these rows, -1 where none is known."""
        read, states = _read_and_states(generation)
        found = torch.full((rows.numel(), self.chunk_size), -1)
        for places, ids in self._ask_of_rows(rows, lambda number, own: ("next_ids", read, states[number], own)):
            found[places] = ids
        return found.view(*rows.shape, self.chunk_size).to(rows.device)

    def gather(self, layer: int, rows: Int[Tensor, "kv_heads chunks"], generation: Hashable) -> tuple[Tensor, Tensor]:
        """Return keys and values of rows, fetched from their shards: for a backward pass, and to compare neighbours."""
        read, states = _read_and_states(generation)
        count, cpu = len(self.shards), rows.cpu()
        cpu = torch.where(cpu < 0, generation.some if isinstance(generation, Pass) else 0, cpu)
        wanted = sorted((cpu % count).unique().tolist())
        # Each shard gets the whole table, with row 0 where a row is another shard's, so that all heads ask for as many.
        asked = {
            each: ("gather", read, states[each], layer, torch.where(cpu % count == each, cpu // count, 0))
            for each in wanted
        }
        answers = self.shards.ask(asked, timeout=self.timeout)
        refuse_missing(wanted, answers, self.timeout)
        keys, values = (each.clone() for each in answers[wanted[0]])
        for number in wanted[1:]:
            is_its = cpu % count == number
            for part, other in zip((keys, values), answers[number], strict=True):
                part[is_its] = other[is_its]
        return keys.to(rows.device), values.to(rows.device)

    def locate(self, rows: Int[Tensor, "*shape"]) -> list[ChunkPlace | None]:
        """Return document, tokens, characters and text of each row, flattened; None for row -1."""
        located: list[ChunkPlace | None] = [None] * rows.numel()
        for places, found in self._ask_of_rows(rows, lambda _, own: ("locate", own)):
            for place, each in zip(places.tolist(), found, strict=True):
                located[place] = each
        return located

    def _ask_of_rows(
        self, rows: Int[Tensor, "*shape"], request: Callable[[int, Tensor], tuple[Any, ...]]
    ) -> Iterator[tuple[Int[Tensor, " places"], Any]]:
        """Yield where rows of one shard stand among all, flattened, and its answer; row -1 is no shard's.

        `request`: what a shard, by number, is asked of its own rows.
        """
        flat, count = rows.detach().to("cpu", torch.int64).flatten(), len(self.shards)
        numbers = torch.where(flat < 0, -1, flat % count)
        places = {each: (numbers == each).nonzero().flatten() for each in numbers[numbers >= 0].unique().tolist()}
        asked = {number: request(number, flat[own] // count) for number, own in places.items()}
        answers = self.shards.ask(asked, timeout=self.timeout)
        refuse_missing(list(asked), answers, self.timeout)
        for number, answer in answers.items():
            yield places[number], answer

    def parts(self) -> list[tuple[TextBank, list[str]]]:
        """Return the bank, with the names of the documents that a search can find."""
        return [
            (self, [name for names in self._ask_all("names", self._selection, may_skip=True) for name in names or ()])
        ]

    def find(self, text: str, model: FindingModel | None = None, k: int = 10) -> list[FoundPassage]:
        """Return passages of all shards; arguments as for `MemoryBank.find`."""
        return find(self, text, model, k)

    def _pass(self) -> Pass:
        """Return the forward pass that runs here or, outside of one, a new one."""
        reading = READING.get()
        taken: dict[Any, Any] = {} if reading is None else reading[1]
        return taken.setdefault(self, Pass())

    def _newest(self, own: Pass) -> float | None:
        """Return the date from which ages count in a pass; None where age does not."""
        if self.has_age_prior and own.newest is None:
            own.newest = self.newest_date
        return own.newest

    def _request(self, own: Pass, layer: int, queries: Tensor | None, num_chunks: int, **more: Any) -> Request:
        digest = None if self._stamp is None else self._stamp.digest
        return Request(own.read, digest, self._selection, layer, queries, num_chunks, **more)

    def _read(
        self, own: Pass, method: str, request: Request, wanted: Mapping[int, Tensor] | None = None
    ) -> dict[int, Any]:
        """Return the answers of the shards, all of the states that this pass has met first; `wanted`: of these, of so many."""
        asked: dict[int, tuple[Any, ...]] = {
            number: (method, request) for number in range(len(self.shards)) if number not in own.missing
        }
        if wanted is not None:
            asked = {number: (method, request, count) for number, count in wanted.items()}
        try:
            answers = self.shards.ask(asked, timeout=self.timeout)
        except StaleMemoryError as error:
            if str(error) != UNKNOWN_ENCODER or self._stamp is None:
                raise
            self._ask_all("status", self._stamp.to_json(), self._selection, may_skip=True)
            answers = self.shards.ask(asked, timeout=self.timeout)
        if missing := asked.keys() - answers.keys():
            if self.on_missing == "error" or missing & own.states.keys():
                refuse_missing(list(asked), answers, self.timeout)
            own.missing |= missing
            self._leave_out(own.missing)
        for number, answer in answers.items():
            if own.states.setdefault(number, answer["state"]) != answer["state"]:
                raise ChangedMemoryError  # it was started again meanwhile, and somebody has written to it
        return answers

    def _found(self, own: Pass, answers: Mapping[int, Any], ranking: merge.Ranking) -> Found:
        own.some = ranking.numbers[0]
        return merge.found(answers, ranking, len(self.shards), self.chunk_size, own)

    # Documents.

    def documents(self) -> list[DocumentInfo]:
        """Return a summary of each document, shard after shard."""
        listed = [each for answer in self._ask_all("look", "documents", may_skip=True) for each in answer or ()]
        if self._selection is None:
            return listed
        names, tags = map(set, self._selection)
        return [each for each in listed if each.document_id in names or tags.intersection(each.tags)]

    def _look(self, document_id: object, method: str, *given: Any) -> Any:
        checks.validate_document_id("document_id", document_id)
        if self._pending(document_id) and not self._is_draft:
            raise ValueError(
                f"{document_id!r} was changed in this transaction, so its `{method}` must not be read before the end of it; "
                "make one transaction for each change."
            )
        return self._ask(self.shard_of(str(document_id)), "look", method, document_id, *given)

    def _pending(self, document_id: object) -> Changes:
        """Return what the transaction that is open is going to change of a document."""
        return [each for each in self._own.changes or () if each[1][0] == document_id]

    def __contains__(self, document_id: object) -> bool:
        if not isinstance(document_id, str) or self._is_draft:
            return False
        if changes := self._pending(document_id):
            return changes[-1][0] != "delete"
        return bool(self._look(document_id, "__contains__"))

    def info(self, document_id: str) -> DocumentInfo:
        """Return a summary of one document; in a transaction that has changed it, with its tokens alone up to date."""
        if self._is_draft or not (changes := self._pending(document_id)):
            return self._look(document_id, "info")
        own, self._own.changes = self._own.changes, []
        try:
            known = self.info(document_id) if document_id in self else DocumentInfo(document_id, 0, 0, 0, 0)
        finally:
            self._own.changes = own
        length = lengths_after(changes, {document_id: known.num_tokens})[document_id]
        return dataclasses.replace(known, num_tokens=length or 0)

    def text(self, document_id: str, start: int | None = None, stop: int | None = None) -> str | None:
        """Return the text of resident tokens; see `MemoryBank.text`."""
        return self._look(document_id, "text", start, stop)

    def token_ids(self, document_id: str, start: int | None = None) -> Int[Tensor, " tokens"] | None:
        """Return the ids of resident tokens; see `MemoryBank.token_ids`."""
        return self._look(document_id, "token_ids", start)

    def segments(self, document_id: str) -> list[Segment]:
        """Return a document's segments."""
        return self._look(document_id, "segments")

    # Writing.

    def write_as(self, stamp: EncoderStamp) -> None:
        """Write from now on as an encoder that the shards have heard of; what is current there stays so."""
        self._stamp = stamp

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all changes inside the block at its end, together, or none of them if it raises; all must be of one shard.

        A document that was changed inside the block can be read, and continued, behind it. Raises ValueError for two shards.
        """
        if self._own.changes is not None:
            yield
            return
        self._own.changes, self._own.shard = [], None
        try:
            yield
            changes, number = self._own.changes, self._own.shard
        finally:
            self._own.changes, self._own.shard = None, None
        if number is not None:
            self._commit(number, changes)

    def _change(self, document_id: str, method: str, *given: Any, **options: Any) -> None:
        checks.validate_document_id("document_id", document_id)
        number = self.shard_of(document_id)
        if self._own.changes is None:
            self._commit(number, [(method, (document_id, *given), options)])
            return
        if self._own.shard not in (None, number):
            raise ValueError(
                f"a transaction must stay within one shard, got documents of shards {self._own.shard} and {number}; "
                "make one for each document."
            )
        self._own.shard = number
        self._own.changes.append((method, (document_id, *given), options))

    def _commit(self, number: int, changes: Changes) -> None:
        """Let a shard make changes; where it dies meanwhile, look whether it had made them, and else do it again."""
        names = dict.fromkeys(given[0] for method, given, _ in changes if method in ("add", "append", "delete"))
        before = {name: self._length(name) for name in names}
        for method, given, _ in changes:
            if method == "delete" and before[given[0]] is None and len(changes) == 1:
                checks.validate_known("document_id", given[0], [each.document_id for each in self.documents()])
        new = {given[0]: given[2] for method, given, _ in changes if method == "replace"}
        before |= {given[0]: given[3] for method, given, _ in changes if method == "replace"}
        stamp = None if self._stamp is None else self._stamp.to_json()
        try:
            self._ask(number, "commit", changes, before, stamp, repeats=False)
        except InterruptedError:
            after = lengths_after(changes, before)
            now = {name: self._length(name) for name in after}
            found = map(self.token_ids, new)
            if now == after and all(
                each is not None and each.equal(new[name]) for name, each in zip(new, found, strict=True)
            ):
                before, changes = {}, [each for each in changes if each[0] in LABELS]  # these can be said twice
            elif now != before:
                raise
            self._ask(number, "commit", changes, before, stamp, repeats=False)

    def _length(self, document_id: str) -> int | None:
        return self.info(document_id).num_tokens if document_id in self else None

    def add(self, document_id: str, *given: Any, **options: Any) -> None:
        """Write a new document; arguments as for `MemoryBank.add`."""
        self._change(document_id, "add", *given, **options)

    def append(self, document_id: str, *given: Any, **options: Any) -> None:
        """Continue a document; arguments as for `MemoryBank.append`."""
        self._change(document_id, "append", *given, **options)

    def copy_tokens(
        self, document_id: str, bank: Any, origin_id: str, origin: int, part: SourcePart, **said: Any
    ) -> None:
        """Note, for a new version of a document, a segment that its shard is to copy from the old one."""
        assert self._is_draft
        self._change(document_id, "copy_tokens", origin_id, origin, part, **said)

    def update(
        self,
        document_id: str,
        text_or_ids: str | Sequence[int] | Tensor,
        *,
        model: EncodingModel,
        batch_size: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Replace a document by the encoding of a new text; see `MemoryBank.update`. Its shard copies what did not change.

        In a transaction it must be the first change of that document.
        """
        if self._stamp is None or self._stamp.digest != model.encoder.stamp().digest:
            self.ready_for(model)
        known = self._look(document_id, "info")
        draft = copy.copy(self)
        draft._is_draft, draft._own.changes = True, []  # a transaction that never commits
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        written = memorize(model, draft, text_or_ids, document_id, reuse=(self, document_id), **options)
        ids = to_token_ids(model, text_or_ids)
        self._change(document_id, "replace", draft._own.changes, ids, known.num_tokens)
        return written.num_encoded

    def delete(self, document_id: str) -> None:
        """Forget a document. Raises ValueError if there is none."""
        self._change(document_id, "delete")

    def tag(self, document_id: str, tags: Iterable[str]) -> None:
        """Give a document these tags instead of those it had."""
        self._change(document_id, "tag", tuple(tags))

    def pin(self, document_id: str, is_pinned: bool = True) -> None:
        """Keep a document from eviction or, with False, no longer."""
        self._change(document_id, "pin", is_pinned)

    def supersede(self, document_id: str, by: str | None = None) -> None:
        """Hide a document whose text no longer holds; `by` must be in the same shard, or None.

        Raises ValueError for one in another shard, whose renaming and deletion this one would not hear of.
        """
        if by is not None and self.shard_of(by) != self.shard_of(document_id):
            raise ValueError(
                f"`by` must be a document of the shard that {document_id!r} is in, {self.shard_of(document_id)}, got {by!r} of "
                f"{self.shard_of(by)}; leave it out, and the document is hidden all the same."
            )
        self._change(document_id, "supersede", by)

    def restore(self, document_id: str) -> None:
        """Let searches find a document again that was superseded or has expired."""
        self._change(document_id, "restore")

    def compact(self) -> None:
        """Give back the space of what was deleted, in all shards."""
        self._ask_all("compact")

    def reencode(
        self, model: EncodingModel, workers: Sequence[Any], *, budget_tokens: int | None = None
    ) -> RefreshReport:
        """Encode again all that another encoder than this model's wrote, by encoding workers, and return what was done.

        Each worker is given a segment when it is free, so that those of unequal speed end together. One shard after the other.

        Args:
            model: whose encoder it is.
            workers: as `Encoders(...).actors`, equal models.
            budget_tokens: stop before more tokens than that; None: do it all.
        """
        if not workers:
            raise ValueError("`workers` must be at least one encoding worker, got none; start some by `Encoders(...)`.")
        stamp, done = model.encoder.stamp().to_json(), RefreshReport()
        for number in range(len(self.shards)):
            left = None if budget_tokens is None else budget_tokens - done.tokens
            if left is None or left > 0:
                answers = self.shards.ask({number: ("reencode", stamp, list(workers), left)}, timeout=86_400.0)
                done.add(answers[number])
        return done


def lengths_after(changes: Changes, before: Mapping[str, int | None]) -> dict[str, int | None]:
    """Return how many tokens documents have once changes were made.

    >>> lengths_after([("delete", ("a",), {})], {"a": 3})
    {'a': None}
    """
    lengths = dict(before)
    for method, given, _ in changes:
        if method == "delete":
            lengths[given[0]] = None
        elif method == "replace":
            lengths[given[0]] = len(given[2])
        elif method in ("add", "append"):
            known = lengths.get(given[0]) if method == "append" else None
            lengths[given[0]] = (known or 0) + given[1][0].shape[1]
    return lengths


def _read_and_states(generation: Hashable) -> tuple[str, Mapping[int, str]]:
    """Return the name of the pass in which rows were found, "" for none, and the state of each shard that they are of.

    Raises:
        ChangedMemoryError: the generation is none of a cluster's.
    """
    if isinstance(generation, Pass):
        return generation.read, generation.states
    if isinstance(generation, tuple):
        return "", dict(enumerate(generation))
    raise ChangedMemoryError


def shard_folders(root: str | Path) -> list[Path]:
    """Return the folders of the shards in a folder, in order. Raises ValueError if there are none, or one is missing.

    With fewer shards than there were, documents would be looked for, and written, where they do not belong.
    """
    found = sorted(
        (each for each in Path(root).glob("shard-*") if each.name[6:].isdigit() and has_bank(each)),
        key=lambda each: int(each.name[6:]),
    )
    path = Path(root) / SHARDS
    count = read_json(path).get("num_shards") if path.exists() else len(found)  # earlier versions wrote no such file
    if not found or int(found[-1].name[6:]) != len(found) - 1 or len(found) != count:
        raise ValueError(
            f"`root` must hold the folders shard-0, shard-1, ... of all of a bank's {count or ''} shards, got {str(root)!r} "
            f"with {[each.name for each in found] or 'none'}; `ClusterBank.create` makes them, a lost one comes from a copy."
        )
    return found
