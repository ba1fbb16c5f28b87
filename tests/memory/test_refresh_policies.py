"""What each refresh policy does when the encoder changes, on encoders without a network."""

import pytest
import torch
from fake_encoder import CHUNK, DIM, HEADS, LAYERS, FakeModel, TurnedModel, make_bank, read_all, stored, write

from longmem import MemoryBank, StaleMemoryError
from longmem.memory.refresh import RefreshPolicy
from longmem.plugins import register

NUM_SEGMENTS, LENGTH = 6, 8


def segment_ids(number: int) -> list[int]:
    return list(range(LENGTH * number, LENGTH * (number + 1)))


def filled(refresh: str, model: FakeModel | None = None, **options) -> MemoryBank:
    """Return a bank of one document "d" with `NUM_SEGMENTS` segments of `LENGTH` tokens."""
    model = model or FakeModel()
    bank = make_bank(model, refresh=refresh, **options)
    for number in range(NUM_SEGMENTS):
        write(bank, model, "d", segment_ids(number))
    return bank


def fresh_segments(bank: MemoryBank, model: FakeModel, name: str = "d") -> list[int]:
    """Return the numbers of the segments that hold what `model` makes of them."""
    parts = stored(bank, name).split(LENGTH, dim=3)
    return [n for n, part in enumerate(parts) if torch.equal(part, model.numbers(tuple(segment_ids(n))))]


