"""What the memory bank refuses: the message names the argument and the value, and nothing is half written."""

import jaxtyping
import pytest
import torch

from longmem.memory import MemoryBank

LAYERS = (3, 7)
SIZES = {3: (2, 6, 6), 7: (1, 8, 4)}  # kv_heads, key_dim, value_dim: other ones for each layer


def new_bank(**options) -> MemoryBank:
    return MemoryBank(**{"memory_layers": LAYERS, "chunk_size": 4, "capacity_tokens": 64, **options})


def random_tokens(num_tokens: int, seed: int = 0):
    """Return the keys and the values of `num_tokens` tokens for both layers."""
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.randn(SIZES[layer][0], num_tokens, SIZES[layer][1], generator=generator) for layer in LAYERS]
    values = [torch.randn(SIZES[layer][0], num_tokens, SIZES[layer][2], generator=generator) for layer in LAYERS]
    return keys, values


def part(tensors, start, stop):
    return [tensor[:, start:stop] for tensor in tensors]


def state(bank: MemoryBank):
    """Return all that can be read from the only document of a bank."""
    read = [bank.documents(), bank.token_ids("moby-dick").tolist(), bank.nbytes]
    for layer, (heads, dim, _) in SIZES.items():
        rows, scores, *_ = bank.search(layer, torch.ones(heads, 1, dim), 5)
        keys, values = bank.gather(layer, rows[:, 0], bank.generation)
        read += [scores.tolist(), bank.locate(rows), keys.tolist(), values.tolist()]
    return read


def changed(index_of_layer: int, change, of_values: bool = False):
    """Return good keys and values of 8 tokens, with one of the tensors changed."""
    keys, values = random_tokens(8)
    tensors = values if of_values else keys
    tensors[index_of_layer] = change(tensors[index_of_layer])
    return keys, values


def put(number: float):
    def change(tensor):
        tensor[0, 5, 1] = number
        return tensor

    return change


def gather_first(bank):
    return bank.gather(3, torch.zeros(2, 1, dtype=torch.int64), bank.generation)


