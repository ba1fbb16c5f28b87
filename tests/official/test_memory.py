"""The released memory, against a list of tokens."""

import pytest
import torch

from longmem.official.memory import OfficialMemory, ReleasedCodeError

HEADS, DIM, CHUNK, CAPACITY = 2, 4, 3, 12


def batch(lanes, tokens, seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(lanes, HEADS, tokens, DIM, generator=draw) for _ in range(2)]


def new_memory(**changes):
    return OfficialMemory(**{"memory_layer": 5, "chunk_size": CHUNK, "memory_size": CHUNK * CAPACITY + 1} | changes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_it_holds_what_a_list_of_tokens_would(dtype):
    memory, chunks = new_memory(storage_dtype=dtype), []
    for seed, (lanes, tokens) in enumerate([(1, 7), (2, 4), (1, 2), (2, 5), (1, 8), (3, 3), (1, 10), (2, 4), (1, 6)]):
        keys, values = batch(lanes, tokens, seed)
        stream = [(keys[lane, :, token], values[lane, :, token]) for lane in range(lanes) for token in range(tokens)]
        new = [stream[i : i + CHUNK] for i in range(0, len(stream) - CHUNK + 1, CHUNK)]
        if len(chunks) + len(new) >= CAPACITY:
            chunks = chunks[2 * len(stream) // CHUNK :]
        chunks += new
        memory.write([keys], [values])
        assert memory.num_chunks == len(chunks) < CAPACITY
        assert not memory.keys[:, len(chunks) :].any()
        for row, chunk in enumerate(chunks):
            expected = torch.stack([key for key, _ in chunk], dim=1)
            assert torch.equal(memory.keys[:, row], expected.to(dtype))
            torch.testing.assert_close(memory.search_keys[:, row], expected.mean(1))  # of unrounded keys
    memory.clear()
    assert memory.is_empty
    assert not memory.keys.any()


def test_it_has_only_the_dtypes_that_a_cast_makes():
    with pytest.raises(ValueError, match="storage_dtype.*'int8'"):
        new_memory(storage_dtype="int8")


def test_a_missing_slot_is_a_zero_row_with_score_zero():
    memory = new_memory()
    keys, values = batch(1, CHUNK, 0)
    memory.write([keys], [values])
    rows, scores, *_ = memory.search(5, torch.randn(HEADS, 6, DIM), 3)
    assert (rows[..., 0] == 0).all()
    assert (rows[..., 1:] == memory.zero_row).all()
    assert (scores[..., 1:] == 0).all()
    assert not memory.gather(5, rows[:, :, 1], memory.generation)[0].any()


@pytest.mark.parametrize(
    ("tokens", "capacity", "words"),
    [([8, 8], 3, "at most two batches"), ([3, 21], 8, "long batch after a short one"), ([60], 12, "crashes")],
    ids=["E2", "E3", "too long"],
)
def test_what_the_released_code_gets_wrong_is_an_error_and_writes_nothing(tokens, capacity, words):
    memory = new_memory(memory_size=CHUNK * capacity)
    *before, last = (batch(1, length, 0) for length in tokens)
    for keys, values in before:
        memory.write([keys], [values])
    count, kept = memory.num_chunks, memory.keys.clone()
    with pytest.raises(ReleasedCodeError, match=words):
        memory.write([last[0]], [last[1]])
    assert memory.num_chunks == count
    assert torch.equal(memory.keys, kept)


def test_numbers_too_large_for_the_rows_are_an_error():
    keys, values = batch(1, CHUNK, 0)
    with pytest.raises(ReleasedCodeError, match="do not fit torch.float16"):
        new_memory().write([keys * 1e6], [values])
    new_memory(storage_dtype="float32").write([keys * 1e6], [values])