def read_segments(bank: MemoryBank) -> set[int]:
    return {place.start // LENGTH for place in read_all(bank)}


ALL = list(range(NUM_SEGMENTS))


def test_frozen_refuses_another_encoder_and_goes_on_with_its_own():
    bank, other = filled("frozen"), FakeModel("b")
    with pytest.raises(StaleMemoryError, match="weights"):
        bank.ready_for(other)
    bank.ready_for(FakeModel("a"))
    assert read_segments(bank) == set(ALL)
    assert bank.freshness.refreshed.tokens == other.num_encoded == 0
    with pytest.raises(StaleMemoryError):
        bank.freshness.sweep(other)


def test_frozen_does_not_read_what_an_earlier_policy_has_left():
    bank, other = filled("lazy"), FakeModel("b")
    bank.ready_for(other)
    bank.freshness.use("frozen")
    bank.ready_for(other)
    assert not read_all(bank)
    bank.freshness.reencode(other)
    bank.ready_for(other)
    assert fresh_segments(bank, other) == ALL


def test_eager_encodes_everything_before_the_first_read():
    bank, other = filled("eager"), FakeModel("b")
    bank.ready_for(other)
    assert fresh_segments(bank, other) == ALL
    assert other.num_encoded == bank.freshness.refreshed.tokens == LENGTH * NUM_SEGMENTS
    bank.ready_for(other)
    assert other.num_encoded == LENGTH * NUM_SEGMENTS


def test_eager_with_a_period_reads_older_entries_in_between():
    bank = filled("eager:every=3")
    for number, name in enumerate("bcd"):
        bank.ready_for(FakeModel(name))
        assert read_segments(bank) == set(ALL)
        assert fresh_segments(bank, FakeModel("a" if number < 2 else "d")) == ALL


def test_eager_goes_on_after_an_interruption():
    bank, other = filled("eager"), FakeModel("b")
    write(bank, FakeModel("a"), "second", segment_ids(0))
    encode = other.encode

    def interrupted(ids):
        if other.num_encoded >= LENGTH * NUM_SEGMENTS:
            raise KeyboardInterrupt
        return encode(ids)

    other.encode = interrupted
    with pytest.raises(KeyboardInterrupt):
        bank.ready_for(other)
    assert bank.freshness.refreshed.tokens == other.num_encoded == LENGTH * NUM_SEGMENTS
    assert {place.document_id for place in read_all(bank)} == {"d"}
    other.encode = encode
    bank.ready_for(other)
    assert {place.document_id for place in read_all(bank)} == {"d", "second"}
    assert bank.freshness.refreshed.tokens == other.num_encoded == LENGTH * (NUM_SEGMENTS + 1)


def test_a_bank_whose_encoder_is_not_known_is_read_under_every_policy():
    for refresh in ("frozen", "eager", "bounded:max_lag=0", "lazy"):
        bank = make_bank(FakeModel(), fingerprint=None, refresh=refresh)
        write(bank, FakeModel(), "d", segment_ids(0))
        assert read_segments(bank) == {0}, refresh


@pytest.mark.parametrize(("clock", "max_lag"), [("version", 2), ("gap", 2.0), ("probe", 0.3)])
def test_bounded_reads_within_the_bound_and_encodes_beyond_it(clock, max_lag):
    """Encoders are at distances of 1 on the clock "gap", and at relative distances that grow on the clock "probe"."""

    class Moved(TurnedModel):
        def __init__(self, lag: int) -> None:
            super().__init__("a" + "x" * lag)
            self.lag = lag

        def sketch(self):
            return super().sketch().__class__(torch.full((1024,), self.lag / 32), 1.0)

        def numbers(self, ids):
            return FakeModel("a").numbers(ids) * (1 + 0.15 * self.lag)

    bank = filled(f"bounded:max_lag={max_lag},clock={clock}", Moved(0))
    for lag in range(4):
        model = Moved(lag)
        bank.ready_for(model)
        assert read_segments(bank) == set(ALL)
        assert (fresh_segments(bank, model) == ALL) == (lag in (0, 3)), lag
        assert bank.freshness.refreshed.tokens == (LENGTH * NUM_SEGMENTS if lag == 3 else 0)
    assert (bank.freshness.refreshed.probed_tokens > 0) == (clock == "probe")


def test_bounded_on_the_clock_probe_knows_nothing_of_what_fills_no_chunk():
    bank = make_bank(FakeModel(), refresh="bounded:max_lag=1000,clock=probe,on_violation=mask")
    for number in range(4):
        write(bank, FakeModel(), "d", [3 * number, 3 * number + 1, 3 * number + 2])
    bank.ready_for(FakeModel("b"))
    assert bank.freshness.lags("probe").values[0] == torch.inf
    assert not read_all(bank)


@pytest.mark.parametrize("clock", ["version", "gap", "probe"])
def test_bounded_masks_or_raises_instead(clock):
    bank = filled(f"bounded:max_lag=0,clock={clock},on_violation=mask")
    bank.ready_for(FakeModel("bb"))
    assert not read_all(bank)
    assert bank.freshness.refreshed.tokens == 0
    bank = filled(f"bounded:max_lag=0,clock={clock},on_violation=raise")
    with pytest.raises(StaleMemoryError, match="'d' was encoded further back"):
        bank.ready_for(FakeModel("bb"))


def test_a_budget_leaves_the_rest_masked_and_says_so_once():
    bank, other = filled(f"bounded:max_lag=0,budget_tokens={2 * LENGTH}"), FakeModel("b")
    with pytest.warns(UserWarning, match="budget_tokens"):
        bank.ready_for(other)
    assert read_segments(bank) == {0, 1}
    for found in (4, 6):
        bank.ready_for(other)  # no second warning: they are errors here
        assert len(read_segments(bank)) == found
    assert fresh_segments(bank, other) == ALL


def test_lazy_encodes_what_a_read_finds_and_a_sweep_the_rest():
    bank, other = filled("lazy"), FakeModel("b")
    bank.ready_for(other)
    assert other.num_encoded == 0
    query = stored(bank, "d")[0, 0, :, 2 * LENGTH : 2 * LENGTH + CHUNK].mean(dim=1, keepdim=True)
    with torch.no_grad():
        bank.search(LAYERS[0], 100 * query, 1)
    found = fresh_segments(bank, other)
    assert 2 in found
    assert len(found) <= HEADS  # one chunk for each head
    bank.freshness.sweep(other, budget_tokens=LENGTH)
    assert len(fresh_segments(bank, other)) == len(found) + 1
    bank.freshness.sweep(other)
    assert fresh_segments(bank, other) == ALL
    assert bank.freshness.refreshed.tokens == other.num_encoded == LENGTH * NUM_SEGMENTS


def test_lazy_waits_while_gradients_are_recorded():
    bank, other = filled("lazy"), FakeModel("b")
    bank.ready_for(other)
    with torch.enable_grad():
        assert not read_all(bank)
    assert other.num_encoded == 0
    bank.ready_for(other)
    assert fresh_segments(bank, other) == ALL


def test_a_lazy_sweep_takes_the_oldest_first():
    bank = make_bank(FakeModel(), refresh=f"lazy:sweep_tokens={LENGTH}")
    for number, encoder in enumerate("abc"):
        model = FakeModel(encoder)
        if number:
            bank.freshness.use("bounded:max_lag=9")
            bank.ready_for(model)
        write(bank, model, encoder, segment_ids(number))
    bank.freshness.use(f"lazy:sweep_tokens={LENGTH}")
    last = FakeModel("d")
    seen = []
    for _ in range(3):
        bank.ready_for(last)
        seen.append([name for name in "abc" if bank.segments(name)[0].version == bank.encoders.current])
    assert seen == [["a"], ["a", "b"], ["a", "b", "c"]]


def test_a_policy_of_ones_own_is_one_class(tmp_path, new_names):
    @register("refresh", "newest")
    class Newest(RefreshPolicy):
        def readable(self, lags):
            return lags.values <= 1

    bank = filled("newest")
    bank.ready_for(FakeModel("b"))
    assert read_segments(bank) == set(ALL)
    bank.save(tmp_path / "bank")
    bank = MemoryBank.load(tmp_path / "bank", FakeModel("b"))
    assert bank.refresh == "newest"
    assert read_segments(bank) == set(ALL)
    bank.ready_for(FakeModel("c"))
    assert not read_all(bank)


def test_tokens_that_cannot_be_encoded_again_are_named_and_masked():
    bank = filled("eager")
    write(bank, FakeModel(), "raw", list(range(100, 112)), segment=None)
    with pytest.warns(UserWarning, match="12 tokens in the bank"):
        bank.ready_for(FakeModel("b"))
    assert {place.document_id for place in read_all(bank)} == {"d"}


def test_workers_of_another_encoder_are_refused():
    bank, other = filled("eager"), FakeModel("b")
    with pytest.raises(StaleMemoryError, match="workers"):
        bank.freshness.reencode(other, workers=[FakeModel("c")])
    helper = FakeModel("b")
    bank.freshness.reencode(other, workers=[helper])
    assert fresh_segments(bank, other) == ALL
    assert other.num_encoded + helper.num_encoded == bank.freshness.refreshed.tokens == LENGTH * NUM_SEGMENTS


def test_a_model_that_changed_after_it_was_announced_encodes_nothing_again():
    bank, other = filled("lazy"), FakeModel("b")
    bank.ready_for(other)
    other.fingerprint = "c"
    with torch.no_grad():
        assert not read_all(bank)
    assert other.num_encoded == 0


def test_queries_do_not_matter_to_a_bank_that_is_all_masked():
    bank = filled("bounded:max_lag=0,on_violation=mask")
    bank.ready_for(FakeModel("b"))
    rows, scores, *_ = bank.search(LAYERS[1], torch.randn(HEADS, 3, DIM), 2)
    assert torch.isneginf(scores).all()
    assert (rows == -1).all()


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change", ["delete", "update", "evict", "append"])
def test_encoding_again_goes_on_where_documents_change_meanwhile(change, workers, on_disk, tmp_path):
    model, other = FakeModel(), FakeModel("b")
    bank = make_bank(model, refresh="lazy", capacity_tokens=4 * LENGTH)
    if on_disk:
        bank.save(tmp_path / "bank")
        bank = MemoryBank.open(tmp_path / "bank")
    for number, name in enumerate("xyz"):
        write(bank, model, name, segment_ids(number))
    if on_disk:  # so that ids are read when they are asked for
        bank.close()
        bank = MemoryBank.open(tmp_path / "bank")

    def meanwhile(done, total):
        if done == LENGTH:
            if change == "append":
                write(bank, other, "z", segment_ids(8))
            elif change == "evict":
                write(bank, other, "new", list(range(50, 50 + 4 * LENGTH - 4)))
            else:
                bank.delete("z")
            if change == "update":
                write(bank, other, "z", segment_ids(8))

    bank.freshness.reencode(other, workers=[FakeModel("b") for _ in range(workers)], progress=meanwhile)
    bank.ready_for(other)
    expected = {"delete": "xy", "update": "xyz", "append": "xyz", "evict": ["new", "z"]}[change]
    assert {place.document_id for place in read_all(bank)} <= set(expected)
    assert {info.document_id for info in bank.documents()} == set(expected)
    for name, number in zip("xyz", range(3), strict=True):
        if change != "evict" and name in bank and not (name == "z" and change == "update"):
            assert torch.equal(stored(bank, name)[:, :, :, :LENGTH], other.numbers(tuple(segment_ids(number))))
    bank.close()
