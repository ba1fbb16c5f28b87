"""Eviction policies: what goes when a bank is full, what never goes, and what goes with time."""

import time
from types import SimpleNamespace

import pytest
import torch

from longmem.memory import MemoryBank
from longmem.memory.eviction import EvictionPolicy, make_policy
from longmem.memory.rows import ledger
from longmem.plugins import PLUGINS, register

CHUNK, ROOM = 2, 6


def new_bank(**options) -> MemoryBank:
    return MemoryBank(memory_layers=[1], chunk_size=CHUNK, capacity_tokens=CHUNK * ROOM, **options)


def tokens(count: int, seed: int = 0):
    keys = torch.randn(1, count, 4, generator=torch.Generator().manual_seed(seed))
    return [keys], [keys]


def add(bank: MemoryBank, name: str, chunks: int, seed: int = 0) -> None:
    (bank.append if name in bank else bank.add)(name, *tokens(chunks * CHUNK, seed), range(chunks * CHUNK))


def resident(bank: MemoryBank) -> dict[str, int]:
    return {info.document_id: info.num_chunks for info in bank.documents()}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(ledger, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


def read(bank: MemoryBank, name: str) -> None:
    bank.select(name).search(1, torch.ones(1, 3, 4), 1)


@pytest.mark.parametrize("eviction", ["fifo", "lru", "ttl"])
def test_every_policy_keeps_the_capacity_and_the_newest(eviction):
    bank = new_bank(eviction=eviction)
    for number in range(20):
        add(bank, f"d{number % 7}", 1 + number % 3, seed=number)
        assert bank.num_chunks <= ROOM
        assert f"d{number % 7}" in bank
    assert bank.num_chunks == ROOM


def test_fifo_forgets_by_age_and_lru_by_last_read(clock):
    left = {}
    for eviction in ("fifo", "lru"):
        bank = new_bank(eviction=eviction)
        for name in "abc":
            add(bank, name, 2, seed=ord(name))
            clock.now += 10
        read(bank, "a")
        clock.now += 10
        add(bank, "d", 3)
        left[eviction] = resident(bank)
    assert left == {"fifo": {"b": 1, "c": 2, "d": 3}, "lru": {"a": 2, "c": 1, "d": 3}}


def test_a_document_goes_from_its_oldest_end(clock):
    bank = new_bank(eviction="lru")
    add(bank, "a", 2, seed=1)
    clock.now += 10
    add(bank, "b", 2, seed=2)
    clock.now += 10
    add(bank, "a", 2, seed=3)  # now b was used least recently, and a consists of two runs
    clock.now += 10
    read(bank, "b")
    add(bank, "c", 3, seed=4)
    infos = {info.document_id: info for info in bank.documents()}
    assert (infos["a"].num_chunks, infos["a"].first_resident_token) == (1, 3 * CHUNK)
    assert bank.token_ids("a").tolist() == [2, 3]


def test_pinned_documents_are_never_evicted():
    bank = new_bank()
    add(bank, "a", 2)
    bank.pin("a")
    for number in range(6):
        add(bank, f"d{number}", 2, seed=number)
    assert resident(bank) == {"a": 2, "d4": 2, "d5": 2}
    bank.pin("a", False)
    add(bank, "e", 2)
    assert "a" not in bank


def test_a_bank_full_of_pins_refuses_and_stays_as_it_was():
    bank = new_bank()
    add(bank, "a", 4)
    bank.pin("a")
    add(bank, "b", 2, seed=1)
    with pytest.warns(UserWarning, match="room for 2, so its first 2 tokens are dropped"):
        add(bank, "c", 3, seed=2)
    assert resident(bank) == {"a": 4, "c": 2}
    before = bank.documents(), bank.version
    with pytest.raises(ValueError, match=r"room for 12 tokens, and 8 are pinned, so 6 for 'a' do not fit.*unpin"):
        add(bank, "a", 3)
    bank.pin("c")
    with pytest.raises(ValueError, match="unpin or delete documents"):
        add(bank, "d", 1)
    bank.pin("c", False)
    assert (bank.documents()[0], resident(bank)) == (before[0][0], {"a": 4, "c": 2})


def test_time_to_live_ends_at_a_search_or_a_listing(clock):
    bank = new_bank(eviction="ttl:seconds=60")
    add(bank, "a", 1, seed=1)
    clock.now += 40
    add(bank, "a", 1, seed=2)
    add(bank, "b", 1, seed=3)
    bank.pin("b")
    clock.now += 30
    rows, scores, *_ = bank.search(1, torch.ones(1, 1, 4), 3)
    assert {place[:3] for place in bank.locate(rows) if place} == {("a", 2, 4), ("b", 0, 2)}
    clock.now += 1000
    assert resident(bank) == {"b": 1}
    bank.pin("b", False)
    assert bank.documents() == []


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("step", [-3600, -100, -1, 0, 3600])
def test_a_clock_that_is_set_does_not_keep_texts_alive(clock, step, in_folder, tmp_path):
    bank = new_bank(eviction="ttl:seconds=60")
    if in_folder:
        bank.save(tmp_path / "bank")
        bank = MemoryBank.open(tmp_path / "bank")
    add(bank, "before", 1, seed=1)
    add(bank, "goes on", 1, seed=2)
    clock.now += step
    assert ("before" in bank) == (step < 60)
    add(bank, "after", 1, seed=3)
    add(bank, "goes on", 1, seed=4)
    if in_folder:
        bank.close()
        bank = MemoryBank.open(tmp_path / "bank")
    clock.now += 59
    assert set(resident(bank)) == {"after", "goes on"} | ({"before"} if step <= 0 else set())
    clock.now += 1
    assert bank.search(1, torch.ones(1, 1, 4), 1).rows.item() == -1
    assert resident(bank) == {}
    if in_folder:
        bank.close()
        with MemoryBank.open(tmp_path / "bank", read_only=True) as again:
            assert again._table.ledger.num_rows == 0, "what a search has dropped is gone from the disk as well"


def test_a_clock_that_stays_set_back_ends_texts_in_time(clock):
    """Nothing is written after the clock was set back, so that only the clock itself tells that it was."""
    bank = new_bank(eviction="ttl:seconds=60")
    add(bank, "a", 1)
    clock.now -= 3600
    assert "a" in bank
    clock.now += 60
    assert "a" not in bank


def test_a_run_of_chunks_ends_where_the_clock_is_set_back(clock):
    bank = new_bank(eviction="ttl:seconds=60")
    add(bank, "a", 1, seed=1)
    clock.now -= 0.5
    add(bank, "a", 1, seed=2)
    clock.now += 60
    assert resident(bank) == {}


def test_reads_are_counted_for_each_query():
    bank = new_bank()
    add(bank, "a", 2, seed=1)
    add(bank, "b", 1, seed=2)
    assert [info.num_reads for info in bank.documents()] == [0, 0]
    began = time.time()
    bank.search(1, torch.ones(1, 5, 4), 8)  # five queries find all three chunks
    bank.select("b").search(1, torch.ones(1, 4, 4), 8)
    infos = bank.documents()
    assert [info.num_reads for info in infos] == [10, 9]
    assert all(info.last_read >= began for info in infos)


def test_a_budget_in_bytes_is_one_in_chunks():
    # float16 keys and values of two tokens, and a float32 search key: 2 * 2 * 4 * 2 + 4 * 4 bytes.
    bank = MemoryBank(memory_layers=[1], chunk_size=CHUNK, capacity_tokens=None, capacity_bytes=3 * 48 + 47)
    with pytest.warns(UserWarning, match="room for 3"):
        add(bank, "a", 5)
    assert (bank.num_chunks, bank.documents()[0].first_resident_token) == (3, 4)
    add(bank, "b", 2)
    assert resident(bank) == {"a": 1, "b": 2}


def test_a_policy_of_ones_own_is_one_class(new_names):
    @register("eviction", "largest")
    class LargestFirst(EvictionPolicy):
        """Forget the document that holds most."""

        def order(self, runs):
            return sorted(runs, key=lambda run: -len(run.document.rows))

    bank = new_bank(eviction="largest")
    add(bank, "a", 1)
    add(bank, "b", 4, seed=1)
    add(bank, "c", 2, seed=2)
    assert resident(bank) == {"a": 1, "b": 3, "c": 2}


@pytest.mark.parametrize(
    ("eviction", "message"),
    [
        ("lur", "`eviction` must be one of the known kinds, got 'lur'.*Did you mean `lru`"),
        ("ttl:second=3", "settings of 'ttl', got 'second'.*Did you mean `seconds`"),
        ("ttl:seconds=-3", "`seconds` of eviction 'ttl' must be a number from"),
        ("fifo:seconds=3", "no settings"),
        (7, "`eviction`"),
    ],
)
def test_unknown_policies_and_settings_are_refused(eviction, message):
    with pytest.raises(ValueError, match=message):
        make_policy(eviction)
    with pytest.raises(ValueError, match=message):
        new_bank(eviction=eviction)


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_document_that_expired_is_not_continued(clock, tmp_path, in_folder):
    folder = {"folder": tmp_path / "bank"} if in_folder else {}
    settings = {"memory_layers": [1], "chunk_size": 4, "eviction": "ttl:seconds=60"}
    bank = MemoryBank.create(**folder, **settings) if in_folder else MemoryBank(**settings)
    bank.add("gone", *tokens(8))
    bank.add("short", *tokens(3))
    bank.add("goes on", *tokens(9))
    clock.now += 30
    bank.append("goes on", *tokens(2))  # its last chunk, of one token, is written again
    clock.now += 30
    for name in ("gone", "short"):
        with pytest.raises(ValueError, match="deleted or evicted"):
            bank.append(name, *tokens(8))
    assert resident(bank) == {"goes on": 1}
    bank.append("goes on", *tokens(5))
    assert bank.search(1, torch.ones(1, 1, 4), 3).rows[0, 0, 2] == -1, "no row is left without an owner"
    assert resident(bank) == {"goes on": 2}
    bank.add("gone", *tokens(4))  # the name is free
    assert "gone" in bank
    clock.now += 60
    assert "gone" not in bank


def test_compact_removes_the_bytes_of_what_expired(clock, tmp_path):
    bank = MemoryBank.create(tmp_path / "bank", memory_layers=[1], chunk_size=4, eviction="ttl:seconds=60")
    bank.add("a", *tokens(4), range(4), text="secret words", char_ends=[3, 6, 9, 12])
    clock.now += 60
    bank.folder.compact()
    bank.close()
    files = [path for path in (tmp_path / "bank").rglob("*") if path.is_file()]
    assert not any(b"secret" in path.read_bytes() for path in files)


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize(
    "read",
    [
        lambda bank, _: bank.text("gone"),
        lambda bank, _: bank.token_ids("gone"),
        lambda bank, _: bank.info("gone"),
        lambda bank, _: bank.segments("gone"),
        lambda bank, _: bank.rename("gone", "there"),
        lambda bank, _: bank.copy().text("gone"),
        lambda bank, folder: bank.save(folder) or MemoryBank.load(folder).text("gone"),
    ],
)
def test_what_has_expired_is_given_to_nobody(read, in_folder, clock, tmp_path):
    folder = {"folder": tmp_path / "bank"} if in_folder else {}
    settings = {"memory_layers": [1], "chunk_size": 4, "eviction": "ttl:seconds=60"}
    bank = MemoryBank.create(**folder, **settings) if in_folder else MemoryBank(**settings)
    bank.add("gone", *tokens(4), range(4), text="secret words", char_ends=[3, 6, 9, 12])
    assert bank.text("gone") == "secret words"
    clock.now += 60
    with pytest.raises(ValueError, match="deleted or evicted"):
        read(bank, tmp_path / "copy")
    assert bank.is_empty
    bank.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"secret" in path.read_bytes() or "segment-" in path.name for path in files)


