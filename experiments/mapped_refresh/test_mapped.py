"""The policy "mapped": when it takes a map or leaves it, what a map moves, and what is done where none wins."""

from __future__ import annotations

import json

import pytest
import torch
from changed_encoder import changed, tiny_longmem
from fake_encoder import CHUNK, LAYERS, FakeModel, TurnedModel, make_bank, read_all, stored, write

from experiments.mapped_refresh import Mapped
from experiments.mapped_refresh.drift_map import DriftMap, neighbours_kept
from experiments.mapped_refresh.mapped import move_segments
from longmem.memory import MemoryBank
from longmem.memory.refresh import Refresher

NUM_SEGMENTS, LENGTH = 6, 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a model, and two whose encoders have moved a little and far."""
    model = tiny_longmem(tmp_path_factory.mktemp("backbone"))
    return model, changed(model, 0.05), changed(model, 0.5)


def segment_ids(number):
    return list(range(LENGTH * number, LENGTH * (number + 1)))


def filled(refresh, num_segments):
    """Return a bank of one document "d" with so many segments of `LENGTH` tokens."""
    bank = make_bank(FakeModel(), refresh=refresh)
    for number in range(num_segments):
        write(bank, FakeModel(), "d", segment_ids(number))
    return bank


def fresh_segments(bank, model):
    """Return the numbers of the segments that hold what `model` makes of them."""
    parts = stored(bank, "d").split(LENGTH, dim=3)
    return [n for n, part in enumerate(parts) if torch.equal(part, model.numbers(tuple(segment_ids(n))))]


def read_segments(bank):
    return {place.start // LENGTH for place in read_all(bank)}


def pairs_of(move, tokens=400, dim=8):
    """Return what `fit` gets: four segments of one layer, keys and values, before and after a change of the encoder."""
    some = torch.Generator().manual_seed(0)
    old = [torch.randn(1, tokens, dim, generator=some) + 3 for _ in range(8)]
    moved = [(each, move(each)) for each in old]
    return {(0, 0): moved[:4], (0, 1): moved[4:]}


def test_a_map_that_turns_is_taken():
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    for kind in ("affine", "procrustes"):
        _, gain, recall = Mapped(kind=kind).fit(pairs_of(lambda old: 2 * old @ turn + 1))
        assert gain > 0.95
        assert recall > 0.9


def test_a_map_to_the_mean_takes_distance_away_and_keeps_no_neighbours():
    some = torch.Generator().manual_seed(2)
    _, gain, recall = Mapped().fit(pairs_of(lambda old: torch.randn(old.shape, generator=some) - 5))
    assert gain > 0.6
    assert recall < 0.1


def test_a_map_after_a_small_change_takes_little_away():
    some = torch.Generator().manual_seed(3)
    _, gain, recall = Mapped().fit(pairs_of(lambda old: old + 0.2 * torch.randn(old.shape, generator=some)))
    assert gain < 0.1
    assert recall > 0.5


def test_without_held_out_tokens_no_neighbour_is_kept_and_what_is_not_a_number_is_no_gain():
    pairs = {place: found[:1] for place, found in pairs_of(lambda old: old + 1).items()}
    one = {place: [tuple(side[:, :1] for side in both) for both in found] for place, found in pairs.items()}
    assert Mapped().fit(one)[2] == 0.0
    pairs[0, 1] = [(pairs[0, 1][0][0], torch.full((1, 400, 8), torch.nan))]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "experiments.mapped_refresh.mapped.fit_map",
            lambda kind, old, new, ridge: DriftMap(torch.eye(8)[None], new[:, :1] - old[:, :1]),
        )
        assert not Mapped().fit(pairs)[1] >= 0


def test_neighbours_of_the_same_keys_are_the_same():
    keys = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
    assert neighbours_kept(keys, keys) == 1.0
    assert neighbours_kept(keys.flip(1), keys) < 0.5
    assert neighbours_kept(keys[:, :1], keys[:, :1]) == 1.0


@pytest.mark.parametrize("setting", ["min_gain", "min_recall"])
def test_shares_are_from_0_to_1(setting):
    with pytest.raises(ValueError, match=setting):
        MemoryBank(memory_layers=[0], chunk_size=1, refresh=f"mapped:{setting}=1.5")


@pytest.mark.parametrize("kind", ["affine", "procrustes"])
def test_mapped_accepts_a_linear_change_and_moves_the_rest_for_nothing(kind):
    bank = filled(f"mapped:kind={kind},ridge=0,sample_share=0.2", 40)
    turned = TurnedModel("b")
    bank.ready_for(turned)
    assert bank.freshness.refreshed.mapped == 32
    assert bank.freshness.refreshed.tokens == turned.num_encoded == 8 * LENGTH
    assert len(read_all(bank)) == bank.num_chunks
    expected = torch.cat([turned.numbers(tuple(segment_ids(number))) for number in range(40)], dim=3)
    torch.testing.assert_close(stored(bank, "d"), expected, rtol=1e-4, atol=1e-4)
    keys = torch.cat([each[0].unflatten(1, (-1, CHUNK)).mean(dim=2) for each in expected[:1]], dim=1)
    rows = bank._table.ledger.documents["d"].rows.values
    torch.testing.assert_close(bank.search_keys(LAYERS[0])[:, rows], keys, rtol=1e-4, atol=1e-4)


def test_mapped_refuses_noise_and_falls_back():
    for fallback, fresh in (("lazy", 0), ("eager", NUM_SEGMENTS), ("mask", 0)):
        bank = filled(f"mapped:sample_share=0.4,fallback={fallback}", NUM_SEGMENTS)
        other = FakeModel("b")
        with pytest.warns(UserWarning, match="no map from encoder version 0"):
            bank.ready_for(other)
        assert bank.freshness.refreshed.mapped == 0
        assert len(fresh_segments(bank, other)) == (fresh or 2)
        assert bank.freshness.refreshed.tokens == other.num_encoded
        with torch.no_grad():
            assert len(read_segments(bank)) == (2 if fallback == "mask" else NUM_SEGMENTS)


def test_a_map_that_won_leaves_nothing_to_an_eager_fallback():
    bank = filled("mapped:ridge=0,sample_share=0.2,fallback=eager", 20)
    turned = TurnedModel("b")
    bank.ready_for(turned)
    bank.ready_for(turned)
    assert bank.freshness.refreshed.tokens == turned.num_encoded == 4 * LENGTH


def test_mapped_vectors_are_not_moved_again_nor_read_as_their_first_encoders():
    bank = filled("mapped:ridge=0,sample_share=0.2,fallback=mask", 20)
    bank.ready_for(TurnedModel("b"))
    before = stored(bank, "d")
    bank.ready_for(TurnedModel("c"))  # moves what "b" has written, the sample of before, and nothing else
    mapped = [each for each in bank.segments("d") if each.version == 0]
    assert len(mapped) == 16
    assert all(each.mapped_to == 1 for each in mapped)
    for each in mapped:
        assert torch.equal(stored(bank, "d")[..., each.start : each.stop, :], before[..., each.start : each.stop, :])
    starts = {place.start for place in read_all(bank)}
    assert not any(each.start <= start < each.stop for each in mapped for start in starts)
    bank.freshness.use("lazy")
    first = FakeModel("a")
    bank.ready_for(first)  # it wrote them once, but they have been moved since
    assert bank.freshness.mask().sum() == 0
    with torch.no_grad():
        read_all(bank)
    assert torch.equal(stored(bank, "d"), torch.cat([first.numbers(tuple(segment_ids(n))) for n in range(20)], 3))


def test_a_map_does_not_claim_chunks_that_it_has_not_moved():
    """Segments of ten tokens share chunks of four; the chunks on their borders hold what the old encoder wrote."""
    bank = make_bank(FakeModel(), refresh="mapped:ridge=0,sample_share=0.1,fallback=mask")
    for number in range(20):
        write(bank, FakeModel(), "d", list(range(10 * number, 10 * number + 10)))
    turned = TurnedModel("b")
    bank.ready_for(turned)
    assert bank.freshness.refreshed.mapped
    expected = torch.cat([turned.numbers(tuple(range(10 * n, 10 * n + 10))) for n in range(20)], dim=3)
    places = read_all(bank)
    assert 0 < len(places) < bank.num_chunks
    for place in places:
        got, wanted = (each[..., place.start : place.stop, :] for each in (stored(bank, "d"), expected))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_short_chunk_is_moved_with_its_segment():
    bank = filled("mapped:ridge=0,sample_share=0.2,fallback=mask", 24)
    ids = list(range(500, 510))  # two chunks, and one of two tokens
    write(bank, FakeModel(), "e", ids)
    turned = TurnedModel("b")
    bank.ready_for(turned)
    assert bank.segments("e")[0].mapped_to == 1, "it is not in the sample that this seed draws"
    torch.testing.assert_close(stored(bank, "e"), turned.numbers(tuple(ids)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fallback", ["eager", "lazy", "mask"])
def test_a_fallback_does_not_encode_what_a_map_has_moved(models, fallback):
    before, _, after = models
    settings = f"mapped:sample_share=0.25,min_gain=0,min_recall=0,ridge=0.1,fallback={fallback}"
    bank = MemoryBank.for_model(before, refresh=settings)
    for number in range(8):
        before.memorize(bank, torch.randint(0, 250, (32,)), str(number))
    bank.ready_for(after)
    assert bank.freshness.refreshed.mapped == 6
    assert bank.freshness.refreshed.tokens == 64


def test_all_of_a_segment_is_moved(models):
    before, after, _ = models
    bank = MemoryBank.for_model(before)
    before.memorize(bank, torch.arange(30), "one")
    document = bank._table.ledger.documents["one"]
    rows = document.rows.values.expand(2, -1)
    (layer,) = bank.memory_layers
    keys, values = bank.gather(layer, rows, bank.generation)
    doubled = DriftMap(2 * torch.eye(8).expand(2, 8, 8), torch.ones(2, 1, 8))
    turned = DriftMap(-torch.eye(8).expand(2, 8, 8), torch.zeros(2, 1, 8))
    bank.encoders.enter(after.encoder_stamp())
    move_segments(
        Refresher(bank.freshness.state, [after.encoder]),
        document,
        list(document.segments),
        {(0, 0): doubled, (0, 1): turned},
    )
    new_keys, new_values = bank.gather(layer, rows, bank.generation)
    torch.testing.assert_close(new_keys, 2 * keys + 1)
    torch.testing.assert_close(new_values, -values)


def test_moved_vectors_stay_stale_and_are_not_masked(models):
    bank = MemoryBank.for_model(models[0], refresh="mapped:sample_share=0.3,min_gain=0,min_recall=0,ridge=0.1")
    models[0].memorize(bank, torch.arange(64), "one")
    models[0].memorize(bank, torch.arange(100, 134), "two")
    bank.ready_for(models[2])
    report = bank.freshness.report(models[2])
    assert bank.freshness.refreshed.mapped
    assert (report.masked, report.mapped > 0) == (0, True)
    assert report.stale_share == report.mapped / report.entries
    assert report.tokens_to_encode == 0
    assert bank.freshness.report(models[1]).tokens_to_encode == 98
    assert report.map_gain is not None
    assert report.map_gain > 0
    assert bank.freshness.report(models[1]).mapped == 0


def test_a_bank_in_a_folder_is_moved_by_the_command_and_keeps_the_policy(models, run, tmp_path):
    before, _, after = models
    after.backbone.save_pretrained(tmp_path / "backbone")
    before.tokenizer.save_pretrained(tmp_path / "backbone")
    after.config.backbone_name_or_path = str(tmp_path / "backbone")
    after.save_pretrained(tmp_path / "new")
    with MemoryBank.for_model(before, folder=tmp_path / "bank") as bank:
        for number in range(8):
            before.memorize(bank, torch.randint(0, 250, (32,)), str(number))
    policy = "mapped:sample_share=0.25,min_gain=0,min_recall=0,ridge=0.1"
    place = ("--bank", tmp_path / "bank", "--model", tmp_path / "new")
    code, out, error = run("bank", "refresh", *place, "--policy", policy, "--json")
    assert code == 0, error
    done = json.loads(out)
    assert done["mapped"] > 0
    assert (0 < done["tokens"] < 256, done["tokens_left"], done["refresh"]) == (True, 0, policy)
    assert f"The refresh policy is {policy}: all of it may be read as it is." in run("bank", "staleness", *place[:2])[1]
