"""The chunk store against a plain list of chunks."""

import pytest
import torch

from longmem.memory.rows.storage import Chunks, ChunkStore, LayerShape, cut_into_chunks, decode

SHAPE = LayerShape(kv_heads=2, key_dim=3, value_dim=5)
CHUNK_SIZE = 4


@pytest.fixture(params=[torch.float16, torch.int8], ids=str)
def dtype(request):
    return request.param


def random_chunks(num_chunks: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Chunks:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, num_chunks * CHUNK_SIZE, 3, generator=generator)
    values = torch.randn(2, num_chunks * CHUNK_SIZE, 5, generator=generator)
    return cut_into_chunks(keys, values, CHUNK_SIZE, dtype)


def new_store(capacity: int = 64, dtype: torch.dtype = torch.float16) -> ChunkStore:
    return ChunkStore(random_chunks(0, dtype=dtype), capacity)


def filled_store(num_chunks: int, dtype: torch.dtype = torch.float16) -> ChunkStore:
    store = new_store(dtype=dtype)
    store.write(torch.arange(num_chunks), random_chunks(num_chunks, dtype=dtype))
    return store


def assert_holds(store: ChunkStore, expected: Chunks) -> None:
    for held, wanted in zip(store.live, expected, strict=True):
        torch.testing.assert_close(held, wanted, rtol=0, atol=0)


def test_search_key_is_the_float32_mean_of_unrounded_keys(dtype):
    keys = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    chunks = cut_into_chunks(keys, keys, CHUNK_SIZE, dtype)
    naive = torch.stack([keys[:, 0:4].sum(1) / 4, keys[:, 4:8].sum(1) / 4], dim=1)
    torch.testing.assert_close(chunks.search_keys, naive, rtol=1e-6, atol=1e-6)
    of_rounded = decode(chunks.keys).float().mean(2)
    assert (chunks.search_keys - of_rounded).abs().max() > 1e-6


def test_write_in_pieces_equals_write_at_once(dtype):
    chunks = random_chunks(10, dtype=dtype)
    store = new_store(dtype=dtype)
    for start, stop in ((0, 1), (1, 4), (4, 10)):
        store.write(torch.arange(start, stop), Chunks(*(tensor[:, start:stop] for tensor in chunks)))
    assert_holds(store, chunks)


def test_overwritten_rows_change_and_others_do_not(dtype):
    store, before, new = filled_store(6, dtype), random_chunks(6, dtype=dtype), random_chunks(2, seed=1, dtype=dtype)
    store.write(torch.tensor([4, 1]), new)
    for held, old, written in zip(store.live, before, new, strict=True):
        torch.testing.assert_close(held[:, [4, 1]], written, rtol=0, atol=0)
        torch.testing.assert_close(held[:, [0, 2, 3, 5]], old[:, [0, 2, 3, 5]], rtol=0, atol=0)


def test_move_and_truncate_keep_the_other_rows(dtype):
    store, before = filled_store(6, dtype), random_chunks(6, dtype=dtype)
    store.move(torch.tensor([4, 5]), torch.tensor([2, 0]))
    store.truncate(4)
    assert_holds(store, Chunks(*(tensor[:, [5, 1, 4, 3]] for tensor in before)))


def test_gather_equals_indexing_head_by_head(dtype):
    store, chunks = filled_store(6, dtype), random_chunks(6, dtype=dtype)
    rows = torch.tensor([[5, 0, 0, -1], [1, 2, 5, 3]])
    keys, values = store.gather(rows)
    for head in range(2):
        assert torch.equal(keys[head], decode(chunks.keys[head, rows[head].clamp(min=0)]))
        assert torch.equal(values[head], decode(chunks.values[head, rows[head].clamp(min=0)]))
    assert keys.shape == (2, 4, CHUNK_SIZE, 3)
    assert values.shape == (2, 4, CHUNK_SIZE, 5)


def test_memory_grows_with_the_rows_by_doubling_up_to_the_capacity(dtype):
    store, sizes = new_store(capacity=24, dtype=dtype), []
    assert store.nbytes == 0
    for row in range(24):
        store.write(torch.tensor([row]), random_chunks(1, dtype=dtype))
        sizes.append(store.nbytes)
    token_bytes = (3 + 5) * 2 if dtype == torch.float16 else (3 + 2) + (5 + 2)
    row_bytes = 2 * (CHUNK_SIZE * token_bytes + 3 * 4)
    assert sorted(set(sizes)) == [rows * row_bytes for rows in (1, 2, 4, 8, 16, 24)]


def test_search_keys_are_the_stored_vectors_themselves():
    store = filled_store(5)
    search_keys = store.search_keys
    assert all(head.is_contiguous() for head in search_keys)
    store.write(torch.tensor([2]), random_chunks(1, seed=3))
    torch.testing.assert_close(search_keys[:, 2:3], random_chunks(1, seed=3).search_keys, rtol=0, atol=0)


def test_a_store_of_given_chunks_knows_the_true_sizes(dtype):
    store = ChunkStore(random_chunks(3, dtype=dtype), 64)
    assert store.shape == SHAPE
    store.write(torch.arange(3, 5), random_chunks(2, seed=1, dtype=dtype))
    whole = filled_store(3, dtype)
    whole.write(torch.arange(3, 5), random_chunks(2, seed=1, dtype=dtype))
    assert_holds(store, whole.live)


def test_a_gap_is_our_own_mistake():
    with pytest.raises(AssertionError):
        filled_store(3).write(torch.tensor([5]), random_chunks(1))
