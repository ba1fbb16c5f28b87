"""The figures by which an index is chosen."""

import pytest
import torch

from longmem.memory.index import approximate, make_index
from longmem.memory.index.tuning import SPECS, _store_of, recall, tune


def test_recall_is_the_share_of_the_best_rows_that_are_found():
    best = torch.tensor([[[0, 1, 2, 3], [4, 5, -1, -1]], [[0, 1, 2, 3], [9, 8, 7, 6]]])
    found = torch.tensor([[[3, 2, 8, 9], [5, 1, -1, -1]], [[0, 1, 2, 3], [0, 1, 2, 3]]])
    assert recall(found, best) == pytest.approx((2 + 1 + 4 + 0) / 14)
    assert recall(best, best) == 1.0


def test_recall_of_one_cluster_is_that_of_a_hand_computed_case(monkeypatch):
    """Two groups of keys far apart in direction: one cluster of two holds the first eight of each query's sixteen."""
    monkeypatch.setattr(approximate, "EXACT_BELOW", 10)
    monkeypatch.setattr(approximate, "POINTS_PER_CENTROID", 8)
    first = torch.cat([torch.full((8, 1), 10.0), torch.arange(8.0)[:, None]], dim=1)
    keys = torch.cat([first, first * torch.tensor([-1.0, 1.0])]).unsqueeze(0)
    queries = torch.tensor([[[1.0, 0.1], [-1.0, 0.1], [2.0, 0.2], [-3.0, 0.3]]])
    # Two clusters (0.5 sqrt(16)); the exact best eight are in one of them, the best sixteen half in each.
    settings = "ivf:clusters_per_root=0.5,least_probes=1,probed_share="
    half, whole = settings + "0.5", settings + "1"
    assert [each.recall for each in tune(keys, queries, [half, whole], num_chunks=8, repeats=1)] == [1.0, 1.0]
    index = make_index(half, _store_of(keys))
    index.search(queries, 1)
    found = index._look_up(queries, 16, None)[1]
    assert recall(found, torch.arange(16).expand(1, 4, 16)) == 0.5


def test_every_default_setting_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(approximate, "EXACT_BELOW", 10)
    keys, queries = torch.randn(2, 700, 8), torch.randn(2, 20, 8)
    results = tune(keys, queries, ["flat", *SPECS], num_chunks=4, repeats=1)
    assert [each.index for each in results] == ["flat", *SPECS]
    assert results[0].recall == 1.0
    assert (results[0].num_bytes, results[0].build_seconds) == (0, 0.0)
    for each in results:
        assert 0 < each.recall <= 1
        assert each.milliseconds > 0
        assert each.speed_ratio > 0
    by_name = {each.index: each for each in results}
    whole, half = (by_name[index] for index in ("ivf:storage=float32", "ivf:probed_share=0.06"))
    assert 0 < half.num_bytes < whole.num_bytes

    pytest.importorskip("matplotlib")
    from longmem.plots import plot_tuning

    plot_tuning(tmp_path / "tuning.png", results, title="Index settings")
    assert (tmp_path / "tuning.png").stat().st_size > 10_000


def test_recall_by_token_is_that_of_chunks():
    keys = torch.randn(2, 40_000, 8, generator=torch.Generator().manual_seed(1))
    queries = keys[:, ::1999] + 0.1
    flat, few, all_of_them = tune(
        keys,
        queries,
        ["flat", "ivf:probed_share=0.001,least_probes=1", "ivf:probed_share=1"],
        4,
        repeats=1,
        chunk_size=4,
    )
    assert (flat.recall, all_of_them.recall) == (1.0, 1.0)
    assert 0.1 < few.recall < 1
