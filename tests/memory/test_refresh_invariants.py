"""Invariants of refreshing, on any sequence of writes, encoder changes, evictions and reads (issue 7: I1 to I5, I8)."""

import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_encoder import CHUNK, DIM, HEADS, LAYERS, FakeModel, make_bank, read_all, stored, write
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from longmem import MemoryBank, StaleMemoryError
from longmem.errors import ChangedMemoryError
from longmem.memory.index import approximate
from longmem.memory.rows.storage import STORAGE_DTYPES

NAMES = st.sampled_from("de")
# For each policy, how many encoder changes back what is read may have been written.
BOUNDS = {
    "eager": 0,
    "eager:every=2": 1,
    "lazy": 0,
    "lazy:sweep_tokens=5,budget_tokens=7": 0,
    "bounded:max_lag=0": 0,
    "bounded:max_lag=1,on_violation=mask": 1,
    "bounded:max_lag=2,budget_tokens=6": 2,
}


class RefreshMachine(RuleBasedStateMachine):
    """Keep for each document the segments that were written, and compare each number that is read with its encoders'."""

    @initialize(refresh=st.sampled_from(sorted(BOUNDS)), capacity=st.sampled_from([None, 8, 24]))
    def start(self, refresh, capacity):
        self.model = FakeModel("a")
        self.bank = make_bank(self.model, refresh=refresh, capacity_tokens=capacity)
        self.history = ["a"]  # encoders as the bank met them
        self.documents: dict[str, list[list[int]]] = {}
        self.next_id, self.models = 0, {"a": self.model}
        self.forwarded = 0  # for refreshes
        self.counted = 0  # in ledgers of banks that were saved since

    @precondition(lambda self: hasattr(self, "bank"))
    @rule(name=NAMES, count=st.integers(1, 11), joins=st.sampled_from(["new", "new", "same", None]))
    def write(self, name, count, joins):
        ids = list(range(self.next_id, self.next_id + count))
        self.next_id += count
        self.open()
        if name not in self.bank:
            self.documents[name] = []
            joins = None if joins is None else "new"
        segments = self.documents[name]
        last = self.bank.segments(name)[-1] if segments else None
        if joins == "same" and (last is None or not last.is_known):
            joins = "new"
        if joins == "same":
            whole = segments[-1] + ids
            made = self.model.numbers(tuple(whole))[:, :, :, -count:]
            segments[-1] = whole
        else:
            made = self.model.numbers(tuple(ids))
            segments.append(ids)
        put = self.bank.append if len(segments) > 1 or name in self.bank else self.bank.add
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            put(name, [layer[0] for layer in made], [layer[1] for layer in made], ids, segment=joins)
        self.documents = {each: kept for each, kept in self.documents.items() if each in self.bank}

    @precondition(lambda self: getattr(self, "documents", None))
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.documents)))
        self.bank.delete(name)
        del self.documents[name]

    @precondition(lambda self: hasattr(self, "bank"))
    @rule(name=st.sampled_from("abc"))
    def change_encoder(self, name):
        self.model = self.models.setdefault(name, FakeModel(name))
        self.open()

    @precondition(lambda self: hasattr(self, "bank"))
    @rule(budget=st.sampled_from([None, 5, 12]), how=st.sampled_from(["reencode", "sweep"]))
    def refresh(self, budget, how):
        self.count(lambda: getattr(self.bank, how)(self.model, budget_tokens=budget))

    @precondition(lambda self: hasattr(self, "bank"))
    @rule(refresh=st.sampled_from(sorted(BOUNDS)))
    def use_refresh(self, refresh):
        self.bank.freshness.use(refresh)
        self.open()

    @precondition(lambda self: hasattr(self, "bank"))
    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.bank.save(folder)
            self.counted += self.bank.freshness.refreshed.tokens + self.bank.freshness.refreshed.probed_tokens
            self.bank = MemoryBank.load(folder)
        self.open()

    def count(self, call):
        before = sum(model.num_encoded for model in self.models.values())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = call()
        self.forwarded += sum(model.num_encoded for model in self.models.values()) - before
        return result

    def open(self):
        if self.model.fingerprint != self.history[-1]:
            self.history.append(self.model.fingerprint)
        self.count(lambda: self.bank.ready_for(self.model))

    @invariant()
    def ledger_equals_tokens_forwarded(self):
        if hasattr(self, "bank"):
            assert (
                self.counted + self.bank.freshness.refreshed.tokens + self.bank.freshness.refreshed.probed_tokens
                == self.forwarded
            )

    @invariant()
    def no_read_is_beyond_the_bound(self):
        if not hasattr(self, "bank"):
            return
        with torch.no_grad():
            places = self.count(lambda: read_all(self.bank))
        allowed = self.history[-1 - BOUNDS[self.bank.refresh] :]
        self.check({(place.document_id, place.start) for place in places}, allowed)

    @invariant()
    def numbers_tokens_and_versions_agree(self):
        """Every chunk holds what some encoder made of its tokens; one that is called fresh, what the current one makes."""
        if not hasattr(self, "bank") or not self.bank.num_chunks:
            return
        rows = torch.arange(self.bank.num_chunks)
        fresh = self.bank.freshness.lags().is_fresh[self.bank._table.ledger.versions[0]] & (
            self.bank._table.ledger.versions[1] < 0
        )
        places = [(place.document_id, place.start) for place in self.bank.locate(rows)]
        assert len(set(places)) == len(places)
        self.check(set(places), "abc")
        self.check(
            {place for place, is_fresh in zip(places, fresh.tolist(), strict=True) if is_fresh}, self.history[-1:]
        )
        keys, _ = self.bank.gather(LAYERS[0], rows.expand(HEADS, -1), self.bank.generation)
        sizes = [place.stop - place.start for place in self.bank.locate(rows)]
        means = torch.stack([keys[:, row, :size].mean(dim=1) for row, size in enumerate(sizes)], dim=1)
        torch.testing.assert_close(self.bank.search_keys(LAYERS[0]), means)

    def check(self, places, encoders):
        for name in {name for name, _ in places}:
            ids = [token for segment in self.documents[name] for token in segment]
            resident = self.bank.info(name)
            assert self.bank.token_ids(name).tolist() == ids[resident.first_resident_token :]
            held = stored(self.bank, name)
            made = [
                torch.cat([self.models_of(each).numbers(tuple(s)) for s in self.documents[name]], dim=3)
                for each in encoders
            ]
            for start in (start for each, start in places if each == name):
                for token in range(start, min(start + CHUNK, resident.num_tokens)):
                    got = held[:, :, :, token - resident.first_resident_token]
                    assert any(torch.equal(got, each[:, :, :, token]) for each in made), (name, token)

    def models_of(self, name):
        return self.models.get(name) or FakeModel(name)


