"""The content clock: what was superseded or has expired is kept, and found by no search."""

import contextlib
import json
import sqlite3
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem.memory import BankShards, MemoryBank, visibility
from longmem.memory.folder.catalogue import CATALOGUE
from longmem.memory.index import approximate, exact

LAYER, HEADS, DIM = 5, 2, 6
QUERIES = torch.randn(HEADS, 3, DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(visibility, "time", SimpleNamespace(time=lambda: now.now))
    return now


def write(bank: MemoryBank, name: str, tokens: int = 12, **options) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    drawn = [[torch.randn(HEADS, tokens, DIM, generator=generator)] for _ in range(2)]
    (bank.append if name in bank else bank.add)(name, *drawn, **options)


def new_bank(*names: str, **options) -> MemoryBank:
    bank = MemoryBank(**{"memory_layers": [LAYER], "chunk_size": 2, "storage_dtype": "float32", **options})
    for name in names:
        write(bank, name)
    return bank


def found_in(memory, num_chunks: int = 500) -> set[str]:
    return {place.document_id for place in memory.locate(memory.search(LAYER, QUERIES, num_chunks).rows) if place}


def said(bank: MemoryBank, name: str):
    info = bank.info(name)
    return info.dated, info.valid_until, info.is_superseded, info.superseded_by


def test_a_superseded_document_is_kept_but_not_found_until_it_is_restored():
    bank = new_bank("old", "new", "other")
    version, generation = bank.version, bank.generation
    before = bank.search(LAYER, QUERIES, 18)
    bank.supersede("old", by="new")
    assert found_in(bank) == found_in(bank.select(["old", "new", "other"])) == {"new", "other"}
    assert found_in(BankShards([bank, new_bank("x")])) == {"new", "other", "x"}
    assert found_in(bank.select("old")) == set()
    assert bank.version != version
    assert bank.generation == generation  # rows found before are still good
    assert (bank.num_chunks, "old" in bank, said(bank, "old")) == (18, True, (None, None, True, "new"))
    bank.restore("old")
    assert said(bank, "old") == (None, None, False, None)
    torch.testing.assert_close(bank.search(LAYER, QUERIES, 18), before, rtol=0, atol=0)
    bank.supersede("old")  # withdrawn, without a successor
    assert said(bank, "old") == (None, None, True, None)
    assert found_in(bank) == {"new", "other"}


@pytest.mark.parametrize("index", ["flat", "exact", "auto", "ivf", "hnsw", "pq:dims_per_code=1,bits=4"])
def test_a_search_finds_as_many_chunks_as_were_asked_for(index, monkeypatch):
    monkeypatch.setattr(approximate, "EXACT_BELOW", 20)
    monkeypatch.setattr(approximate, "POINTS_PER_CENTROID", 4)
    names = [f"text {number}" for number in range(20)]
    bank = new_bank(*names, index=index)
    assert found_in(bank) == set(names)
    for name in names[:10]:
        bank.supersede(name)
    alone = new_bank(*names[10:], index="exact")
    rows, scores, *_ = bank.search(LAYER, QUERIES, 25)
    assert (rows >= 0).all()
    assert found_in(bank) == set(names[10:])
    best = alone.search(LAYER, QUERIES, 25).scores
    assert torch.isclose(scores[..., 0], best[..., 0]).double().mean() >= 0.5  # approximate kinds may miss some
    if index in ("flat", "exact"):
        torch.testing.assert_close(scores, best)


@pytest.mark.parametrize("num_hidden", [1, 3])
@pytest.mark.parametrize("few", [0, 32])
@pytest.mark.parametrize("prior", [None, "exp:a=1"])
def test_what_is_hidden_is_left_out_of_all_rows_or_of_a_copy(num_hidden, few, prior, monkeypatch):
    """Few of many rows or many, few queries or many: all ways find what a bank without the hidden documents finds."""
    monkeypatch.setattr(exact, "FEW_QUERIES", few)
    names = [f"text {number}" for number in range(5)]
    bank, alone = (MemoryBank(memory_layers=[LAYER], chunk_size=2, index="flat", age_prior=prior) for _ in range(2))
    for day, name in enumerate(names):
        for each in (bank, alone) if day >= num_hidden else (bank,):
            write(each, name, dated=86_400 * day)
    for name in names[:num_hidden]:
        bank.supersede(name)
    found, expected = bank.search(LAYER, QUERIES, 9, scaling=0.5), alone.search(LAYER, QUERIES, 9, scaling=0.5)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert bank.locate(found.rows) == alone.locate(expected.rows)
    not_numbers = bank.locate(bank.search(LAYER, torch.full_like(QUERIES, torch.nan), 9).rows)
    assert not {place.document_id for place in not_numbers if place} & set(names[:num_hidden])


def test_a_successor_is_followed_when_renamed_and_forgotten_when_deleted():
    bank = new_bank("old", "new")
    bank.supersede("old", by="new")
    bank.rename("new", "newer")
    assert said(bank, "old")[3] == "newer"
    bank.rename("old", "oldest")
    bank.delete("newer")
    assert said(bank, "oldest") == (None, None, True, None)
    assert found_in(bank) == set()
    bank.restore("oldest")
    assert found_in(bank) == {"oldest"}


@pytest.mark.parametrize("how", ["delete", "evict", "expire", "clear others"])
def test_a_name_that_is_forgotten_is_left_nowhere(how, tmp_path, monkeypatch):
    eviction = "ttl:seconds=60" if how == "expire" else "fifo"
    bank = MemoryBank.create(
        tmp_path, memory_layers=[LAYER], chunk_size=2, capacity_tokens=24, eviction=eviction, age_prior=None
    )
    write(bank, "the secret", 5)
    write(bank, "old", 4)
    bank.supersede("old", by="the secret")
    bank.pin("old")
    if how == "evict":
        write(bank, "new", 20)
    elif how == "expire":
        monkeypatch.setattr("longmem.memory.rows.ledger.time", SimpleNamespace(time=lambda: time.time() + 60))
        assert "the secret" not in bank
    else:
        bank.delete("the secret")
    assert said(bank, "old")[2:] == (True, None)
    bank.folder.compact()
    bank.close()
    with MemoryBank.open(tmp_path) as again:
        assert said(again, "old")[2:] == (True, None)
    assert not any(b"the secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_who_supersedes_whom_makes_no_circle():
    bank = new_bank("a", "b", "c")
    bank.supersede("a", by="b")
    bank.supersede("b", by="c")
    with pytest.raises(ValueError, match="`by` must be another document, which 'c' has not superseded itself, got 'a'"):
        bank.supersede("c", by="a")
    with pytest.raises(ValueError, match="`by` must be another document"):
        bank.supersede("c", by="c")
    with pytest.raises(ValueError, match="`by` must name a document of the bank, got 'd'"):
        bank.supersede("c", by="d")
    with pytest.raises(ValueError, match="`document_id` must name a document"):
        bank.restore("d")
    assert found_in(bank) == {"c"}


def test_a_search_hides_what_has_expired_when_it_runs(clock):
    bank = new_bank("forever")
    write(bank, "short", valid_until=1010)
    write(bank, "long", dated=900, valid_until=1020)
    view, version = bank.select(["short", "long"]), bank.version
    assert found_in(bank) == {"forever", "short", "long"}
    clock.now = 1009.9
    assert found_in(view) == {"short", "long"}
    assert bank.version == version
    clock.now = 1010
    assert found_in(view) == {"long"}
    assert bank.version != version  # who keeps what was read before hears of it
    assert found_in(bank) == {"forever", "long"}
    clock.now = 2000
    assert found_in(bank) == {"forever"}
    assert said(bank, "long") == (900, 1020, False, None)
    bank.restore("long")
    assert said(bank, "long") == (900, None, False, None)
    assert found_in(bank) == {"forever", "long"}


def test_expire_sets_the_moment_that_a_bank_is_read_at(clock):
    bank = new_bank("forever")
    write(bank, "short", valid_until=1010)
    write(bank, "long", valid_until=1020)
    assert bank.expire(1015) == ["short"]
    assert found_in(bank) == {"forever", "long"}
    clock.now = 5000  # time no longer counts
    assert found_in(bank) == {"forever", "long"}
    bank.supersede("forever")
    bank.restore("forever")  # changes of the bank do not move it
    assert bank.expire(1000) == []
    assert found_in(bank) == {"forever", "short", "long"}
    assert bank.expire() == ["short", "long"]
    assert found_in(bank) == {"forever"}
    with pytest.raises(ValueError, match="`now` must be a number of seconds since 1970"):
        bank.expire("today")


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        ({"dated": "2020-01-01"}, "`dated` must be a number of seconds"),
        ({"valid_until": float("nan")}, "`valid_until` must be a number of seconds"),
        ({"dated": True}, "`dated` must be a number"),
        ({"dated": 1.7e12}, "got 1700000000000.0; .* milliseconds"),
        ({"dated": 5, "valid_until": 5}, "`valid_until` must be later than `dated`, got 5.0 and 5.0"),
    ],
)
def test_wrong_dates_are_refused_and_nothing_is_written(dates, message):
    bank = new_bank("a")
    with pytest.raises(ValueError, match=message):
        write(bank, "b", **dates)
    assert "b" not in bank


