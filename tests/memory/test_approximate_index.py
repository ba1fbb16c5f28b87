"""Index kinds that keep data of their own, against the store that they have to follow."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longmem.memory.index import approximate as module
from longmem.memory.index import arrays_of, exact_top_chunks, index_of, make_index
from longmem.memory.index.approximate import LabelTable
from longmem.memory.rows.storage import Chunks, ChunkStore

HEADS, DIM = 2, 8
SMALL = 24  # rows from which the kinds approximate in these tests
# With such settings a kind looks at everything, so that it has to answer as exact search does.
THOROUGH = {
    "auto": "auto",
    "ivf": "ivf:probed_share=1",
    "ivf float32": "ivf:probed_share=1,storage=float32",
    "hnsw": "hnsw:neighbors=16,search_depth=400",
    "hnsw float16": "hnsw:neighbors=16,search_depth=400,storage=float16",
    "pq": "pq:probed_share=1,bits=4,candidates=1000",
}


@pytest.fixture(autouse=True, scope="module")
def small_thresholds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EXACT_BELOW", SMALL)
        patch.setattr(module, "POINTS_PER_CENTROID", 1)
        yield


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 1.0


class Follower:
    """Return a store and an index over it, with the changes that a bank makes, told in the bank's order."""

    def __init__(self, index: str, num_rows: int = 0):
        self.name, self.seed = index, -1
        self.store = ChunkStore(self.chunks(0), 10_000)
        self.index = make_index(index, self.store)
        self.write(num_rows)

    def chunks(self, count: int) -> Chunks:
        self.seed += 1
        keys = random(HEADS, count, DIM, seed=self.seed)
        return Chunks(keys.unsqueeze(2), keys.unsqueeze(2)[..., :1], keys)

    def write(self, count: int) -> None:
        rows = torch.arange(self.store.num_rows, self.store.num_rows + count)
        self.store.write(rows, self.chunks(count))
        self.index.rows_written(rows)

    def overwrite(self, rows: torch.Tensor) -> None:
        self.index.rows_dropped(rows)
        self.store.write(rows, self.chunks(len(rows)))
        self.index.rows_written(rows)

    def drop(self, rows: torch.Tensor) -> None:
        kept = self.store.num_rows - len(rows)
        is_dropped = torch.zeros(self.store.num_rows, dtype=torch.bool)
        is_dropped[rows] = True
        holes, sources = is_dropped[:kept].nonzero().flatten(), kept + (~is_dropped[kept:]).nonzero().flatten()
        self.index.rows_dropped(rows)
        self.store.move(sources, holes)
        self.store.truncate(kept)
        self.index.rows_moved(sources, holes)

    def some_rows(self, count: int) -> torch.Tensor:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(self.store.num_rows, generator=generator)[:count].sort().values

    def check(self, num_chunks: int, rows: torch.Tensor | None = None, *, thorough: bool = True) -> None:
        """Compare with exact search: rows that may be found, their own scores, and no slot left open."""
        keys = self.store.search_keys if rows is None else self.store.search_keys[:, rows]
        queries = torch.cat([random(HEADS, 3, DIM, seed=99), keys[:, -1:] * 3], dim=1)
        scores, found = self.index.search(queries, num_chunks, rows)
        count = min(num_chunks, keys.shape[1])
        assert (found[..., count:] == -1).all()
        scores, found = scores[..., :count], found[..., :count]
        allowed = torch.arange(self.store.num_rows) if rows is None else rows
        assert torch.isin(found, allowed).all()
        assert (found.sort(dim=2).values.diff(dim=2) > 0).all()  # no chunk twice
        picked = torch.stack([head[chosen] for head, chosen in zip(self.store.search_keys, found, strict=True)])
        tolerance = dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.einsum("hqcd,hqd->hqc", picked, queries), scores, **tolerance)
        if thorough:
            torch.testing.assert_close(scores, exact_top_chunks(queries, keys, count)[0], **tolerance)


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 40)),
        st.tuples(st.just("overwrite"), st.integers(1, 30)),
        st.tuples(st.just("drop"), st.integers(1, 30)),
        st.tuples(st.just("search"), st.integers(1, 12)),
        st.tuples(st.just("filter"), st.integers(1, 60)),
        st.tuples(st.just("reopen"), st.integers(0, 20)),
    ),
    min_size=4,
    max_size=12,
)


