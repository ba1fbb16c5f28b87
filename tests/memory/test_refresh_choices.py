"""What lazy refresh takes first, and what makes mapped refresh take a map or leave it."""

import pytest
import torch

from longmem import MemoryBank
from longmem.memory.refresh.drift_map import DriftMap, neighbours_kept
from longmem.memory.refresh.lazy import most_wanted, strongest
from longmem.memory.refresh.mapped import Mapped
from longmem.memory.rows.documents import Document
from longmem.memory.rows.segments import Segment


def bank_of(dim):
    bank = MemoryBank(memory_layers=[0], chunk_size=1)
    keys = torch.randn(1, 8, dim, generator=torch.Generator().manual_seed(0))
    bank.add("a", [keys], [keys])
    return bank


def test_a_row_has_the_largest_weight_that_a_query_gives_it():
    scores = torch.tensor([[[4.0, 0.0], [0.0, 0.0]]])  # one head, two queries, dim 16: scaled by 1 / 4
    rows, weights = strongest(scores, torch.tensor([[[5, 2], [2, 7]]]), bank_of(16))
    assert rows.tolist() == [2, 5, 7]
    torch.testing.assert_close(weights, torch.tensor([0.5, torch.tensor(1.0).sigmoid(), 0.5]))


def test_what_was_not_found_has_no_weight():
    scores = torch.tensor([[[1.0, -torch.inf], [-torch.inf, -torch.inf]]])
    rows, weights = strongest(scores, torch.tensor([[[3, -1], [-1, -1]]]), bank_of(4))
    assert (rows.tolist(), weights.tolist()) == ([3], [1.0])


def test_a_budget_buys_the_segments_of_most_weight():
    first, second = Document("a", serial=0), Document("b", serial=1)
    segments = [Segment(start, start + 10, 0) for start in (0, 10, 20)]
    found = [(0.2, first, segments[0]), (0.9, first, segments[2]), (0.5, second, segments[1])]
    chosen = {document.document_id: own for document, own in most_wanted(found, 20)}
    assert chosen == {"a": [segments[2]], "b": [segments[1]]}
    assert [own for _, own in most_wanted(found, 1)] == [[segments[2]]]  # one at least
    everything = {document.document_id: own for document, own in most_wanted(found, None)}
    assert everything == {"a": [segments[0], segments[2]], "b": [segments[1]]}  # in the order of the text
    assert most_wanted([], 20) == []


def pairs_of(move, tokens=400, dim=8):
    """Return what `_fit` gets: four segments of one layer, keys and values, before and after a change of the encoder."""
    some = torch.Generator().manual_seed(0)
    old = [torch.randn(1, tokens, dim, generator=some) + 3 for _ in range(8)]
    moved = [(each, move(each)) for each in old]
    return {(0, 0): moved[:4], (0, 1): moved[4:]}


def test_a_map_that_turns_is_taken():
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    for kind in ("affine", "procrustes"):
        _, gain, recall = Mapped(kind=kind)._fit(pairs_of(lambda old: 2 * old @ turn + 1))
        assert gain > 0.95
        assert recall > 0.9


def test_a_map_to_the_mean_takes_distance_away_and_keeps_no_neighbours():
    some = torch.Generator().manual_seed(2)
    _, gain, recall = Mapped()._fit(pairs_of(lambda old: torch.randn(old.shape, generator=some) - 5))
    assert gain > 0.6
    assert recall < 0.1


def test_a_map_after_a_small_change_takes_little_away():
    some = torch.Generator().manual_seed(3)
    _, gain, recall = Mapped()._fit(pairs_of(lambda old: old + 0.2 * torch.randn(old.shape, generator=some)))
    assert gain < 0.1
    assert recall > 0.5


def test_without_held_out_tokens_no_neighbour_is_kept_and_what_is_not_a_number_is_no_gain():
    pairs = {place: found[:1] for place, found in pairs_of(lambda old: old + 1).items()}
    one = {place: [tuple(side[:, :1] for side in both) for both in found] for place, found in pairs.items()}
    assert Mapped()._fit(one)[2] == 0.0
    pairs[0, 1] = [(pairs[0, 1][0][0], torch.full((1, 400, 8), torch.nan))]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "longmem.memory.refresh.mapped.fit_map",
            lambda kind, old, new, ridge: DriftMap(torch.eye(8)[None], new[:, :1] - old[:, :1]),
        )
        assert not Mapped()._fit(pairs)[1] >= 0


def test_neighbours_of_the_same_keys_are_the_same():
    keys = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
    assert neighbours_kept(keys, keys) == 1.0
    assert neighbours_kept(keys.flip(1), keys) < 0.5
    assert neighbours_kept(keys[:, :1], keys[:, :1]) == 1.0


@pytest.mark.parametrize("setting", ["min_gain", "min_recall"])
def test_shares_are_from_0_to_1(setting):
    with pytest.raises(ValueError, match=setting):
        MemoryBank(memory_layers=[0], chunk_size=1, refresh=f"mapped:{setting}=1.5")