def fill(bank: MemoryBank) -> None:
    for name in ("old", "gone", "new"):
        write(bank, name)
    write(bank, "dated", dated=7, valid_until=4e9)
    write(bank, "expired", dated=5.5, valid_until=6)
    bank.supersede("old", by="new")
    bank.supersede("gone")
    bank.rename("new", "newest")


FILLED = {
    "old": (None, None, True, "newest"),
    "gone": (None, None, True, None),
    "newest": (None, None, False, None),
    "dated": (7.0, 4e9, False, None),
    "expired": (5.5, 6.0, False, None),
}


def test_banks_on_disk_keep_what_was_said(tmp_path):
    memory = new_bank()
    fill(memory)
    memory.save(tmp_path / "saved")
    with MemoryBank.create(tmp_path / "made", memory_layers=[LAYER], chunk_size=2) as made:
        fill(made)
    loaded = MemoryBank.load(tmp_path / "saved")
    with MemoryBank.open(tmp_path / "saved") as saved, MemoryBank.open(tmp_path / "made") as made:
        for bank in (memory, loaded, saved, made):
            assert {name: said(bank, name) for name in FILLED} == FILLED
            assert found_in(bank) == {"newest", "dated"}
        made.compact()
        assert found_in(made) == {"newest", "dated"}
        made.restore("old")
    with MemoryBank.open(tmp_path / "made", read_only=True) as made:
        assert found_in(made) == {"newest", "dated", "old"}
        with pytest.raises(ValueError, match="read_only"):
            made.supersede("old")
        assert found_in(made) == {"newest", "dated", "old"}


