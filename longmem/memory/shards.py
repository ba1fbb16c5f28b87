"""Several banks of one encoder, read as if they were one."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.errors import ChangedMemoryError
from longmem.memory.bank import MemoryBank
from longmem.memory.checks import validate_known, validate_names
from longmem.memory.finding import FindingModel, FoundPassage, TextBank, find
from longmem.memory.protocols import EncodingModel, Found
from longmem.memory.reader import BankView
from longmem.memory.rows.ledger import ChunkPlace
from longmem.memory.rows.storage import KeysValues


class BankShards:
    """One read-only bank over several: a library in parts, or a shared library and a private bank.

    It holds the banks, or views on them, each of another bank, and sees what is later written there. Search asks every shard
    and keeps the best, so with exact shards it finds what one bank with all documents would find. Shards of shards are taken
    apart.

    Row r of shard s is row `r * len(shards) + s` here, so rows found before stay good when a shard grows. Names of
    documents are a matter of each shard and may repeat; `shard_of` tells which one a row is from.

    >>> library, mine = (MemoryBank(memory_layers=[5], chunk_size=4) for _ in range(2))
    >>> keys = torch.eye(10).unsqueeze(0)  # one head, ten tokens, each with a direction of its own
    >>> library.add("emma", [keys[:, :8]], [keys[:, :8]])
    >>> mine.add("notes", [keys[:, 6:]], [keys[:, 6:]])
    >>> shards = BankShards([library, mine])
    >>> rows, scores, *_ = shards.search(5, keys[:, 7:8], num_chunks=3)
    >>> rows, shards.shard_of(rows), [place[:3] for place in shards.locate(rows)]
    (tensor([[[2, 1, 0]]]), tensor([[[0, 1, 0]]]), [('emma', 4, 8), ('notes', 0, 4), ('emma', 0, 4)])
    """

    def __init__(self, banks: Iterable[MemoryBank | BankView | BankShards]) -> None:
        if isinstance(banks, MemoryBank | BankView | BankShards) or not isinstance(banks, Iterable):
            raise ValueError(f"`banks` must be a list of banks, got {type(banks).__name__}; put it in a list.")
        self.shards: tuple[MemoryBank | BankView, ...] = tuple(
            shard for bank in banks for shard in (bank.shards if isinstance(bank, BankShards) else [bank])
        )
        _validate_shards(self.shards)
        self.memory_layers = self.shards[0].memory_layers
        self.chunk_size, self.by_token = self.shards[0].chunk_size, self.shards[0].by_token

    def __repr__(self) -> str:
        return f"BankShards({len(self.shards)} shards, {self.num_tokens} tokens, memory_layers={self.memory_layers})"

    @property
    def fingerprint(self) -> str | None:
        """Return the encoder fingerprint that the shards share; None if none of them has one."""
        return next((shard.fingerprint for shard in self.shards if shard.fingerprint is not None), None)

    @property
    def num_chunks(self) -> int:
        return sum(shard.num_chunks for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def is_empty(self) -> bool:
        """Return whether nothing is resident."""
        return all(shard.is_empty for shard in self.shards)

    @property
    def has_age_prior(self) -> bool:
        """Return whether age counts when one of the shards is read."""
        return any(_bank_of(shard).age_prior is not None for shard in self.shards)

    @property
    def newest_date(self) -> float:
        """Return the date of the newest document of all shards that a search can find; -inf if there is none."""
        return max(shard.newest_date for shard in self.shards)

    @property
    def generation(self) -> tuple[int, ...]:
        return tuple(shard.generation for shard in self.shards)

    def parts(self) -> list[tuple[TextBank, list[str]]]:
        """Return the banks of all shards, with the names of the documents that a search can find."""
        return [part for shard in self.shards for part in shard.parts()]

    def find(self, text: str, model: FindingModel | None = None, k: int = 10) -> list[FoundPassage]:
        """Return passages of all shards; arguments as for `MemoryBank.find`."""
        return find(self, text, model, k)

    def ready_for(self, model: EncodingModel) -> None:
        for shard in self.shards:
            shard.ready_for(model)

    @property
    def version(self) -> int:
        return sum(shard.version for shard in self.shards)

    def select(self, document_ids: str | Iterable[str]) -> BankShards:
        """Return these documents alone; an id that several shards know means all of its documents.

        The shards of the result are views, of those shards that have one of the documents. Raises ValueError for an id
        that no shard knows. To read by tags, make shards of views: `BankShards(bank.select(tags=...) for bank in banks)`.
        """
        wanted = validate_names("document_ids", document_ids)
        if not wanted:
            raise ValueError("`document_ids` must name at least one document, got none; read the shards for all.")
        listed = (shard.documents() for shard in self.shards)
        known = [[each if isinstance(each, str) else each.document_id for each in documents] for documents in listed]
        names = dict.fromkeys(document_id for each in known for document_id in each)
        for document_id in wanted:
            validate_known("document_ids", document_id, names)
        chosen = [[document_id for document_id in wanted if document_id in each] for each in known]
        return BankShards(_bank_of(shard).select(ids) for shard, ids in zip(self.shards, chosen, strict=True) if ids)

    def search(
        self,
        layer: int,
        queries: Float[Tensor, "kv_heads queries dim"],
        num_chunks: int,
        *,
        scaling: float | None = None,
        newest: float | None = None,
    ) -> Found:
        """Return the best chunks of all shards; of equal scores the earlier shard's comes first.

        Each shard weighs by its own age prior, if it has one; ages count from the newest document of all shards.
        """
        with contextlib.ExitStack() as held:
            for lock in self._locks():
                held.enter_context(lock)
            if scaling is not None and self.has_age_prior and newest is None:
                newest = self.newest_date
            found = [shard.search(layer, queries, num_chunks, scaling=scaling, newest=newest) for shard in self.shards]
        return self._best(found, num_chunks)

    def nearest(self, layer: int, queries: Float[Tensor, "kv_heads queries dim"], num_chunks: int) -> Found:
        """Return the chunks of all shards whose keys are nearest; see `MemoryBank.nearest`."""
        with contextlib.ExitStack() as held:
            for lock in self._locks():
                held.enter_context(lock)
            found = [shard.nearest(layer, queries, num_chunks) for shard in self.shards]
        return self._best(found, num_chunks)

    def _best(self, found: Sequence[Found], num_chunks: int) -> Found:
        """Return the best of what the shards have found; of equal scores the earlier shard's comes first."""
        scores = torch.cat([each.scores for each in found], dim=2)
        own = [torch.where(each.rows < 0, -1, each.rows * len(found) + number) for number, each in enumerate(found)]
        rows = torch.cat(own, dim=2)
        scores, order = scores.sort(dim=2, descending=True, stable=True)
        scores, order = scores[..., :num_chunks], order[..., :num_chunks]
        ages = _side_by_side([each.log_weights for each in found], [each.scores for each in found], 0.0, order)
        sizes = _side_by_side([each.sizes for each in found], [each.rows for each in found], self.chunk_size, order)
        # An empty shard names no generation: none of the rows is its own, so any state of it will do.
        states = tuple(each.generation for each in found)
        is_empty = all(each is None for each in states)
        return Found(rows.gather(2, order), scores, ages, None if is_empty else states, sizes)

    def sample(self, num_chunks: int) -> Found:
        """Return chunks spread evenly over each shard, of each by how many it holds; see `MemoryBank.sample`."""
        with contextlib.ExitStack() as held:
            for lock in self._locks():
                held.enter_context(lock)
            held_there = [0 if shard.is_empty else shard.num_chunks for shard in self.shards]
            shares = [-(-num_chunks * count // max(sum(held_there), 1)) for count in held_there]
            found = [shard.sample(max(share, 1)) for shard, share in zip(self.shards, shares, strict=True)]
        rows = torch.cat([each.rows.cpu() * len(found) + number for number, each in enumerate(found)], dim=2)
        states = tuple(each.generation for each in found)
        sizes = None
        if any(each.sizes is not None for each in found):
            whole = [
                torch.full_like(each.rows, self.chunk_size) if each.sizes is None else each.sizes for each in found
            ]
            sizes = torch.cat([each.cpu() for each in whole], dim=2)
        is_empty = all(each is None for each in states)
        return Found(rows, torch.zeros(rows.shape), None, None if is_empty else states, sizes)

    def next_ids(self, rows: Int[Tensor, "*shape"], generation: Hashable) -> Int[Tensor, "*shape chunk_size"]:
        """Return the id of the token that follows each token of these rows, -1 where none is known."""
        if not isinstance(generation, tuple) or len(generation) != len(self.shards):
            raise ChangedMemoryError
        numbers, own_rows = self.shard_of(rows), rows // len(self.shards)
        found = torch.full((*rows.shape, self.chunk_size), -1, device=rows.device)
        for number, (shard, own) in enumerate(zip(self.shards, generation, strict=True)):
            if own is not None:
                mine = numbers == number
                found[mine] = shard.next_ids(own_rows[mine], own)
        return found

    def gather(self, layer: int, rows: Int[Tensor, "kv_heads chunks"], generation: Hashable) -> KeysValues:
        """Return copies of the keys and values of these rows, in a dtype that holds those of all shards that are read.

        For a row of a shard in which nothing was found, such as a missing one with 0 in its place, any chunk is returned.
        """
        if not isinstance(generation, tuple) or len(generation) != len(self.shards):
            raise ChangedMemoryError
        numbers, own_rows = self.shard_of(rows), rows // len(self.shards)
        parts: list[tuple[Tensor, Tensor]] = []
        places, num_taken = torch.zeros_like(rows), 0
        for number, shard in enumerate(self.shards):
            if generation[number] is None:
                continue
            mine = numbers == number
            ranks = mine.cumsum(dim=1) - 1
            width = int(ranks[:, -1].max()) + 1 if rows.numel() else 0
            if not width:
                continue
            # Heads ask a shard for different numbers of rows: pushed to the left, those of all heads fit one tensor. One
            # more column takes the rows of other shards.
            packed = rows.new_zeros(len(rows), width + 1)
            packed.scatter_(1, torch.where(mine, ranks, width), own_rows)
            parts.append(shard.gather(layer, packed[:, :width], generation[number]))
            starts = num_taken + width * torch.arange(len(rows), device=rows.device).unsqueeze(1)
            places = torch.where(mine, starts + ranks, places)
            num_taken += width * len(rows)
        if not parts:  # nothing but missing rows: any chunk will do
            # Not `shard.is_empty`: rows found through a view stay good when its document is renamed, as in `BankView.gather`.
            pairs = zip(self.shards, generation, strict=True)
            known = [(each, own) for each, own in pairs if own is not None and _bank_of(each).num_chunks]
            if not known:
                raise ValueError("`gather` needs a shard that holds chunks, got empty ones only; ask `is_empty` first.")
            first, own = known[0]
            parts, places = [first.gather(layer, rows.new_zeros(len(rows), 1), own)], torch.zeros_like(rows)
        keys, values = (_in_order(part, places) for part in zip(*parts, strict=True))
        return keys, values

    def log_weights(self, rows: Int[Tensor, "*shape"], *, newest: float | None = None) -> Float[Tensor, "*shape"]:
        """Return log w(age) of these rows, with ages from the newest document of all shards."""
        newest = self.newest_date if newest is None else newest
        numbers, own_rows = self.shard_of(rows), rows // len(self.shards)
        weights = torch.zeros(rows.shape, device=rows.device)
        for number, shard in enumerate(self.shards):
            weights[numbers == number] = shard.log_weights(own_rows[numbers == number], newest=newest)
        return weights

    def locate(self, rows: Int[Tensor, "*shape"]) -> list[ChunkPlace | None]:
        """Return (document id, first token, token after the last) for each row, flattened; None for row -1."""
        rows = rows.detach().to("cpu", torch.int64).flatten()
        numbers, own_rows = self.shard_of(rows), rows // len(self.shards)
        limits = torch.tensor([_bank_of(shard).num_chunks for shard in self.shards])
        wrong = rows[(rows < -1) | ((rows >= 0) & (own_rows >= limits[numbers]))]
        if len(wrong):
            raise ValueError(
                f"`rows` must be -1 or rows that `search` gave, got {wrong[0]} with {limits.tolist()} chunks in the "
                "shards; rows are good while `generation` stays, so search again."
            )
        found: list[ChunkPlace | None] = [None] * len(rows)
        for number, shard in enumerate(self.shards):
            places = (numbers == number).nonzero().flatten()
            for place, located in zip(places.tolist(), shard.locate(own_rows[places]), strict=True):
                found[place] = located
        return found

    def _locks(self) -> list[AbstractContextManager[object]]:
        """Return what keeps all shards as they are while it is held, in the order in which everybody takes it."""
        return sorted((_bank_of(shard).lock for shard in self.shards), key=id)

    def shard_of(self, rows: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return the place in `shards` of the bank that each row is from, -1 for row -1."""
        return torch.where(rows < 0, -1, rows % len(self.shards))


def _bank_of(shard: MemoryBank | BankView) -> MemoryBank:
    bank = shard.bank if isinstance(shard, BankView) else shard
    assert isinstance(bank, MemoryBank)  # nothing else has views
    return bank


def _side_by_side(
    parts: Sequence[Tensor | None], like: Sequence[Tensor], default: float, order: Tensor
) -> Tensor | None:
    """Return what the shards say of the chunks they found, in one order, with a default for those that say nothing."""
    if all(part is None for part in parts):
        return None
    filled = [
        torch.full_like(other, default) if part is None else part for part, other in zip(parts, like, strict=True)
    ]
    return torch.cat(filled, dim=2).gather(2, order)


def _in_order(
    parts: Sequence[Float[Tensor, "kv_heads _chunks chunk_size dim"]], places: Int[Tensor, "kv_heads chunks"]
) -> Float[Tensor, "kv_heads chunks chunk_size dim"]:
    """Return the chunks at `places`, counted through all heads of all parts."""
    together = torch.cat([part.to(places.device).flatten(0, 1) for part in parts])
    # To pick whole chunks copies them at the speed of memory; to put them in their places (`index_copy_`, masks) goes number
    # by number and takes several times as long.
    return together.index_select(0, places.flatten()).unflatten(0, places.shape)


def _place_of(bank: MemoryBank) -> Path | int:
    """Return what two banks share when they hold the same: the folder, or the object."""
    try:
        return bank.folder.path
    except ValueError:
        return id(bank)


def _validate_shards(shards: Sequence[Any]) -> None:
    """Raise ValueError unless these are different banks that one encoder has written."""
    if not shards:
        raise ValueError("`banks` must hold at least one bank, got none; an empty `MemoryBank` stands for no memory.")
    for number, shard in enumerate(shards):
        if not isinstance(shard, MemoryBank | BankView):
            raise ValueError(
                f"`banks` must be MemoryBanks or views on them, got {type(shard).__name__} at place {number}; open a "
                "saved bank with `MemoryBank.load(folder)`."
            )
    banks = [_bank_of(shard) for shard in shards]
    places = [_place_of(bank) for bank in banks]
    if len(set(places)) < len(places):
        twice = next(number for number, place in enumerate(places) if place in places[:number])
        raise ValueError(
            f"`banks` must be different banks, got one again at place {twice}: its chunks would be found twice; for "
            "several documents of one bank, `bank.select([...])` names them all."
        )
    for name, advice in (
        ("memory_layers", "banks of one model agree, made by `MemoryBank.for_model(model)`"),
        ("chunk_size", "banks of one model agree, made by `MemoryBank.for_model(model)`"),
        ("by_token", "banks of one model agree, made by `MemoryBank.for_model(model)`"),
        ("fingerprint", "memorize the documents of one of them again with the other's model"),
        ("shapes", "one model writes one size of heads; memorize the documents of one of them again"),
    ):
        # None: no fingerprint to compare, or sizes that the first write will fix.
        known = [(number, getattr(bank, name)) for number, bank in enumerate(banks) if getattr(bank, name) is not None]
        for number, value in known[1:]:
            if value != known[0][1]:
                raise ValueError(
                    f"`banks` must agree in {'head sizes' if name == 'shapes' else f'`{name}`'}, got {known[0][1]} "
                    f"at place {known[0][0]} and {value} at place {number}; {advice}."
                )
