"""Where a bank is: on a device within a budget, the rest in host memory or on disk, with the answers of a bank on the CPU.

The `meta` device stands for a GPU in tests of what is where: it, too, refuses what is elsewhere. With a GPU the tests of
answers run on it as well (`-m gpu`).
"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longmem import MemoryBank
from longmem.memory.rows import storage
from longmem.memory.visibility import Snapshot, reading_as
from longmem.model.attention import read_memory

HEADS, DIM, SIZE, LAYER = 2, 8, 4, 5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SETTINGS = [
    {"search": search, "storage_dtype": dtype} for search in ("token", "chunk_mean") for dtype in ("int8", "float16")
]


def some(tokens, seed=0):
    return torch.randn(HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def filled(folder=None, tokens=160, **settings):
    settings = {"memory_layers": [LAYER], "chunk_size": SIZE, "index": "flat", **settings}
    bank = MemoryBank(**settings) if folder is None else MemoryBank.create(folder, **settings)
    for number in range(2):
        keys = some(tokens // 2, number)
        bank.add(str(number), [keys], [keys.flip(2)])
    return bank


def places(bank):
    """Return the device of each tensor of a bank in memory."""
    return {name: part.device.type for name, part in bank._table.storage.layer(0).live._asdict().items()}


def read(bank, device="cpu"):
    """Return what a search finds and what is gathered of it, on the CPU."""
    queries = some(5, 99).to(device)
    found = bank.search(LAYER, queries, 3)
    keys, values = bank.gather(LAYER, found.rows.flatten(1), found.generation)
    assert {each.device.type for each in (found.rows, found.scores, keys, values)} == {torch.device(device).type}
    return [each.cpu() for each in (found.rows, found.scores, keys, values)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_budget_says_what_is_on_the_device(settings):
    bank = filled(**settings)
    searched, whole = bank.device_bytes()
    name = "keys" if settings["search"] == "token" else "search_keys"
    assert places(bank.copy().to("meta")) == dict.fromkeys(("keys", "values", "search_keys"), "meta")
    assert places(bank.copy().to("meta", device_budget=whole)) == dict.fromkeys(
        ("keys", "values", "search_keys"), "meta"
    )
    parts = places(bank.copy().to("meta", device_budget=whole - 1))
    assert {each for each, device in parts.items() if device == "meta"} == {name}
    assert bank.copy().to("meta", device_budget=searched).device.type == "meta"
    with pytest.raises(
        ValueError, match=f"`device_budget` must have room .* {searched:,} bytes .*, got {searched - 1:,}"
    ):
        bank.to("meta", device_budget=searched - 1)
    assert places(bank) == dict.fromkeys(("keys", "values", "search_keys"), "cpu")
    assert bank.device.type == "cpu"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_outgrows_the_budget_makes_room_or_is_refused(settings, monkeypatch):
    # Nothing comes back from the stand-in for a GPU.
    monkeypatch.setattr(storage, "sent", lambda tensor, device: torch.empty_like(tensor, device=device))
    bank = filled(**settings)
    searched, whole = bank.device_bytes()
    bank.to("meta", device_budget=whole + 4 * SIZE * DIM)  # hardly anything more
    assert set(places(bank).values()) == {"meta"}
    bank._table.storage.reserve([], bank.num_chunks + 8)
    assert sorted(places(bank).values()) == ["cpu", "cpu", "meta"]
    allocated = bank._table.storage.nbytes
    with pytest.raises(ValueError, match="`device_budget` must have room"):
        bank._table.storage.reserve([], bank.num_chunks * (1 + whole // searched) + 8)
    assert bank._table.storage.nbytes == allocated


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize(("settings", "part"), [*itertools.product(SETTINGS, ["all", "searched"])], ids=str)
def test_a_bank_answers_alike_wherever_it_is(device, place, settings, part, tmp_path):
    expected = read(filled(**settings))
    bank = filled(tmp_path / "bank" if place == "folder" else None, **settings)
    searched, whole = bank.device_bytes()
    bank.to(device, device_budget=whole if part == "all" else searched)
    for asked in ("cpu", device):
        for got, wanted in zip(read(bank, asked), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    bank.to("cpu", device_budget=None)
    # It goes on to be written, moved and read.
    twin = filled(**settings)
    for each in (bank, twin):
        each.delete("0")
        each.add("2", [some(24, 7)], [some(24, 8)])
    for got, wanted in zip(read(bank, device), read(twin), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_bank_in_a_folder_keeps_on_a_device_what_fits_there(tmp_path, monkeypatch):
    taken = []
    take = storage.chunks_at
    monkeypatch.setattr("longmem.memory.folder.disk_storage.chunks_at", lambda *given: taken.append(1) or take(*given))
    bank = filled(tmp_path / "bank", search="chunk_mean")
    read(bank)
    assert not taken  # in host memory keys and values are read where they are on disk
    # A device that is not the CPU keeps them; the CPU stands for it, so that what it holds can be computed with.
    bank._table.storage.device = torch.device("cpu", 0)
    monkeypatch.setattr(type(bank._table.storage), "_names_on", lambda *given: ("keys", "values", "search_keys"))
    expected = read(filled(search="chunk_mean"))
    for got, wanted in zip(read(bank), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert len(taken) == 2
    bank.add("2", [some(24, 7)], [some(24, 8)])  # what is held follows writes and moves
    bank.delete("0")
    twin = filled(search="chunk_mean")
    twin.add("2", [some(24, 7)], [some(24, 8)])
    twin.delete("0")
    for got, wanted in zip(read(bank), read(twin), strict=True):
        torch.testing.assert_close(got, wanted)


class Largest(TorchDispatchMode):
    """Notes the most bytes of float32 numbers that one operation has made."""

    nbytes = 0

    def __torch_dispatch__(self, operation, types, given=(), options=None):
        made = operation(*given, **(options or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32:
                self.nbytes = max(self.nbytes, each.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("index", ["flat", "exact", "ivf:least_probes=4"])
@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16"])
@pytest.mark.parametrize("subset", ["all", "half", "few"])
def test_no_search_makes_float32_of_a_whole_bank(index, dtype, subset, monkeypatch):
    monkeypatch.setattr("longmem.memory.index.exact.NUMBERS_PER_STEP", {"cpu": 2**12, "cuda": 2**12})
    monkeypatch.setattr("longmem.memory.index.exact.SCORES_PER_STEP", {"cpu": 2**12, "cuda": 2**12})
    monkeypatch.setattr("longmem.memory.index.approximate.EXACT_BELOW", 512)
    bank = filled(tokens=16_384, search="token", storage_dtype=dtype, index=index)
    keys = some(1_024, 9)
    bank.add("few", [keys], [keys])
    reader = {"all": bank, "half": bank.select(["0", "few"]), "few": bank.select(["few"])}[subset]
    reader.search(LAYER, some(3), 4)  # an approximate index is built once
    with Largest() as largest:
        found = reader.search(LAYER, some(3, 4), 4)
    whole = HEADS * bank.num_chunks * SIZE * DIM * 4
    assert largest.nbytes < whole / 8
    exact = filled(tokens=16_384, search="token", storage_dtype=dtype, index="exact")
    exact.add("few", [keys], [keys])
    exact = {"all": exact, "half": exact.select(["0", "few"]), "few": exact.select(["few"])}[subset]
    monkeypatch.undo()  # in one step
    wanted = exact.search(LAYER, some(3, 4), 4)
    hits = (found.rows.unsqueeze(-1) == wanted.rows.unsqueeze(-2)).any(dim=-1).float().mean()
    assert hits >= (0.2 if index.startswith("ivf") and subset != "few" else 1.0)
    if hits == 1.0:
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("settings", [*SETTINGS, {"search": "token", "age_prior": "exp:a=5"}], ids=str)
def test_what_is_read_in_a_pass_is_not_waited_for(device, settings, monkeypatch):
    """Numbers of `meta` can't be looked at, and a GPU says when it is waited for; both may be once, when a pass is over."""
    bank = filled(tokens=164, **settings).to(device)  # the last chunk is shorter
    queries, counted = some(5, 99).to(device), []
    if device == "meta":  # whose queries are refused, and which has no autocast
        monkeypatch.setattr("longmem.memory.rows.table.refuse_search", lambda *given: None)
        monkeypatch.setattr("longmem.model.attention.product_dtype", lambda states: states.dtype)
    monkeypatch.setattr(Snapshot, "count_reads", lambda snapshot: counted.append(len(snapshot._found)))

    def read():
        retrieved = read_memory(queries[None], [bank], LAYER, num_kv_heads=HEADS, num_chunks=3, scaling=0.3)
        assert {retrieved.output.device.type, retrieved.read.rows.device.type} == {device}

    with reading_as(None, {}):
        read()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            read()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert counted == [2]