@pytest.mark.parametrize("index", THOROUGH.values(), ids=THOROUGH.keys())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(changes=CHANGES)
def test_any_sequence_of_changes_is_followed(index, changes):
    follower, thorough = Follower(index, num_rows=30), index != "auto"
    follower.check(5, thorough=thorough)
    for change, count in changes:
        if change == "write":
            follower.write(count)
        elif change in ("overwrite", "drop"):
            rows = follower.some_rows(min(count, follower.store.num_rows - 1))
            getattr(follower, change)(rows)
        elif change == "filter":
            follower.check(4, follower.some_rows(count), thorough=thorough)
        elif change == "reopen":
            saved = follower.index.export()
            follower.index = make_index(index, follower.store)
            assert saved is None or follower.index.adopt(saved)
        else:
            follower.check(count, thorough=thorough)
    follower.check(3, thorough=thorough)


@pytest.mark.parametrize("index", ["auto", "ivf", "hnsw", "pq:bits=4"])
def test_own_key_is_found_and_a_small_store_is_searched_exactly(index, monkeypatch):
    follower = Follower(index, num_rows=200)
    # Of keys of one length each is nearest to itself.
    keys = torch.nn.functional.normalize(follower.store.search_keys - 1.0, dim=2)
    follower.store.search_keys.copy_(keys)
    found = follower.index.search(keys, 1)[1]
    assert (found[..., 0] == torch.arange(200)).float().mean() > 0.95
    assert follower.index.export() is not None
    monkeypatch.setattr(module, "EXACT_BELOW", 201)
    small = make_index(index, follower.store)
    torch.testing.assert_close(small.search(keys, 9), exact_top_chunks(keys, keys, 9))
    assert small.export() is None


@pytest.mark.parametrize(
    "index",
    ["ivf:probed_share=0.05,least_probes=1", "hnsw:search_depth=4", "pq:probed_share=0.05,least_probes=1,bits=4"],
)
def test_a_thin_filter_and_too_few_clusters_leave_no_slot_open(index, monkeypatch):
    follower = Follower(index, num_rows=400)
    follower.check(60, thorough=False)
    monkeypatch.setattr(module, "EXACT_BELOW", 5)
    monkeypatch.setattr(type(follower.index), "exact_share", 0.0)
    follower.check(20, follower.some_rows(40), thorough=False)
    follower.check(5, follower.some_rows(5), thorough=False)


def test_a_change_costs_as_much_as_it_changes(monkeypatch):
    """Neither building an index nor telling it of changes looks at the store's keys; a search adds new rows only."""
    follower, added = Follower("ivf", num_rows=300), []
    follower.check(3, thorough=False)
    add = follower.index._add
    monkeypatch.setattr(follower.index, "_add", lambda rows: (added.append(len(rows)), add(rows)))
    with monkeypatch.context() as closed:
        closed.setattr(ChunkStore, "search_keys", property(lambda store: pytest.fail("read the keys")))
        make_index("ivf", follower.store)
        follower.write(7)
        follower.overwrite(torch.tensor([3, 5]))
        follower.drop(torch.tensor([1, 2, 4]))
    follower.check(3, thorough=False)
    # Of nine new rows some have moved, with the labels that they do not have yet; none is added twice.
    assert added == [9]
    follower.check(3, thorough=False)
    assert added == [9, 0]


def test_tombstones_are_cleared_and_growth_trains_again():
    follower = Follower("ivf", num_rows=100)
    follower.check(3, thorough=False)
    table, files = follower.index._table, follower.index._files
    follower.overwrite(torch.arange(30))
    assert (table.num_dead, follower.index._files[0].ntotal) == (30, 100)
    follower.check(3, thorough=False)
    assert (table.num_dead, files[0].ntotal) == (0, 100)
    assert follower.index._files is files
    follower.write(301)
    follower.check(3, thorough=False)
    assert follower.index._files is not files
    assert follower.index._files[0].nlist > files[0].nlist


def test_a_bank_whose_rows_are_replaced_is_trained_again():
    follower = Follower("ivf", num_rows=100)
    follower.check(3, thorough=False)
    files = follower.index._files
    for _ in range(10):
        follower.overwrite(torch.arange(30))
        follower.check(3, thorough=False)
    assert follower.index._files is not files


