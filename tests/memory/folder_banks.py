"""What the tests of banks in folders share: documents whose numbers follow from their token ids, and all that can be read."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from longmem.memory import MemoryBank

LAYERS = (1, 4)
SIZES = {1: (2, 64, 5), 4: (1, 96, 7)}  # kv_heads, key_dim, value_dim: other ones for each layer
CHUNK_SIZE = 4
SETTINGS = {"memory_layers": LAYERS, "chunk_size": CHUNK_SIZE, "index": "exact", "fingerprint": "encoder-a"}


def numbers(token_ids: torch.Tensor, heads: int, dim: int, salt: int) -> torch.Tensor:
    """Return (heads, tokens, dim) numbers that any process can compute from the ids, and that float16 holds exactly."""
    place = torch.arange(heads * dim).view(heads, 1, dim)
    mixed = token_ids.view(1, -1, 1) * 1_000_003 + place * 7_919 + salt * 104_729 + 1
    for multiplier in (-4_417_276_706_812_531_889, 1_181_783_497_276_652_981):
        mixed = mixed * multiplier
        mixed = mixed ^ (mixed >> 29)
    return ((mixed >> 33) & 15).float() / 4 - 1.875


def keys_and_values(token_ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what is written for these tokens."""
    keys = [numbers(token_ids, heads, dim, layer) for layer, (heads, dim, _) in SIZES.items()]
    values = [numbers(token_ids, heads, dim, layer + 100) for layer, (heads, _, dim) in SIZES.items()]
    return keys, values


def write(bank: MemoryBank, name: str, token_ids: Iterable[int], *, with_text: bool = True, **options: Any) -> None:
    """Add or append these tokens."""
    ids = list(token_ids)
    words = [f"wörd{token} " for token in ids]
    ends = list(itertools.accumulate(len(word) for word in words))
    source = {"text": "".join(words), "char_ends": ends} if with_text else {}
    put = bank.append if name in bank else bank.add
    put(name, *keys_and_values(torch.tensor(ids, dtype=torch.int64)), ids, **source, **options)


def contents(bank: MemoryBank) -> dict[str, Any]:
    """Return all that can be read of each document, after a check that it is what `write` wrote."""
    found: dict[str, Any] = {}
    for info in bank.documents():
        ids = bank.token_ids(info.document_id)
        assert ids is not None
        assert len(ids) == info.num_tokens - info.first_resident_token
        found[info.document_id] = [
            info,
            bank.segments(info.document_id),
            ids.tolist(),
            bank.text(info.document_id),
        ]
    if bank.is_empty:
        return found
    rows = torch.arange(bank.num_chunks)
    places = bank.locate(rows)
    owners = {name: bank.info(name).first_resident_token for name in found}
    ids = torch.tensor(
        [found[place.document_id][2][i - owners[place.document_id]] for place in places for i in range(*place[1:3])]
    )
    expected = keys_and_values(ids)
    sizes = torch.tensor([place.stop - place.start for place in places])
    is_there = torch.arange(CHUNK_SIZE) < sizes[:, None]
    for position, (layer, (heads, _, _)) in enumerate(SIZES.items()):
        read = bank.gather(layer, rows.expand(heads, -1), bank.generation)
        for stored, written in zip(read, expected, strict=True):
            assert torch.equal(stored.float()[:, is_there], written[position])
        means = (read[0].float() * is_there[..., None]).sum(dim=2) / sizes[:, None]
        nearest, scores, *_ = bank.search(layer, means, 1)
        # The chunk itself, or one of the same tokens, or now and then one with a longer key.
        products = means @ means.transpose(1, 2)
        best, own = products.amax(dim=-1), products.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(scores[..., 0], best)
        found_products = products.gather(2, nearest)[..., 0]
        torch.testing.assert_close(found_products, best, msg="search finds the best chunk")
        whole = sizes == CHUNK_SIZE  # the mean of fewer keys is longer
        if whole.any():
            best = products[:, whole][..., whole].amax(dim=-1)
            assert (own[:, whole] < best).float().mean() < 0.01, "a chunk is nearest to its own key"
    for place in sorted(places):
        found[place.document_id].append(place)
    return found


def segment_files(folder: Path) -> set[str]:
    """Return the names of the files with keys and values."""
    return {path.name for path in (folder / "segments").glob("*")}


class RandomSteps:
    """Return an endless sequence of committed steps, the same for the same seed on whatever kind of bank.

    A bank in memory, which the steps are done to as well, says what a bank on disk must hold.
    """

    def __init__(self, seed: int, folder: str | Path | None = None) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.settings = SETTINGS | {"capacity_tokens": self.random.choice([None, 120])}
        self.num_tokens = 0
        self.bank = self.make()

    def make(self) -> MemoryBank:
        """Return a new bank."""
        return MemoryBank(**self.settings) if self.folder is None else MemoryBank.create(self.folder, **self.settings)

    def new_ids(self) -> range:
        """Return ids that no token has had."""
        start = self.num_tokens
        self.num_tokens += self.random.randint(1, 14)
        return range(start, self.num_tokens)

    def step(self) -> None:
        """Do one step; it is on the disk when this returns."""
        kind = self.random.choice(["one"] * 6 + ["several"] * 3 + ["compact", "save over", "reopen"])
        if kind == "one":
            self.change()
        elif kind == "several":
            with self.bank.transaction():
                for _ in range(self.random.randint(2, 5)):
                    self.change()
        elif kind == "compact" and self.folder is not None:
            self.bank.folder.compact()
        elif kind == "save over":
            other = MemoryBank(**self.settings)
            for name in self.random.sample("abcdefgh", 3):
                write(other, name, self.new_ids())
            if self.folder is None:
                self.bank = other
            else:
                self.bank.close()
                other.save(self.folder)
                self.bank = MemoryBank.open(self.folder)
        elif kind == "reopen" and self.folder is not None:
            self.bank.close()
            self.bank = MemoryBank.open(self.folder)

    def change(self) -> None:
        """Do one change that is a transaction of its own."""
        infos = {info.document_id: info for info in self.bank.documents()}
        kind = self.random.choice(["write"] * 4 + ["replace", "delete", "rename", "tag", "pin"])
        name, other = self.random.choice("abcdefgh"), self.random.choice("abcdefgh")
        if kind == "write" and (name not in infos or infos[name].num_tokens < 40):
            with_text = bool(self.bank.text(name)) if name in infos else name < "f"
            write(self.bank, name, self.new_ids(), with_text=with_text)
        elif name in infos and kind in ("replace", "delete"):
            with self.bank.transaction():
                self.bank.delete(name)
                if kind == "replace":
                    write(self.bank, name, self.new_ids())
        elif name in infos and kind == "rename" and other not in infos:
            self.bank.rename(name, other)
        elif name in infos and kind == "tag":
            self.bank.tag(name, [f"tag{self.num_tokens}"])
        elif name in infos and kind == "pin":  # one at a time, so that there is room for all that is written
            with self.bank.transaction():
                for each in infos.values():
                    self.bank.pin(each.document_id, each.document_id == name)
