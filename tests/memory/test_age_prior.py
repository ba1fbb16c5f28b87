"""Weights by age: their shape, their names, and the search that counts them."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem.memory import AgePrior, BankShards, MemoryBank
from longmem.memory.age_prior import DAY, AgeKind, make_age_prior
from longmem.memory.index import approximate
from longmem.plugins import find, register

LAYER, HEADS, DIM, SCALING = 5, 2, 6, 0.4
QUERIES = torch.randn(HEADS, 4, DIM, generator=torch.Generator().manual_seed(1))
VALUES = {"a": st.floats(0, 1e6), "b": st.floats(0, 1e12), "floor": st.floats(0, 1), "unit": st.just(DAY)}
PRIORS = st.sampled_from(["constant", "exp", "hinge", "poly"]).flatmap(
    lambda kind: st.builds(AgePrior, st.just(kind), **{name: VALUES[name] for name in find("age_prior", kind).settings})
)


def write(bank: MemoryBank, name: str, tokens: int, seed: int, **options) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank.add(name, *([torch.randn(HEADS, tokens, DIM, generator=generator)] for _ in range(2)), **options)


def dated_bank(days=(0, 3, 4, 10), **options) -> MemoryBank:
    bank = MemoryBank(memory_layers=[LAYER], chunk_size=2, storage_dtype="float32", **options)
    for number, day in enumerate(days):
        write(bank, f"day {number}", 20, number, dated=day * DAY)
    return bank


def naive_search(bank: MemoryBank, weights: dict[str, float], num_chunks: int):
    """Return scores with the bonus and rows, from the definition."""
    owners = [place.document_id for place in bank.locate(torch.arange(bank.num_chunks))]
    bonus = torch.tensor([weights[owner] for owner in owners]) / SCALING
    scores = QUERIES @ bank.search_keys(LAYER).transpose(1, 2) + bonus
    return scores.topk(num_chunks, dim=2)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(prior=PRIORS, ages=st.lists(st.floats(0, 1e9), min_size=2, max_size=6))
def test_weights_start_at_one_stay_positive_and_never_rise(prior, ages):
    logs = [prior.log_weight(age) for age in sorted(ages)]
    assert prior.weight(0.0) == 1.0
    assert prior.log_weight(0.0) == 0.0
    assert all(math.isfinite(each) and each <= 0 for each in logs)  # so the weight is positive, however small
    assert all(later <= earlier for earlier, later in zip(logs, logs[1:], strict=False))
    for age in ages:
        assert prior.weight(age) == math.exp(prior.log_weight(age)) <= 1
        if prior.floor:
            assert prior.weight(age) >= prior.floor * (1 - 1e-12)
    assert make_age_prior(prior.name) == (None if prior.kind == "constant" else prior)


@pytest.mark.parametrize(
    ("prior", "formula"),
    [
        (AgePrior("hinge", a=0.5, b=1), lambda age: 1 if age <= 1 else 1 / (0.5 * (age - 1) + 1)),
        (AgePrior("poly", a=0.7), lambda age: (age + 1) ** -0.7),
        (AgePrior("exp", a=0.3, floor=0.2), lambda age: 0.2 + 0.8 * math.exp(-0.3 * age)),
        (AgePrior("exp", a=0.3), lambda age: math.exp(-0.3 * age)),
        (AgePrior(), lambda age: 1),
    ],
)
def test_weights_are_those_of_the_formulas(prior, formula):
    for age in (0.0, 0.5, 1.0, 1.5, 7.0, 100.0):
        assert prior.weight(age) == pytest.approx(formula(age), rel=1e-12)


def test_a_kind_of_ones_own_is_one_function(new_names):
    register("age_prior", "halves")(AgeKind({}, lambda prior, age: -age * math.log(2)))
    bank = dated_bank(age_prior="halves")
    weights = {f"day {number}": (day - 10) * math.log(2) for number, day in enumerate((0, 3, 4, 10))}
    scores, rows = naive_search(bank, weights, 5)
    found = bank.search(LAYER, QUERIES, 5, scaling=SCALING)
    torch.testing.assert_close(found.scores, scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.rows, rows)
    with pytest.raises(ValueError, match="`a` must be left out for the kind 'halves'"):
        AgePrior("halves", a=3)


def test_what_is_far_too_old_has_no_weight_but_a_finite_logarithm():
    prior = AgePrior("exp", a=2)
    assert (prior.weight(1e6), prior.log_weight(1e6)) == (0.0, -2e6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "poly", "a": -0.5}, "`a` of an age prior must be a number from 0 to 1e.06, got -0.5"),
        ({"kind": "exp", "a": math.nan}, "`a` of an age prior"),
        ({"kind": "exp", "a": True}, "`a` of an age prior"),
        ({"kind": "exp", "floor": 1.5}, "`floor` of an age prior must be a number from 0 to 1, got 1.5"),
        ({"kind": "hinge", "b": -1}, "`b` of an age prior"),
        ({"kind": "poly", "unit": 0}, "`unit` of an age prior"),
        ({"kind": "poly", "b": 1}, "`b` must be left out for the kind 'poly'"),
        ({"kind": "constant", "a": 1}, "`a` must be left out for the kind 'constant'"),
        ({"kind": "polly"}, "Did you mean `poly`"),
    ],
)
def test_wrong_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AgePrior(**options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exp:a=-1", "`a` of age_prior 'exp' must be a number from 0"),
        ("exp:b=1", "settings of 'exp', got 'b'"),
        ("linear", "`age_prior` must be one of the known kinds"),
        (3, "`age_prior` must be one of the known kinds"),
    ],
)
def test_wrong_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        MemoryBank(memory_layers=[1], chunk_size=2, age_prior=name)


@pytest.mark.parametrize("index", ["flat", "exact", "auto", "ivf"])
def test_exact_search_counts_age_exactly(index):
    bank = dated_bank(index=index, age_prior="poly:a=2")
    weights = {f"day {number}": -2 * math.log1p(10 - day) for number, day in enumerate((0, 3, 4, 10))}
    scores, rows = naive_search(bank, weights, 7)
    found = bank.search(LAYER, QUERIES, 7, scaling=SCALING)
    torch.testing.assert_close(found.scores, scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.rows, rows)
    plain = bank.search(LAYER, QUERIES, 7)  # without the scale of attention, age does not count
    assert not torch.equal(plain.rows, rows)
    expected = torch.tensor([0.0 if place is None else weights[place.document_id] for place in bank.locate(rows)])
    torch.testing.assert_close(bank.log_weights(rows).flatten(), expected)


def test_approximate_search_ranks_more_candidates_again(monkeypatch):
    monkeypatch.setattr(approximate, "EXACT_BELOW", 10)
    monkeypatch.setattr(approximate, "POINTS_PER_CENTROID", 4)
    # It looks at everything, and at four times as many as are wanted: then the best are among them.
    bank = dated_bank(index="ivf:probed_share=1,storage=float32", age_prior="exp:a=0.01")
    weights = {f"day {number}": -0.01 * (10 - day) for number, day in enumerate((0, 3, 4, 10))}
    scores, rows = naive_search(bank, weights, 5)
    found = bank.search(LAYER, QUERIES, 5, scaling=SCALING)
    assert bank._table.index_of(0)._files  # not the exact search of a small bank
    torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.rows, rows)
    assert not torch.allclose(found.scores, bank.search(LAYER, QUERIES, 5).scores)
    bank.use_age_prior(
        "exp:a=100"
    )  # only candidates are ranked: the newest are not all among twenty of the forty chunks
    newest = {place.document_id for place in bank.locate(bank.search(LAYER, QUERIES, 10, scaling=SCALING).rows)}
    assert "day 3" in newest


@pytest.mark.parametrize("index", ["flat", "exact"])
def test_one_date_for_all_changes_nothing_and_two_do(index):
    same, other = dated_bank((7, 7, 7), index=index), dated_bank((0, 7, 7), index=index)
    for bank, changes in ((same, False), (other, True)):
        before = bank.search(LAYER, QUERIES, 9, scaling=SCALING)
        bank.use_age_prior(AgePrior("exp", a=0.5))
        after = bank.search(LAYER, QUERIES, 9, scaling=SCALING)
        assert torch.equal(before[0], after[0]) != changes
        assert torch.equal(before[1], after[1]) != changes
        assert bool(bank.log_weights(torch.arange(bank.num_chunks)).any()) == changes


def test_ages_count_from_the_newest_text_that_can_be_found():
    bank = dated_bank((0, 3, 4, 10), age_prior="exp:a=1")
    assert bank.newest_date == 10 * DAY
    rows = torch.tensor([[0, 10, 20, 30]])
    assert bank.log_weights(rows).tolist() == [[-10, -7, -6, 0]]
    bank.supersede("day 3")
    assert bank.newest_date == 4 * DAY
    assert bank.log_weights(rows[:, :3]).tolist() == [[-4, -1, 0]]
    view = bank.select(["day 0", "day 1", "day 3"])
    assert (view.newest_date, view.log_weights(rows[:, :2]).tolist()) == (3 * DAY, [[-3, 0]])
    found = bank.locate(view.search(LAYER, QUERIES, 10, scaling=1e-3).rows)
    assert {place.document_id for place in found} == {"day 1"}
    bank.restore("day 3")
    assert bank.log_weights(rows).tolist() == [[-10, -7, -6, 0]]


def test_a_document_without_a_date_is_as_old_as_its_writing():
    bank = dated_bank((0,), age_prior="poly")
    write(bank, "new", 4, 9)
    assert bank.newest_date == bank.info("new").written_at > 1e9


def test_shards_count_ages_from_the_newest_of_all():
    parts = dated_bank((0, 3), age_prior="exp:a=0.1"), dated_bank((4, 10), age_prior="exp:a=0.1")
    whole = dated_bank((0, 3, 4, 10), age_prior="exp:a=0.1")
    for number, part in enumerate(parts):  # the same texts as those of the whole
        for name in ("day 0", "day 1"):
            part.delete(name)
        for day in (0, 3) if number == 0 else (4, 10):
            write(part, f"{day}", 20, (0, 3, 4, 10).index(day), dated=day * DAY)
    shards = BankShards(parts)
    assert (shards.has_age_prior, shards.newest_date) == (True, 10 * DAY)
    rows, scores, *_ = shards.search(LAYER, QUERIES, 9, scaling=SCALING)
    expected = whole.search(LAYER, QUERIES, 9, scaling=SCALING)
    torch.testing.assert_close(scores, expected.scores)
    torch.testing.assert_close(shards.log_weights(rows), whole.log_weights(expected.rows))
    assert shards.log_weights(rows).unique().numel() > 2
    assert not torch.allclose(scores, shards.search(LAYER, QUERIES, 9).scores)
    assert not BankShards([dated_bank()]).has_age_prior


def test_the_prior_is_a_setting_that_is_saved_and_can_change(tmp_path):
    prior = AgePrior("hinge", a=0.3, b=2, unit=60)
    bank = dated_bank(age_prior=prior)
    assert bank.age_prior == bank.empty_like().age_prior == prior
    bank.save(tmp_path / "bank")
    assert MemoryBank.load(tmp_path / "bank").age_prior == prior
    with MemoryBank.open(tmp_path / "bank") as opened, MemoryBank.open(tmp_path / "bank", read_only=True) as reader:
        version = opened.version
        opened.use_age_prior("exp:a=0.5,floor=0.1")
        assert opened.version != version
        assert reader.age_prior == prior
        assert reader.folder.reload()
        assert reader.age_prior == AgePrior("exp", a=0.5, floor=0.1)
        with contextlib.suppress(RuntimeError), opened.transaction():
            opened.use_age_prior(None)
            assert opened.age_prior is None
            raise RuntimeError
        assert opened.age_prior == reader.age_prior
        opened.use_age_prior("constant")
    with MemoryBank.open(tmp_path / "bank") as opened:
        assert opened.age_prior is None


def test_a_scale_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`scaling` must be a positive number, got 0"):
        dated_bank(age_prior="poly").search(LAYER, QUERIES, 1, scaling=0)