def test_keys_that_half_precision_cannot_hold_are_found_by_their_exact_scores():
    follower = Follower("ivf:probed_share=1", num_rows=100)
    follower.store.search_keys[:, 40] *= 1e6
    follower.check(5, thorough=False)
    queries = follower.store.search_keys[:, 40:41]
    assert (follower.index.search(queries, 1)[1] == 40).all()


def test_an_interrupted_addition_is_started_anew():
    follower = Follower("ivf:probed_share=1", num_rows=100)
    follower.check(3)
    follower.write(10)
    follower.index._files[0].add(np.zeros((4, DIM), dtype=np.float32))  # as if the second head had been interrupted
    assert follower.index.export() is None
    follower.check(3)
    follower.write(10)
    follower.index._table.take_waiting(follower.store.num_rows)  # as if it had been interrupted before the first
    follower.check(3)


def test_a_bank_that_is_never_searched_gathers_no_notes():
    table = LabelTable()
    for _ in range(50):
        table.wait(np.arange(10))
        table.drop(np.arange(10))
    assert sum(map(len, table._waiting)) == 10


@pytest.mark.parametrize("index", ["auto", "ivf:storage=float32,probed_share=1", "hnsw", "pq:bits=4"])
def test_a_saved_index_is_adopted_with_what_has_changed_since(index):
    follower = Follower(index, num_rows=120)
    follower.check(3, thorough=False)
    follower.drop(torch.tensor([3, 50]))
    follower.write(4)
    saved = follower.index.export()
    assert (saved.rows < 0).sum() == 2
    reopened = make_index(index, follower.store)
    files = [index_of(saved.layout, DIM, arrays_of(file, saved.layout)) for file in saved.files]
    read = type(saved)(files, saved.rows, saved.trained_rows, saved.layout, saved.centres)
    assert reopened.adopt(read)
    reopened.rows_written(torch.arange(follower.store.num_rows))  # a bank that opens says so of every row
    queries = random(HEADS, 5, DIM, seed=5)
    torch.testing.assert_close(reopened.search(queries, 6), follower.index.search(queries, 6))
    assert [file.ntotal for file in reopened._files] == [124] * HEADS
    follower.index = reopened
    follower.check(6, thorough=False)


def test_what_does_not_fit_is_refused_and_built_anew():
    follower = Follower("ivf:probed_share=1", num_rows=120)
    follower.check(3)
    saved = follower.index.export()

    def changed(**fields):
        return type(saved)(**{**vars(saved), **fields})

    twice, far = saved.rows.copy(), saved.rows.copy()
    twice[0], far[0] = twice[1], 120
    stale = [
        changed(rows=twice),
        changed(rows=far),
        changed(rows=saved.rows[1:]),
        changed(files=saved.files[1:]),
        changed(trained_rows=500),
        changed(centres=saved.centres[:, 1:]),
        changed(layout="IVF3,Flat"),
    ]
    for each in stale:
        reopened = make_index("ivf:probed_share=1", follower.store)
        assert not reopened.adopt(each)
        follower.index = reopened
        follower.check(4)
    assert not make_index("hnsw", follower.store).adopt(saved)
    assert not make_index("flat", follower.store).adopt(saved)
    assert make_index("ivf:probed_share=0.5", follower.store).adopt(saved)  # a setting of searches


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("ifv", "Did you mean `ivf`"),
        (None, "known kinds, got None"),
        ("flat:probes=3", "has no settings"),
        ("ivf:probed_shar=0.1", "Did you mean `probed_share`"),
        ("ivf:", "name=value"),
        ("ivf:probed_share", "name=value"),
        ("ivf:probed_share=2", "from 0.0001 to 1, got '2'"),
        ("ivf:probed_share=nan", "got 'nan'"),
        ("hnsw:neighbors=3.5", "an integer from 2 to 256"),
        ("ivf:storage=int8", "one of float32, float16"),
        ("ivf:probed_share=0.1,probed_share=0.2", "twice"),
    ],
)
def test_a_name_that_means_nothing_is_explained(index, message):
    store = Follower("flat").store
    with pytest.raises(ValueError, match=message):
        make_index(index, store)