GOOD = random_tokens(8)
# What is done to a bank that holds "moby-dick", of 10 tokens with ids; what the message must hold.
BAD_CALLS = {
    "duplicate id": (lambda bank: bank.add("moby-dick", *GOOD), ["document_id", "moby-dick", "append", "update"]),
    "empty id": (lambda bank: bank.add("", *GOOD), ["document_id", "string", "''"]),
    "id of a number": (lambda bank: bank.add(5, *GOOD), ["document_id", "string", "5"]),
    "append to unknown": (lambda bank: bank.append("moby-dik", *GOOD), ["moby-dik", "Did you mean `moby-dick`", "add"]),
    "delete unknown": (lambda bank: bank.delete("emma"), ["document_id", "emma", 'known: "moby-dick"']),
    "update unknown": (lambda bank: bank.update("emma", "x", model=None), ["emma", "moby-dick"]),
    "ids of unknown": (lambda bank: bank.token_ids("emma"), ["emma", "moby-dick"]),
    "select unknown": (lambda bank: bank.select(["moby-dick", "emma"]), ["document_ids", "emma", "moby-dick"]),
    "select nothing": (lambda bank: bank.select([]), ["document_ids", "at least one"]),
    "rename unknown": (lambda bank: bank.rename("emma", "e"), ["old", "emma", "moby-dick"]),
    "rename to known": (lambda bank: bank.rename("moby-dick", "moby-dick"), ["new", "moby-dick"]),
    "rename to nothing": (lambda bank: bank.rename("moby-dick", ""), ["new", "string"]),
    "one layer of two": (lambda bank: bank.add("b", GOOD[0][:1], GOOD[1]), ["keys", "1 of them", "(3, 7)"]),
    "no sequence": (lambda bank: bank.add("b", GOOD[0], None), ["values", "NoneType"]),
    "no tensor": (lambda bank: bank.add("b", [[1.0], [2.0]], GOOD[1]), ["keys", "list", "layer 3"]),
    "a batch": (lambda bank: bank.add("b", *changed(1, lambda t: t.unsqueeze(0))), ["keys", "(1, 1, 8, 8)", "layer 7"]),
    "no numbers": (lambda bank: bank.add("b", *changed(0, lambda t: t.to("meta"))), ["keys", "floating-point"]),
    "sparse": (lambda bank: bank.add("b", *changed(1, lambda t: t.to_sparse(), True)), ["values", "layer 7"]),
    "eight bits": (lambda bank: bank.add("b", *changed(0, lambda t: t.to(torch.float8_e4m3fn))), ["keys", "float8"]),
    "a question of no numbers": (
        lambda bank: bank.search(3, torch.ones(2, 1, 6, device="meta"), 2),
        ["queries", "meta"],
    ),
    "words that are none": (lambda bank: bank.find(5), ["text", "must have a word", "5"]),
    "integers": (lambda bank: bank.add("b", *changed(0, lambda t: t.long())), ["keys", "torch.int64"]),
    "fewer values": (lambda bank: bank.add("b", *changed(1, lambda t: t[:, :7], True)), ["(1, 7, 4)", "layer 7"]),
    "fewer tokens in a layer": (
        lambda bank: bank.add("b", part(GOOD[0][:1], 0, 8) + part(GOOD[0][1:], 0, 7), part(GOOD[1], 0, 8)),
        ["(1, 7, 8)", "layer 7", "8 tokens"],
    ),
    "another number of heads": (lambda bank: bank.add("b", *changed(0, lambda t: t[:1])), ["(1, 8, 6)", "layer 3"]),
    "another width": (lambda bank: bank.add("b", *changed(0, lambda t: t[..., :5])), ["key_dim=5", "key_dim=6"]),
    "zero tokens": (lambda bank: bank.add("b", part(GOOD[0], 0, 0), part(GOOD[1], 0, 0)), ["keys", "zero tokens"]),
    "zero tokens appended": (
        lambda bank: bank.append("moby-dick", part(GOOD[0], 0, 0), part(GOOD[1], 0, 0), []),
        ["keys", "zero tokens"],
    ),
    "NaN": (lambda bank: bank.add("b", *changed(1, put(float("nan")))), ["`keys` of layer 7", "finite"]),
    "minus infinity": (lambda bank: bank.add("b", *changed(0, put(-torch.inf), True)), ["`values` of layer 3", "inf"]),
    "too large for float16": (
        lambda bank: bank.add("b", *changed(0, put(-70000.0), True)),
        ["`values` of layer 3", "float16", "65504", "70000", "bfloat16", "float32"],
    ),
    "too few ids": (lambda bank: bank.add("b", *GOOD, [1, 2]), ["token_ids", "2 ids", "8 tokens"]),
    "a batch of ids": (lambda bank: bank.add("b", *GOOD, torch.ones(1, 8).long()), ["token_ids", "(1, 8)"]),
    "ids of floats": (lambda bank: bank.add("b", *GOOD, torch.ones(8)), ["token_ids", "float32"]),
    "ids too large": (lambda bank: bank.add("b", *GOOD, [2**31] * 8), ["token_ids", "2147483647", "2147483648"]),
    "ids below zero": (lambda bank: bank.add("b", *GOOD, [-1] * 8), ["token_ids", "-1"]),
    "text of numbers": (lambda bank: bank.add("b", *GOOD, range(8), text=5, char_ends=range(8)), ["text", "int"]),
    "tags of a number": (lambda bank: bank.tag("moby-dick", 5), ["tags", "5"]),
    "ids missing": (lambda bank: bank.append("moby-dick", *GOOD), ["token_ids", "none", "started with"]),
    "unknown layer": (lambda bank: bank.search(4, torch.ones(2, 1, 6), 1), ["layer", "(3, 7)", "4"]),
    "no chunks": (lambda bank: bank.search(3, torch.ones(2, 1, 6), 0), ["num_chunks", "at least 1", "0"]),
    "half a chunk": (lambda bank: bank.search(3, torch.ones(2, 1, 6), 1.5), ["num_chunks", "1.5"]),
    "query width": (lambda bank: bank.search(3, torch.ones(2, 1, 7), 1), ["queries", "(2, queries, 6)", "(2, 1, 7)"]),
    "query heads": (lambda bank: bank.search(3, torch.ones(6, 1, 6), 1), ["queries", "(6, 1, 6)"]),
    "query batch": (lambda bank: bank.search(3, torch.ones(1, 2, 1, 6), 1), ["queries", "(1, 2, 1, 6)"]),
    "rows of the past": (lambda bank: bank.locate(torch.tensor([0, 3])), ["rows", "from -1 to 2", "0 to 3"]),
    "gather from nothing": (
        lambda bank: gather_first(bank.empty_like()),
        ["empty", "num_chunks"],
    ),
}


