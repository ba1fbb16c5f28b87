"""The last, shorter chunk of a document: found, read and forgotten like the others, however its tokens came."""

import contextlib
import itertools
import json
import sqlite3

import pytest
import torch
from folder_banks import CHUNK_SIZE, SETTINGS, contents, keys_and_values
from folder_banks import write as write_ids
from safetensors.torch import save

from longmem.memory import BankShards, MemoryBank
from longmem.memory.folder.catalogue import CATALOGUE, DOCUMENTS, SCHEMA_VERSION, SPANS, USAGE, Catalogue
from longmem.memory.index import approximate
from longmem.model.attention import read_memory

DIM, VALUE_DIM = 96, 3  # each token has a direction of its own
SEARCHES = ("token", "chunk_mean")
INDEXES = ("flat", "exact", "ivf:probed_share=1", "hnsw:search_depth=200", "pq:probed_share=1,bits=4,candidates=100")


def states(first: int, stop: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return keys and values of tokens, each in its own direction and of its own size."""
    tokens = torch.arange(first, stop)
    keys = torch.nn.functional.one_hot(tokens, DIM) * (1 + tokens[:, None] / 64)
    values = torch.sin(tokens[:, None] * torch.arange(1, VALUE_DIM + 1))
    return [keys[None].float()], [values[None]]


def write(bank: MemoryBank, name: str, first: int, pieces: list[int]) -> int:
    """Add a document in pieces; return the token after its last."""
    for count in pieces:
        put = bank.append if name in bank else bank.add
        put(name, *states(first, first + count), range(first, first + count))
        first += count
    return first


def new_bank(chunk_size: int, search: str, **options) -> MemoryBank:
    settings = {"memory_layers": [1], "chunk_size": chunk_size, "search": search, "storage_dtype": "float32", **options}
    folder = settings.pop("folder", None)
    return MemoryBank(**settings) if folder is None else MemoryBank.create(folder, **settings)


def cut(length: int, how: str) -> list[int]:
    """Return the lengths of the pieces in which a document of this length comes."""
    if how == "at once":
        return [length]
    if how == "one by one":
        return [1] * length
    sizes = list(itertools.takewhile(lambda size: size > 0, (min(n, length - n * (n - 1) // 2) for n in range(1, 99))))
    return sizes  # 1, 2, 3, ... and the rest


def attended(memory, queries: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Return what attention reads, (queries, value_dim)."""
    found = read_memory(queries[None], [memory], 1, num_kv_heads=1, num_chunks=num_chunks, scaling=0.5)
    return found.output[0, 0]


def assert_all_is_found(bank: MemoryBank, documents: dict[str, range]) -> None:
    """Compare what is found for each token's own key, and what attention over all chunks reads, with the tokens."""
    last = max(tokens.stop for tokens in documents.values())
    keys, values = (part[0] for part in states(0, last))
    rows, _, _, _, sizes = bank.search(1, keys, 1)
    places = bank.locate(rows[0, :, 0])
    for name, tokens in documents.items():
        for token in tokens:
            place = places[token]
            assert place.document_id == name
            assert place.start <= token - tokens.start < place.stop <= len(tokens), (name, token)
            size = bank.chunk_size if sizes is None else int(sizes[0, token, 0])
            assert size == place.stop - place.start
        assert bank.info(name).num_resident_tokens == len(tokens)
    count = sum(map(len, documents.values()))
    assert bank.num_tokens == count
    # Every token is attended to once, and nothing else is.
    present = torch.cat([torch.arange(tokens.start, tokens.stop) for tokens in documents.values()])
    weights = torch.softmax(keys[0] @ keys[0, present].T * 0.5, dim=-1)
    torch.testing.assert_close(attended(bank, keys, bank.num_chunks + 2), weights @ values[0, present])


@pytest.mark.parametrize("how", ["at once", "one by one", "in pieces"])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("chunk_size", [1, 2, 4, 16])
def test_every_token_is_found_by_its_own_key(chunk_size, search, how):
    for length in range(1, 3 * chunk_size + 1) if chunk_size < 16 else (1, 15, 33, 48):
        bank = new_bank(chunk_size, search)
        middle = write(bank, "a", 0, cut(length, how))
        assert write(bank, "b", middle, [3]) == length + 3
        assert_all_is_found(bank, {"a": range(length), "b": range(length, length + 3)})
        whole = new_bank(chunk_size, search)
        write(whole, "a", 0, [length])
        write(whole, "b", middle, [3])
        place = {name: bank._table.ledger.documents[name].rows.values for name in "ab"}
        order = torch.cat([place["a"], place["b"]])
        assert torch.equal(
            bank.search_keys(1).view(1, bank.num_chunks, -1)[:, order], whole.search_keys(1).view(1, len(order), -1)
        )
        for one, other in zip(
            bank.gather(1, order[None], bank.generation),
            whole.gather(1, torch.arange(len(order))[None], whole.generation),
            strict=True,
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("search", SEARCHES)
def test_every_kind_of_index_finds_short_chunks_after_any_change(search, index, monkeypatch, tmp_path):
    monkeypatch.setattr(approximate, "EXACT_BELOW", 2)
    monkeypatch.setattr(approximate, "POINTS_PER_CENTROID", 1)
    bank = new_bank(4, search, index=index)
    stop = write(bank, "a", 0, [9])
    stop = write(bank, "b", stop, [3])
    stop = write(bank, "c", stop, [6])
    documents = {"a": range(9), "b": range(9, 12), "c": range(12, 18)}
    assert_all_is_found(bank, documents)  # builds the index
    bank.delete("b")
    del documents["b"]
    assert_all_is_found(bank, documents)
    bank.append("c", *states(18, 23), range(18, 23))
    documents["c"] = range(12, 23)
    assert_all_is_found(bank, documents)
    bank.save(tmp_path / "bank")
    for again in (MemoryBank.load(tmp_path / "bank"), MemoryBank.open(tmp_path / "bank")):
        again.append("c", *states(23, 24), range(23, 24))
        assert_all_is_found(again, documents | {"c": range(12, 24)})
        again.close()


@pytest.mark.parametrize("search", SEARCHES)
def test_a_folder_keeps_short_chunks_through_appends_and_compaction(search, tmp_path):
    bank = new_bank(4, search, folder=tmp_path / "bank")
    stop = 0
    for count in (1, 1, 3, 6, 2):
        write(bank, "a", stop, [count])
        stop += count
        bank.close()
        bank = MemoryBank.open(tmp_path / "bank")
        assert_all_is_found(bank, {"a": range(stop)})
    bank.folder.compact()
    assert bank.folder.num_dead_bytes == 0
    bank.folder.verify()
    assert_all_is_found(bank, {"a": range(stop)})
    with contextlib.suppress(KeyError), bank.transaction():
        write(bank, "a", stop, [2])
        raise KeyError
    assert_all_is_found(bank, {"a": range(stop)})
    bank.close()


@pytest.mark.parametrize("search", SEARCHES)
def test_shards_views_and_ages_leave_the_copies_out(search):
    banks = [new_bank(4, search, age_prior=prior) for prior in (None, "exp:a=0.7")]
    write(banks[0], "a", 0, [5])
    write(banks[1], "b", 5, [8])
    banks[1].add("c", *states(13, 15), dated=1e9)
    keys, values = (part[0] for part in states(0, 15))
    shards = BankShards(banks)
    assert shards.num_tokens == 15
    assert banks[1].select("c").num_tokens == 2
    for memory in (shards, BankShards([banks[0].select("a"), banks[1].select(["b", "c"])])):
        age = (banks[1].info("b").written_at - 1e9) / 86_400
        log_weights = torch.tensor([0.0] * 13 + [-0.7 * age] * 2)
        weights = torch.softmax(keys[0] @ keys[0].T * 0.5 + log_weights, dim=-1)
        torch.testing.assert_close(attended(memory, keys, 9), weights @ values[0])
    torch.testing.assert_close(
        attended(banks[1].select("c"), keys, 9)[13],
        (torch.softmax(keys[0, 13] @ keys[0, 13:].T * 0.5, 0) @ values[0, 13:]),
    )


def test_rows_that_were_found_are_still_good_when_their_chunk_is_filled_up():
    bank = new_bank(4, "token")
    write(bank, "a", 0, [6])
    found = bank.search(1, states(0, 6)[0][0], 2)
    generation, before = bank.generation, bank.gather(1, found.rows[:, 5], bank.generation)
    write(bank, "a", 6, [9])
    assert bank.generation == generation
    after = bank.gather(1, found.rows[:, 5], generation)
    for one, other in zip(before, after, strict=True):
        for slot, size in enumerate(found.sizes[0, 5].tolist()):
            assert torch.equal(one[:, slot, :size], other[:, slot, :size])


@pytest.mark.parametrize("in_folder", [False, True])
def test_eviction_forgets_documents_of_any_length(in_folder, tmp_path):
    options = {"folder": tmp_path / "bank"} if in_folder else {}
    bank = new_bank(4, "token", capacity_tokens=40, **options)
    with bank.transaction():
        for number in range(60):
            bank.add(
                f"note {number}",
                *states(0, 1 + number % 9),
                text="x" * 9,
                char_ends=range(1, 2 + number % 9),
                token_ids=range(1 + number % 9),
            )
    assert len(bank.documents()) <= 10
    assert "note 59" in bank
    assert bank.num_chunks == 10
    assert bank.num_evicted_tokens + bank.num_tokens == sum(1 + number % 9 for number in range(60))
    if in_folder:
        bank.close()
        with sqlite3.connect(tmp_path / "bank" / CATALOGUE) as connection:
            assert connection.execute("SELECT count(*) FROM documents").fetchone()[0] <= 10
            assert connection.execute("SELECT count(DISTINCT serial) FROM sources").fetchone()[0] <= 10
        connection.close()


def as_of_schema_3(folder, ends: dict[str, int]) -> None:
    """Rewrite a folder as the version before wrote it: last, shorter chunks stand beside the documents,
    which have a row for their use where nobody used them.
    """
    catalogue = Catalogue(folder, write=True)
    with catalogue.snapshot():
        content, documents, spans = (
            catalogue.read_content(),
            catalogue.read_table(DOCUMENTS),
            catalogue.read_table(SPANS),
        )
    with catalogue.transaction():
        for serial, text, _ in documents:
            catalogue.put(USAGE, (serial, 0, 0.0))
            said = json.loads(text)
            count = said["num_tokens"] % CHUNK_SIZE
            if not count:
                continue
            pairs = zip(
                *keys_and_values(torch.arange(ends[said["document_id"]] - count, ends[said["document_id"]])),
                strict=True,
            )
            tensors = {
                f"{n}.{side}": part
                for n, pair in enumerate(pairs)
                for side, part in zip(("keys", "values"), pair, strict=True)
            }
            catalogue.put(DOCUMENTS, (serial, text, save(tensors)))
            *_, last = [row for row in spans if row[0] == serial]
            catalogue.remove(SPANS, last[:2])
            if last[2] > 1:
                catalogue.put(SPANS, (*last[:2], last[2] - 1, *last[3:]))
        catalogue.describe(content)
    catalogue._connection.execute("PRAGMA user_version = 3")
    catalogue.close()


def version_of(folder) -> int:
    connection = sqlite3.connect(folder / CATALOGUE)
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    connection.close()
    return version


def test_a_folder_of_the_version_before_opens_with_all_its_tokens(tmp_path):
    bank = MemoryBank.create(tmp_path / "bank", **SETTINGS)
    write_ids(bank, "a", range(9))
    write_ids(bank, "b", range(20, 23), with_text=False)
    write_ids(bank, "c", range(40, 48))
    write_ids(bank, "a", range(9, 15))
    wanted = contents(bank)
    bank.close()
    as_of_schema_3(tmp_path / "bank", {"a": 15, "b": 23, "c": 48})
    files = {path: path.read_bytes() for path in (tmp_path / "bank").rglob("*") if path.is_file()}
    with MemoryBank.open(tmp_path / "bank", read_only=True) as read:
        assert contents(read) == wanted
    assert contents(MemoryBank.load(tmp_path / "bank")) == wanted
    assert {path: path.read_bytes() for path in files} == files, "who reads changes nothing"
    with MemoryBank.open(tmp_path / "bank") as bank:
        assert contents(bank) == wanted
    assert version_of(tmp_path / "bank") == SCHEMA_VERSION
    with MemoryBank.open(tmp_path / "bank") as bank:
        assert contents(bank) == wanted
        write_ids(bank, "a", range(15, 22))
        contents(bank)
        bank.folder.verify()


def test_a_full_bank_of_the_version_before_forgets_as_its_policy_says(tmp_path):
    bank = MemoryBank.create(tmp_path / "bank", **SETTINGS)
    for number in range(4):
        write_ids(bank, f"{number}", range(9 * number, 9 * number + 9))
    bank.close()
    as_of_schema_3(tmp_path / "bank", {f"{number}": 9 * number + 9 for number in range(4)})
    catalogue = Catalogue(tmp_path / "bank", write=True)
    with catalogue.snapshot():
        content = catalogue.read_content()
    with catalogue.transaction():
        content["settings"]["capacity_tokens"] = 32  # full of whole chunks
        catalogue.describe(content)
    catalogue._connection.execute("PRAGMA user_version = 3")
    catalogue.close()
    with MemoryBank.open(tmp_path / "bank") as bank:
        assert bank.num_chunks == 8
        assert [info.first_resident_token for info in bank.documents()] == [8, 8, 0, 0]
        contents(bank)
    with MemoryBank.open(tmp_path / "bank") as bank:
        contents(bank)
        bank.folder.verify()