TestAnySequence = RefreshMachine.TestCase
TestAnySequence.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


class LongRefreshMachine(RefreshMachine):
    """The same, more of it."""


TestManySequences = pytest.mark.slow(LongRefreshMachine.TestCase)
TestManySequences.settings = settings(
    max_examples=1500, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_budget_does_not_part_segments_that_share_a_chunk():
    """Found by the long machine: the first of the two alone writes no chunk, and all of the document would be called fresh."""
    old, new = FakeModel("a"), FakeModel("b")
    bank = make_bank(old, refresh="bounded:max_lag=0,budget_tokens=6")
    write(bank, old, "d", [0])
    write(bank, old, "d", [1, 2, 3, 4, 5, 6])
    bank.ready_for(new)
    assert bank.freshness.refreshed.tokens == 7  # one group at least, though it is larger than the budget
    wanted = torch.cat([new.numbers((0,)), new.numbers((1, 2, 3, 4, 5, 6))], dim=3)
    assert torch.equal(stored(bank, "d"), wanted)


@pytest.mark.parametrize("before", [True, False])
def test_a_chunk_that_reaches_over_to_what_cannot_be_encoded_again_is_never_called_fresh(before):
    """Found by the long machine: the other part is of the current encoder, and so the chunk looked as if all of it were."""
    old, new = FakeModel("a"), FakeModel("b")
    bank = make_bank(old, refresh="lazy")
    if before:
        write(bank, old, "d", [0])
        bank.ready_for(new)
        write(bank, new, "d", [1, 2, 3, 4, 5, 6, 7], segment=None)
    else:
        bank = make_bank(old, refresh="lazy")
        write(bank, old, "d", [0, 1, 2, 3, 4, 5, 6])
        bank.ready_for(new)
        write(bank, new, "d", [7], segment=None)
    bank.freshness.reencode(new)
    assert [place.start for place in read_all(bank)] == ([4] if before else [0])


# Equalities.


def odd_bank(model, refresh="frozen", **options):
    """Return a bank with segments of all lengths, whole documents in a chunk, short last chunks, and an evicted beginning."""
    bank = make_bank(model, refresh=refresh, **options)
    start = 0
    for name, lengths in {"old": [9, 8], "d": [8, 13, 1, 2, 7], "short": [3], "e": [16], "f": [5, 4, 4]}.items():
        for length in lengths:
            write(bank, model, name, list(range(start, start + length)))
            start += length
    return bank


def everything(bank):
    """Return all numbers, by document."""
    found = {}
    for document in bank.documents():
        name = document.document_id
        rows = bank._table.ledger.documents[name].rows.values
        found[name] = [stored(bank, name)] + [bank.search_keys(layer)[:, rows] for layer in LAYERS]
    return found


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert len(one[name]) == len(other[name])
        assert all(torch.equal(*pair) for pair in zip(one[name], other[name], strict=True)), name


STORAGE = sorted(STORAGE_DTYPES)


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("storage_dtype", STORAGE)
def test_what_is_encoded_again_equals_what_is_written_fresh(storage_dtype, in_folder, tmp_path):
    options = {"storage_dtype": storage_dtype}
    fresh = odd_bank(FakeModel("b"), **options)
    bank = odd_bank(FakeModel("a"), refresh="eager", **options)
    if in_folder:
        bank.save(tmp_path / "bank")
        bank = MemoryBank.open(tmp_path / "bank")
    before = everything(bank)
    bank.ready_for(FakeModel("b"))
    assert_equal(everything(bank), everything(fresh))
    assert any(not torch.equal(*pair) for pair in zip(before["d"], everything(bank)["d"], strict=True))
    if in_folder:
        bank.folder.verify()
        bank.close()
        bank = MemoryBank.open(tmp_path / "bank", FakeModel("b"))
        assert_equal(everything(bank), everything(fresh))
        assert bank.freshness.refreshed.tokens == 0
        bank.close()


def test_of_a_partly_evicted_document_whole_segments_are_encoded_again():
    """Of 30 tokens in chunks of four 22 stay; the segment that has lost its beginning is not read any longer."""
    banks = [make_bank(FakeModel(name), refresh="eager", capacity_tokens=24) for name in "ab"]
    for bank, name in zip(banks, "ab", strict=True):
        for start, stop in ((0, 10), (10, 16), (16, 24), (24, 30)):
            write(bank, FakeModel(name), "d", list(range(start, stop)))
    old, fresh = banks
    assert old.info("d").first_resident_token == 8
    with pytest.warns(UserWarning, match="2 tokens in the bank"):
        old.ready_for(FakeModel("b"))
    assert sorted(place.start for place in read_all(old)) == [12, 16, 20, 24, 28]
    assert torch.equal(stored(old, "d")[..., CHUNK:, :], stored(fresh, "d")[..., CHUNK:, :])


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_bound_of_zero_is_eager_bit_for_bit(in_folder, tmp_path):
    found = []
    for refresh in ("eager", "bounded:max_lag=0", "bounded:max_lag=0,clock=gap", "bounded:max_lag=0,clock=probe"):
        bank = odd_bank(FakeModel("a"), refresh=refresh)
        if in_folder:
            bank.save(tmp_path / refresh)
            bank = MemoryBank.open(tmp_path / refresh)
        for name in ("bb", "a", "ccc"):
            bank.ready_for(FakeModel(name))
        found.append((everything(bank), bank.freshness.refreshed.tokens, bank.documents(), bank.segments("d")))
        bank.close()
    for numbers, *rest in found[1:]:
        assert_equal(numbers, found[0][0])
        assert rest == list(found[0][1:])


def test_a_segment_that_does_not_come_out_finite_keeps_its_old_numbers():
    bank, other = odd_bank(FakeModel("a"), refresh="lazy"), FakeModel("b")
    ids = tuple(bank.token_ids("e").tolist())
    other.broken = {ids}
    before = stored(bank, "e")
    report = bank.freshness.reencode(other)
    assert report.failed == 1
    assert report.tokens == other.num_encoded
    assert torch.equal(stored(bank, "e"), before)
    assert bank.segments("e")[0].version == 0
    assert not any(place.document_id == "e" for place in read_all(bank))
    other.broken.clear()
    assert bank.freshness.reencode(other).tokens == len(ids)
    assert_equal(everything(bank), everything(odd_bank(FakeModel("b"))))


def test_numbers_too_large_for_the_storage_are_not_written():
    class Large(FakeModel):
        def numbers(self, ids):
            return super().numbers(ids) * 1e6

    bank = odd_bank(FakeModel("a"), refresh="eager", storage_dtype="float16")
    bank.ready_for(Large("b"))
    assert bank.freshness.refreshed.failed
    assert not read_all(bank)
    assert all(torch.isfinite(each).all() for each in everything(bank)["d"])


def test_two_encoders_in_turn_and_a_segment_that_both_have_written():
    """Back at the first encoder, what it wrote is fresh, and what the other one has added to its segment is not."""
    model, other = FakeModel("a"), FakeModel("b")
    bank = make_bank(model, refresh="bounded:max_lag=5")
    write(bank, model, "pure", list(range(50, 58)))
    write(bank, model, "d", list(range(6)))
    bank.ready_for(other)
    made = other.numbers(tuple(range(12)))[:, :, :, 6:]
    bank.append("d", [each[0] for each in made], [each[1] for each in made], list(range(6, 12)), segment="same")
    write(bank, other, "border", list(range(70, 75)))
    bank.freshness.use("bounded:max_lag=0,on_violation=mask")
    bank.ready_for(model)
    write(bank, model, "border", list(range(75, 80)))
    # Of "d" the first chunk is still what the first encoder wrote, and of "border" the last what it has written since.
    readable = [("border", 8), ("d", 0), ("pure", 0), ("pure", 4)]
    assert sorted((place.document_id, place.start) for place in read_all(bank)) == readable
    assert bank.freshness.reencode(model).tokens == 12 + 10
    assert len(read_all(bank)) == bank.num_chunks


@pytest.mark.parametrize("index", ["flat", "exact", "ivf:probed_share=0.3", "hnsw", "pq"])
def test_every_index_finds_what_was_encoded_again(index, monkeypatch):
    """After a change of all keys an index finds as much as one that was built for the new keys."""
    monkeypatch.setattr(approximate, "EXACT_BELOW", 3)

    class Shifted(FakeModel):
        """Keys around another mean and of another size: clusters and codes of "a" are no use for them."""

        def numbers(self, ids):
            return super().numbers(ids) * 0.3 + 3 if self.fingerprint == "b" else super().numbers(ids)

    banks = [make_bank(Shifted(name), index=index, refresh="eager") for name in "ab"]
    queries = torch.randn(HEADS, 40, DIM)
    for bank, name in zip(banks, "ab", strict=True):
        for number in range(30):
            write(bank, Shifted(name), f"{number}", list(range(40 * number, 40 * number + 40)))
        bank.search(LAYERS[0], queries, 8)  # builds the index
    changed, fresh = banks
    changed.ready_for(Shifted("b"))
    exact = make_bank(Shifted("b"))
    for number in range(30):
        write(exact, Shifted("b"), f"{number}", list(range(40 * number, 40 * number + 40)))
    wanted = [set(exact.locate(rows)) for rows in exact.search(LAYERS[0], queries, 8).rows.flatten(0, 1)]

    def recall(bank):
        found = [set(bank.locate(rows)) for rows in bank.search(LAYERS[0], queries, 8).rows.flatten(0, 1)]
        return sum(len(a & b) for a, b in zip(found, wanted, strict=True)) / sum(map(len, wanted))

    assert recall(changed) >= recall(fresh) - 0.02
    assert recall(changed) > 0.5
    rows, scores, *_ = changed.search(LAYERS[0], queries, 1)
    keys = changed.search_keys(LAYERS[0])
    found = torch.stack([head[row[:, 0]] for head, row in zip(keys, rows, strict=True)])
    torch.testing.assert_close(scores[..., 0], (queries * found).sum(-1), rtol=1e-3, atol=1e-2)


# Readers beside a refresh.


@pytest.fixture
def switching():
    """Let threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_reader_sees_a_segment_wholly_old_or_wholly_new(in_folder, tmp_path):
    """One thread reads while another encodes again, with encoders in turn; whatever it reads is one encoder's."""
    models = [FakeModel(name) for name in "ab"]
    length, count = 24, 3
    bank = make_bank(models[0], refresh="bounded:max_lag=1000")
    for number in range(count):
        write(bank, models[0], str(number), list(range(length * number, length * (number + 1))))
    if in_folder:
        bank.save(tmp_path / "bank")
        bank = MemoryBank.open(tmp_path / "bank")
    rows = {name: bank._table.ledger.documents[name].rows.values.clone() for name in map(str, range(count))}
    wanted = {
        name: [model.numbers(tuple(range(length * int(name), length * (int(name) + 1)))) for model in models]
        for name in rows
    }
    errors, seen, stop = [], {name: set() for name in rows}, threading.Event()

    def read():
        try:
            while not stop.is_set():
                bank.search(LAYERS[0], torch.ones(HEADS, 2, DIM), 5)
                for name, which in rows.items():
                    try:
                        keys, values = bank.gather(LAYERS[0], which.expand(HEADS, -1), bank.generation)
                    except ChangedMemoryError:  # encoded again since it was asked for its generation
                        continue
                    got = torch.stack([keys, values]).flatten(2, 3)
                    same = [torch.equal(got, each[0]) for each in wanted[name]]
                    assert any(same), name
                    seen[name].add(same.index(True))
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    rounds = 0
    while reader.is_alive() and rounds < 200 and (rounds < 6 or not all(len(each) == 2 for each in seen.values())):
        bank.freshness.reencode(models[1 - rounds % 2])
        rounds += 1
    stop.set()
    reader.join()
    bank.close()
    assert not errors, errors
    assert all(len(each) == 2 for each in seen.values()), "the reader saw both"


@pytest.mark.filterwarnings("ignore:`budget_tokens=24`", "ignore:.* tokens in the bank were written by an earlier")
@pytest.mark.parametrize(
    "refresh", ["bounded:max_lag=4", "bounded:max_lag=4,budget_tokens=24", "lazy:sweep_tokens=30", "eager:every=3"]
)
def test_encoders_come_in_one_thread_while_others_ask_what_is_readable(refresh, switching):
    """What is known of the encoders is of one moment, also where nobody waits: each thread gets to its end."""
    bank = make_bank(FakeModel("a"), refresh=refresh)
    for number in range(8):
        write(bank, FakeModel("a"), f"d{number}", list(range(24)))

    def publish(name: str) -> None:
        for number in range(20):
            model = FakeModel(f"{name}{number}")
            bank.ready_for(model)
            if number % 8 == 0:
                bank.freshness.write_as(model)
                write(bank, model, f"{name}{number}", list(range(24)))

    def ask() -> None:
        for _ in range(30):
            bank.freshness.mask()
            bank.freshness.report()

    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(publish, "x"), threads.submit(publish, "y"), threads.submit(ask)]:
            done.result()
    assert len(bank.encoders.versions) > 20