@pytest.mark.parametrize("storage_dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("number", [float("nan"), torch.inf, -torch.inf])
def test_no_storage_dtype_takes_what_is_not_finite(storage_dtype, number):
    bank = new_bank(storage_dtype=storage_dtype)
    with pytest.raises(ValueError, match="`values` of layer 7 must be finite"):
        bank.add("a", *changed(1, put(number), of_values=True))
    assert "a" not in bank


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_named_and_changes_nothing(name, monkeypatch):
    # Some arguments have wrong types on purpose: our check must see them, not the one that runs in tests only.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    call, parts = BAD_CALLS[name]
    bank = new_bank()
    bank.add("moby-dick", *random_tokens(10, seed=1), range(10))
    before = state(bank)
    with pytest.raises(ValueError) as caught:
        call(bank)
    assert [wanted for wanted in parts if wanted not in str(caught.value)] == [], str(caught.value)
    assert state(bank) == before


BAD_SETTINGS = {
    "no layer": ({"memory_layers": []}, ["memory_layers", "at least one", "for_model"]),
    "a layer twice": ({"memory_layers": [3, 3]}, ["memory_layers", "distinct", "(3, 3)"]),
    "a negative layer": ({"memory_layers": [-1]}, ["memory_layers", "(-1,)"]),
    "chunks of nothing": ({"chunk_size": 0}, ["chunk_size", "at least 1", "0"]),
    "less than a chunk": ({"capacity_tokens": 3}, ["capacity_tokens", "at least one chunk", "3", "4"]),
    "not whole chunks": ({"capacity_tokens": 10}, ["capacity_tokens", "multiple", "10", "8", "12"]),
    "unknown index": ({"index": "flatt"}, ["index", "'flatt'", "Did you mean `flat`"]),
    "unknown eviction": ({"eviction": "fifi"}, ["eviction", "'fifi'", "Did you mean `fifo`"]),
    "unknown dtype": ({"storage_dtype": "bf16"}, ["storage_dtype", "'bf16'", "Did you mean `bfloat16`"]),
    "unusable dtype": ({"storage_dtype": torch.int16}, ["storage_dtype", "'int16'", "float16"]),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_named(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    options, parts = BAD_SETTINGS[name]
    with pytest.raises(ValueError) as caught:
        new_bank(**options)
    assert [wanted for wanted in parts if wanted not in str(caught.value)] == [], str(caught.value)


def test_numbers_too_large_for_float16_fit_the_other_dtypes():
    keys, values = changed(0, put(70000.0))
    for dtype in ("bfloat16", "float32", "int8"):
        bank = new_bank(storage_dtype=dtype)
        bank.add("a", keys, values)
        assert torch.isfinite(bank.gather(3, torch.tensor([[0, 1], [0, 1]]), bank.generation)[0]).all()


def test_a_refused_first_write_fixes_no_sizes():
    bank = new_bank()
    with pytest.raises(ValueError, match="finite"):
        bank.add("a", *changed(0, put(float("nan"))))
    narrow = [torch.ones(1, 4, 2)] * 2
    bank.add("a", narrow, narrow)
    assert bank.num_chunks == 1
    with pytest.raises(ValueError, match=r"`clear\(\)`"):
        bank.add("b", *GOOD)
    bank.clear()
    bank.add("b", *GOOD)
    assert bank.num_chunks == 2
