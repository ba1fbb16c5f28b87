"""Stored keys and values: what int8 may change, and what no storage dtype may."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem.memory import MemoryBank
from longmem.memory.rows.storage import SMALLEST_SCALE, STORAGE_DTYPES, decode, encode, stored_width, vector_width
from longmem.model.attention import read_memory

LARGEST = torch.finfo(torch.float32).max
ALL = pytest.mark.parametrize("storage_dtype", STORAGE_DTYPES.values(), ids=STORAGE_DTYPES)


def random_vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_within_half_a_step(vectors: torch.Tensor) -> None:
    """The scale is bfloat16, so a step may be 1/256 longer than absmax / 127, and is never below the smallest scale."""
    stored = encode(vectors, torch.int8)
    vectors, decoded = vectors.double(), decode(stored).double()
    bound = vectors.abs().amax(dim=-1, keepdim=True) / 254 * (1 + 1 / 256)
    assert ((vectors - decoded).abs() <= bound.clamp_min(SMALLEST_SCALE / 2)).all()
    assert torch.equal(encode(decoded, torch.int8), stored)  # what was read can be stored again without further loss


@pytest.mark.parametrize("magnitude", [1e-45, 1e-39, 1e-30, 1e-6, 1.0, 700.0, 7e4, 1e30, 1e38])
def test_int8_is_exact_to_half_a_step_of_each_vector(magnitude):
    vectors = (random_vectors(50, 16).clamp(-3, 3) * magnitude).clamp(-LARGEST, LARGEST)
    assert_within_half_a_step(vectors)
    assert decode(encode(vectors, torch.int8)).isfinite().all()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_any_vector_is_exact_to_half_a_step(numbers):
    assert_within_half_a_step(torch.tensor(numbers))


def test_every_scale_of_a_binade_needs_no_clipping():
    # Where bfloat16 rounds the scale down, 127.496 is what becomes of the largest number: still not 128, which is -128.
    largest = torch.linspace(1, 2, 20_001)
    stored = encode(torch.stack([largest, -largest], dim=1), torch.int8)
    assert (stored[:, 0] == 127).all()
    assert (stored[:, 1] == -127).all()


def test_zeros_and_the_extremes_of_float32():
    zeros = torch.zeros(2, 3, 5)
    assert torch.equal(decode(encode(zeros, torch.int8)), zeros)
    extremes = torch.tensor([[LARGEST, -LARGEST, 0.0], [1e-45, 0.0, -1e-45], [-LARGEST, 1.0, 1e-45]])
    assert_within_half_a_step(extremes)
    assert decode(encode(extremes, torch.int8)).isfinite().all()


def test_one_large_vector_costs_its_neighbours_nothing():
    vectors = random_vectors(2, 4, 8)
    alone = decode(encode(vectors, torch.int8))
    vectors[0, 1] *= 1e6
    beside = decode(encode(vectors, torch.int8))
    assert torch.equal(beside[1], alone[1])
    assert torch.equal(beside[0, 2:], alone[0, 2:])
    assert not torch.equal(beside[0, 1], alone[0, 1])


@ALL
@pytest.mark.parametrize("dim", [1, 2, 5, 64])
def test_widths_invert_each_other_and_say_what_is_stored(storage_dtype, dim):
    stored = encode(random_vectors(3, dim), storage_dtype)
    assert stored.dtype == storage_dtype
    assert stored.shape == (3, stored_width(dim, storage_dtype))
    assert vector_width(stored.shape[1], storage_dtype) == dim
    assert decode(stored).shape == (3, dim)
    assert decode(stored).dtype == (torch.float32 if storage_dtype == torch.int8 else storage_dtype)


@ALL
@pytest.mark.parametrize("dim", [4, 5])
def test_layout_does_not_matter(storage_dtype, dim):
    whole = random_vectors(dim, 6, 4).transpose(0, 2)
    for vectors in (whole, whole[:, ::2], whole[:1, :1], whole[:0], whole[2, 3]):
        stored = encode(vectors, storage_dtype)
        assert torch.equal(stored, encode(vectors.contiguous(), storage_dtype))
        # One vector at a time starts at any address, odd ones too.
        rows = stored.reshape(-1, stored.shape[-1])
        for row, decoded in zip(rows, decode(stored).reshape(-1, dim), strict=True):
            assert torch.equal(decode(row), decoded)
    turned = encode(whole, storage_dtype).transpose(0, 1)
    assert torch.equal(decode(turned), decode(turned.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_input_is_encoded_as_float32(dtype):
    vectors = random_vectors(3, 6).to(dtype)
    assert torch.equal(encode(vectors, torch.int8), encode(vectors.float(), torch.int8))


def filled_bank(storage_dtype: str, dim: int = 64) -> MemoryBank:
    bank = MemoryBank(memory_layers=[2], chunk_size=4, storage_dtype=storage_dtype)
    keys, values = random_vectors(3, 40, dim), random_vectors(3, 40, dim, seed=1)
    bank.add("a", [keys], [values])
    return bank


def test_int8_takes_half_the_room_and_finds_the_same_chunks():
    half, small = filled_bank("float16"), filled_bank("int8")
    search_keys = small._table.storage.layer(0).search_keys.nbytes
    assert (small.nbytes - search_keys) / (half.nbytes - search_keys) == 66 / 128
    queries = random_vectors(3, 7, 64, seed=2)
    found, expected = small.search(2, queries, 5), half.search(2, queries, 5)
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.scores, expected.scores)


def test_attention_over_int8_is_near_that_over_float16():
    queries = random_vectors(1, 9, 7, 64, seed=2)
    outputs = {
        name: read_memory(queries, [filled_bank(name)], 2, num_kv_heads=3, num_chunks=5, scaling=1 / 8).output
        for name in ("float32", "float16", "int8")
    }
    error = {name: (output - outputs["float32"]).norm() / outputs["float32"].norm() for name, output in outputs.items()}
    assert 0 < error["float16"] < 1e-3 < error["int8"] < 2e-2


@ALL
def test_numbers_whose_means_or_scores_would_be_infinite_are_refused(storage_dtype):
    bank = MemoryBank(memory_layers=[0], chunk_size=4, storage_dtype=storage_dtype)
    for number in (1.3e30, 1e38, torch.finfo(torch.float32).max):
        with pytest.raises(ValueError, match=f"must fit the storage dtype .*, got {number:.6g}".replace("+", r"\+")):
            bank.add("a", [torch.full((1, 4, 2), number)], [torch.ones(1, 4, 2)])
    largest = 65504.0 if storage_dtype == torch.float16 else 2.0**100
    bank.add("a", [torch.full((1, 4, 2), largest)], [torch.full((1, 4, 2), largest)])
    found = bank.search(0, torch.full((1, 1, 2), 1e3), 1)
    assert found.scores.isfinite().all()
    assert bank.search_keys(0).isfinite().all()