def test_a_failed_transaction_hides_nothing(tmp_path):
    with MemoryBank.create(tmp_path, memory_layers=[LAYER], chunk_size=2) as bank:
        write(bank, "a")
        with contextlib.suppress(RuntimeError), bank.transaction():
            bank.supersede("a")
            assert found_in(bank) == set()
            raise RuntimeError
        assert found_in(bank) == {"a"}


def test_banks_of_before_open_and_those_without_dates_look_like_them(tmp_path):
    """What a bank without dates holds of a document has none of the fields, as in banks of versions that knew none."""
    with MemoryBank.create(tmp_path, memory_layers=[LAYER], chunk_size=2) as bank:
        write(bank, "plain")
        write(bank, "dated", dated=3)
    connection = sqlite3.connect(tmp_path / CATALOGUE)
    rows = [json.loads(text) for (text,) in connection.execute("SELECT content FROM documents ORDER BY serial")]
    settings_of_bank = json.loads(connection.execute("SELECT content FROM bank").fetchone()[0])["content"]["settings"]
    connection.close()
    fields = {"document_id", "num_tokens", "tags", "is_pinned", "segments", "written_at", "has_source"}
    assert rows[0].keys() & fields == fields
    assert not rows[0].keys() & {"dated", "valid_until", "is_superseded", "superseded_by"}
    assert rows[1]["dated"] == 3
    assert "age_prior" not in settings_of_bank
    with MemoryBank.open(tmp_path) as bank:
        assert (said(bank, "plain"), bank.age_prior) == ((None, None, False, None), None)


def test_eviction_and_updates_keep_the_books(tmp_path):
    bank = new_bank("a", "b", capacity_tokens=24)
    bank.supersede("a", by="b")
    write(bank, "c")  # in place of a
    assert "a" not in bank
    assert found_in(bank) == {"b", "c"}
    draft = new_bank("b")
    bank.supersede("b", by="c")
    bank._table.replace(bank._document("_", "b"), draft._table, draft._document("_", "b"))
    assert said(bank, "b") == (None, None, True, "c")
    assert found_in(bank) == {"c"}
    bank.clear()
    write(bank, "b")
    assert found_in(bank) == {"b"}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["add", "delete", "supersede", "restore", "append", "rename", "search"]),
            st.integers(0, 5),
            st.integers(0, 5),
        ),
        max_size=25,
    )
)
def test_searches_find_just_what_a_naive_model_says(steps):
    bank, hidden = new_bank(capacity_tokens=48), dict[str, bool]()
    for kind, first, second in steps:
        name, other = f"n{first}", f"n{second}"
        hidden = {each.document_id: hidden[each.document_id] for each in bank.documents()}  # without what was evicted
        if kind == "add" and name not in hidden:
            write(bank, name, 4 + 2 * second)
            hidden[name] = False
        elif kind == "rename" and name in hidden and other not in hidden:
            bank.rename(name, other)
            hidden[other] = hidden.pop(name)
        elif kind != "add" and kind != "rename" and name in hidden:
            if kind == "delete":
                bank.delete(name)
                del hidden[name]
            elif kind == "append":
                write(bank, name, 3)
            elif kind in ("supersede", "restore"):
                getattr(bank, kind)(name)
                hidden[name] = kind == "supersede"
        visible = {each.document_id for each in bank.documents() if each.num_chunks and not hidden[each.document_id]}
        assert found_in(bank) == visible


@pytest.mark.parametrize("moment", [0, 0.0, -1.0, 1.0])
@pytest.mark.parametrize("how", ["open", "load", "copy"])
def test_a_date_of_any_moment_is_kept(moment, how, tmp_path):
    bank = (
        new_bank(refresh="frozen")
        if how == "copy"
        else MemoryBank.create(tmp_path / "bank", memory_layers=[LAYER], chunk_size=2)
    )
    write(bank, "dated", dated=moment)
    write(bank, "gone", valid_until=moment)
    before = [said(bank, name) for name in ("dated", "gone")]
    bank.close()
    again = bank.copy() if how == "copy" else getattr(MemoryBank, how)(tmp_path / "bank")
    assert [said(again, name) for name in ("dated", "gone")] == before
    assert found_in(again) == {"dated"}
    again.close()