# What a policy of somebody else may do wrong, given the runs; none may cost a document.
WRONG = {
    "one twice": lambda runs: [run for run in runs for _ in range(2)],
    "too few": lambda runs: list(runs)[:0],
    "another's": lambda runs: [SimpleNamespace(document=run.document, num_chunks=1, order=0) for run in runs],
    "no list": lambda runs: None,
    "an error": lambda runs: (1 / 0 for _ in runs),
}


@pytest.mark.parametrize("when", ["order", "expired"])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_policy_that_fails_leaves_the_bank_as_it_was(wrong, on_disk, when, tmp_path, monkeypatch):
    class Faulty(EvictionPolicy):
        is_faulty = False

        def order(self, runs):
            return WRONG[wrong](runs) if self.is_faulty and when == "order" else runs

        def expired(self, runs, now):
            return WRONG[wrong](runs) if self.is_faulty and when == "expired" else ()

    monkeypatch.setitem(PLUGINS["eviction"], "faulty", Faulty)
    options = {"memory_layers": [1], "chunk_size": CHUNK, "capacity_tokens": CHUNK * ROOM, "eviction": "faulty"}
    bank = MemoryBank.create(tmp_path / "bank", **options) if on_disk else MemoryBank(**options)
    bank.add("a", *tokens(5), range(5))
    bank.add("b", *tokens(5, 1), range(5))
    before, version = bank.documents(), bank.version
    Faulty.is_faulty = True
    changes = [lambda: bank.append("a", *tokens(8, 2), range(8)), lambda: add(bank, "c", 4)]
    for change in changes if (wrong, when) != ("too few", "expired") else ():
        with pytest.raises((ValueError, TypeError, ZeroDivisionError)) as raised:
            change()
        assert wrong in ("no list", "an error") or "policy Faulty must offer the runs that it is given" in str(
            raised.value
        )
    Faulty.is_faulty = False
    assert bank.documents() == before
    assert bank.version == version or on_disk  # what is on disk was read again
    for change in changes:
        change()
    assert resident(bank) == {"a": 2, "c": 4}
    bank.close()


def test_what_is_being_continued_is_not_chosen_by_its_last_chunk():
    bank = new_bank()
    bank.add("a", *tokens(11), range(11))  # six chunks, the last of one token
    bank.append("a", *tokens(10, 1), range(20, 30))
    assert resident(bank) == {"a": ROOM}
    assert bank.token_ids("a").tolist() == [10, *range(20, 30)]


def test_counting_reads_costs_nothing_for_documents_that_are_gone():
    bank = new_bank()
    bank._table.ledger.next_serial = 2**50  # so many were added since the bank was made
    add(bank, "a", 2)
    read(bank, "a")
    assert bank.info("a").num_reads == 3