def test_what_is_continued_while_it_is_encoded_again_is_left_for_the_next_time():
    model, other = FakeModel("a"), FakeModel("b")
    bank = make_bank(model, refresh="lazy")
    write(bank, model, "d", list(range(8)))
    encode = other.encode

    def while_encoding(ids):
        other.encode = encode
        made = model.numbers(tuple(range(12)))[:, :, :, 8:]
        bank.append("d", [each[0] for each in made], [each[1] for each in made], list(range(8, 12)), segment="same")
        return encode(ids)

    other.encode = while_encoding
    bank.freshness.reencode(other)
    assert not bank.freshness.mask().any()
    bank.freshness.reencode(other)
    assert torch.equal(stored(bank, "d"), other.numbers(tuple(range(12))))


def test_a_read_only_bank_masks_what_it_cannot_encode_again(tmp_path):
    model = FakeModel("a")
    for refresh in ("lazy:sweep_tokens=99", "eager", "bounded:max_lag=0"):
        folder = tmp_path / refresh.partition(":")[0]
        bank = odd_bank(model, refresh=refresh)
        bank.save(folder)
        other = FakeModel("b")
        with MemoryBank.open(folder) as writer:
            writer.encoders.enter(other.encoder_stamp())
            writer._table.ledger.note_change()
            with writer.transaction():
                writer.tag("d", ["changed"])
            write(writer, other, "new", list(range(900, 908)))
        with MemoryBank.open(folder, other, read_only=True) as reader, torch.no_grad():
            assert {place.document_id for place in read_all(reader)} == {"new"}, refresh
        with MemoryBank.open(folder, read_only=True) as reader, pytest.raises(ValueError, match="read_only"):
            reader.freshness.reencode(other)
        assert other.num_encoded == 8
    with MemoryBank.open(tmp_path / "eager", read_only=True) as reader, pytest.raises((StaleMemoryError, ValueError)):
        reader.ready_for(FakeModel("c"))
