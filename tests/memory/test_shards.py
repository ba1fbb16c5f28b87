"""Several banks read as one: the same as one bank with all documents, and good errors."""

import copy
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem import LongMemForCausalLM, MemoryBank
from longmem.memory import BankShards
from longmem.memory.protocols import Memory

LAYERS = [3, 7]
CHUNK = 2


def make_bank(**changes) -> MemoryBank:
    options = dict(memory_layers=LAYERS, chunk_size=CHUNK, capacity_tokens=256, index="flat", fingerprint="writer")
    return MemoryBank(**{**options, **changes})


def draw(tokens: int, seed: int, heads: int = 2, dim: int = 6):
    """Return keys and values of the two layers."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [[torch.randn(heads, tokens, width, generator=generator) for width in (dim, 5)] for _ in LAYERS]
    return [key for key, _ in pairs], [value for _, value in pairs]


def fill(bank: MemoryBank, documents: dict[str, int], seed: int = 0) -> MemoryBank:
    """Write documents of so many tokens; what is written depends on the name, not on the bank."""
    for name, tokens in documents.items():
        bank.add(name, *draw(tokens, seed + zlib.crc32(name.encode())))
    return bank


def some_queries(count: int = 5) -> torch.Tensor:
    return torch.randn(2, count, 6, generator=torch.Generator().manual_seed(9))


def everything(bank, layer: int, num_chunks: int):
    """Return scores, keys, values and places of what a search finds; missing places have no numbers."""
    rows, scores, *_ = bank.search(layer, some_queries(), num_chunks)
    assert rows.dtype == torch.int64
    assert (scores[rows < 0] == -torch.inf).all()
    keys, values = bank.gather(layer, rows.flatten(1), bank.generation)
    missing = (rows < 0).flatten(1)
    return scores, keys[~missing], values[~missing], bank.locate(rows)


def assert_reads_the_same(one, other, num_chunks: int) -> None:
    for layer in LAYERS:
        *found, places = everything(one, layer, num_chunks)
        *expected, expected_places = everything(other, layer, num_chunks)
        torch.testing.assert_close(found, expected)
        assert places == expected_places


@settings(max_examples=25, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=4).filter(lambda parts: any(parts)),
    num_chunks=st.integers(1, 12),
    index=st.sampled_from(["flat", "exact"]),
)
def test_shards_read_as_one_bank_with_all_documents(shards, num_chunks, index):
    banks, whole = [], make_bank(index=index)
    for number, lengths in enumerate(shards):
        documents = {f"{number}-{place}": tokens for place, tokens in enumerate(lengths)}
        banks.append(fill(make_bank(index=index), documents))
        fill(whole, documents)
    logical = BankShards(banks)
    assert isinstance(logical, Memory)
    assert (logical.num_chunks, logical.num_tokens) == (whole.num_chunks, whole.num_tokens)
    assert logical.is_empty == whole.is_empty
    if not whole.is_empty:
        assert_reads_the_same(logical, whole, num_chunks)


def test_one_shard_is_that_bank_and_its_rows_are_the_same():
    bank = fill(make_bank(), {"a": 20})
    found, expected = (each.search(3, some_queries(), 4) for each in (BankShards([bank]), bank))
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.scores, expected.scores)


def test_equal_scores_stand_in_the_order_of_the_shards():
    banks = [fill(make_bank(), {"same": 6}) for _ in range(3)]
    logical = BankShards(banks)
    rows, scores, *_ = logical.search(3, some_queries(), 9)
    assert torch.equal(scores[..., ::3], scores[..., 2::3])
    assert torch.equal(logical.shard_of(rows), torch.arange(9).remainder(3).expand_as(rows))


def test_rows_stay_good_while_a_shard_grows_and_new_chunks_are_found():
    first, second = fill(make_bank(), {"a": 8}), fill(make_bank(), {"b": 6})
    logical = BankShards([first, second])
    generation, version = logical.generation, logical.version
    rows = logical.search(3, some_queries(), 4).rows
    before, places = logical.gather(3, rows.flatten(1), logical.generation), logical.locate(rows)
    fill(first, {"more": 100})
    assert logical.generation == generation
    assert logical.version != version
    torch.testing.assert_close(logical.gather(3, rows.flatten(1), logical.generation), before, rtol=0, atol=0)
    assert logical.locate(rows) == places
    assert "more" in {place[0] for place in logical.locate(logical.search(3, some_queries(), 4).rows)}


@pytest.mark.parametrize("number", [0, 1])
def test_what_takes_chunks_from_any_shard_changes_the_generation(number):
    banks = [fill(make_bank(capacity_tokens=20), {"a": 8, "b": 6}) for _ in range(2)]
    logical = BankShards(banks)
    changes = {
        "evict": lambda bank: fill(bank, {"c": 12}),
        "delete": lambda bank: bank.delete("c"),
        "clear": lambda bank: bank.clear(),
    }
    for name, change in changes.items():
        generation, version = logical.generation, logical.version
        change(banks[number])
        assert logical.generation > generation, name
        assert logical.version > version, name
    rows = logical.search(3, some_queries(), 20).rows
    assert logical.shard_of(rows).unique().tolist() == [-1, 1 - number]


def test_empty_shards_are_passed_over():
    empty, filled = make_bank(), fill(make_bank(), {"a": 8})
    logical = BankShards([empty, filled, make_bank()])
    assert_reads_the_same(logical, filled, 6)
    rows = logical.search(3, some_queries(), 2).rows
    keys, _ = logical.gather(
        3, rows.flatten(1).clamp_min(0), logical.generation
    )  # attention reads row 0, of an empty shard, and masks it
    assert keys.isfinite().all()
    keys, _ = logical.gather(3, torch.full((2, 3), -1), logical.generation)
    assert keys.shape == (2, 3, CHUNK, 6)
    found = logical.search(3, some_queries(), 5)  # more than are there
    assert (found.rows < 0).any()
    keys, _ = logical.gather(3, found.rows.flatten(1).clamp_min(0), found.generation)
    expected = filled.gather(3, (found.rows.flatten(1) // 3).clamp_min(0), filled.generation)[0]
    is_there = found.rows.flatten(1) >= 0
    assert torch.equal(keys[is_there], expected[is_there])
    filled.supersede("a")
    found = logical.search(3, some_queries(), 5)
    assert (found.rows == -1).all()
    assert logical.gather(3, found.rows.flatten(1).clamp_min(0), found.generation)[0].isfinite().all()

    nothing = BankShards([empty, make_bank()])
    assert nothing.is_empty
    rows, scores, *_ = nothing.search(3, some_queries(), 2)
    assert (rows == -1).all()
    assert (scores == -torch.inf).all()
    with pytest.raises(ValueError, match="ask `is_empty` first"):
        nothing.gather(3, rows.flatten(1), nothing.generation)


def test_names_may_repeat_and_shard_of_tells_them_apart():
    library, mine = fill(make_bank(), {"notes": 8}), fill(make_bank(), {"notes": 4}, seed=1)
    logical = BankShards([library, mine])
    rows = logical.search(3, some_queries(), 7).rows
    shards = logical.shard_of(rows)
    assert shards.shape == rows.shape
    for row, shard, place in zip(rows.flatten().tolist(), shards.flatten().tolist(), logical.locate(rows), strict=True):
        assert place == (None if row < 0 else logical.shards[shard].locate(torch.tensor([row // 2]))[0])
    assert (shards == 0).sum() == 4 * rows[..., 0].numel()


def test_views_and_shards_are_shards_too():
    library, mine = fill(make_bank(), {"a": 8, "b": 6}), fill(make_bank(), {"b": 4, "c": 10})
    logical = BankShards([library.select(["b"]), BankShards([mine])])
    assert len(logical.shards) == 2
    places = logical.locate(logical.search(3, some_queries(), 20).rows)
    assert {place[0] for place in places if place} == {"b", "c"}
    # A view follows its document: what is deleted is found no more, and rows found before are known to be stale.
    generation = logical.generation
    library.delete("b")
    assert logical.generation != generation
    assert logical.shard_of(logical.search(3, some_queries(), 20).rows).max() == 1


def test_rows_found_through_a_view_stay_good_when_its_document_is_renamed():
    library, mine = fill(make_bank(), {"a": 8, "b": 6}), fill(make_bank(), {"c": 4})
    logical = BankShards([library.select("b"), mine])
    generation = logical.generation
    rows = logical.search(3, some_queries(), 5).rows.flatten(1)
    before = logical.gather(3, rows, logical.generation)
    library.rename("b", "other")
    assert logical.generation == generation
    assert logical.num_chunks == 2
    torch.testing.assert_close(logical.gather(3, rows, logical.generation), before, rtol=0, atol=0)


def test_select_reads_the_named_documents_of_every_shard():
    library, mine = fill(make_bank(), {"a": 8, "b": 6}), fill(make_bank(), {"b": 4, "c": 10})
    logical = BankShards([library, mine.select(["b"])])
    selected = logical.select("b")
    places = selected.locate(selected.search(3, some_queries(), 20).rows)
    assert {place[0] for place in places if place} == {"b"}
    assert selected.num_chunks == 5
    assert len(logical.select(["a"]).shards) == 1
    with pytest.raises(ValueError, match='`document_ids` must name a document.*known: "a", "b"'):
        logical.select("c")  # the view hides it
    with pytest.raises(ValueError, match="at least one document"):
        logical.select([])


def test_storage_dtypes_may_differ():
    library, mine = (fill(make_bank(storage_dtype=dtype), {"a": 8}) for dtype in ("float16", "float32"))
    logical = BankShards([library, mine])
    rows = torch.arange(8).expand(2, -1)
    keys, values = logical.gather(7, rows, logical.generation)
    assert keys.dtype == values.dtype == torch.float32
    expected = [bank.gather(7, torch.arange(4).expand(2, -1), bank.generation) for bank in (library, mine)]
    torch.testing.assert_close(keys[:, ::2], expected[0][0].float(), rtol=0, atol=0)
    torch.testing.assert_close(values[:, 1::2], expected[1][1], rtol=0, atol=0)
    assert logical.gather(7, rows[:, ::2], logical.generation)[0].dtype == torch.float16


def test_locate_refuses_rows_that_no_shard_has():
    logical = BankShards([fill(make_bank(), {"a": 8}), fill(make_bank(), {"b": 4})])
    assert [place and place[:3] for place in logical.locate(torch.tensor([6, 3, -1]))] == [
        ("a", 6, 8),
        ("b", 2, 4),
        None,
    ]
    for row in (8, 5, -2):
        with pytest.raises(ValueError, match=f"`rows` must be .* got {row} .*search again"):
            logical.locate(torch.tensor([0, row]))


def wider() -> MemoryBank:
    bank = make_bank()
    bank.add("a", *draw(4, 0, dim=8))
    return bank


BANK = make_bank()
WRONG = {
    "at least one bank": list,
    "put it in a list": lambda: BANK,
    "got dict": lambda: [BANK, {}],
    "different banks": lambda: [make_bank(), BANK, BANK],
    "agree in `memory_layers`": lambda: [BANK, make_bank(memory_layers=[3, 8])],
    "agree in `chunk_size`": lambda: [BANK, make_bank(chunk_size=4)],
    "agree in `fingerprint`.*'?writer'? at place 0.*other": lambda: [BANK, make_bank(fingerprint="other")],
    "agree in head sizes": lambda: [fill(make_bank(), {"a": 4}), wider()],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_banks_are_refused(message):
    with pytest.raises(ValueError, match=f"`banks` must.*{message}|{message}"):
        BankShards(WRONG[message]())


def test_views_of_one_bank_are_that_bank_twice():
    bank = fill(make_bank(), {"a": 4, "b": 4})
    with pytest.raises(ValueError, match=r"place 1: its chunks would be found twice.*`bank.select"):
        BankShards([bank.select("a"), bank.select("b")])


def test_a_bank_without_fingerprint_takes_that_of_the_others():
    assert BankShards([make_bank(fingerprint=None), make_bank()]).fingerprint == "writer"
    assert BankShards([make_bank(fingerprint=None)]).fingerprint is None


# With a model.


@pytest.fixture(scope="module")
def model():
    from model.conftest import SETTINGS, build_backbone

    return LongMemForCausalLM.from_backbone(build_backbone("llama"), **SETTINGS).eval()


def memorized(model: LongMemForCausalLM, **documents: int) -> MemoryBank:
    bank = MemoryBank.for_model(model, index="flat")
    for name, length in documents.items():
        ids = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length))
        model.memorize(bank, ids, document_id=name)
    return bank


PROMPT = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_the_model_reads_shards_as_it_reads_the_one_bank(model):
    whole = memorized(model, a=60, b=41, c=90)
    shards = BankShards([memorized(model, a=60, c=90), MemoryBank.for_model(model), memorized(model, b=41)])
    expected = model(PROMPT, memory=whole, output_memory_reads=True)
    found = model(PROMPT, memory=shards, output_memory_reads=True)
    torch.testing.assert_close(found.logits, expected.logits)
    for read, wanted in zip(found.memory_reads, expected.memory_reads, strict=True):
        assert shards.locate(read.rows) == whole.locate(wanted.rows)
    assert (found.logits - model(PROMPT, memory=shards.shards[0]).logits).abs().max() > 1e-3


@torch.no_grad()
def test_each_row_reads_a_shared_library_and_its_own_bank(model):
    library = memorized(model, a=60)
    private = [memorized(model, b=41), memorized(model, c=90)]
    found = model(PROMPT, memory=[BankShards([library, mine]) for mine in private]).logits
    for row, mine in enumerate(private):
        alone = model(PROMPT[row : row + 1], memory=BankShards([library, mine])).logits
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    same = model(PROMPT, memory=BankShards([library, private[0]])).logits
    assert (found[1] - same[1]).abs().max() > 1e-3


def test_generate_reads_shards(model):
    whole, shards = memorized(model, a=60, b=41), BankShards([memorized(model, a=60), memorized(model, b=41)])
    for options in (dict(do_sample=False), dict(num_beams=2, do_sample=False)):
        found = model.generate(PROMPT, memory=shards, max_new_tokens=6, **options)
        assert found.tolist() == model.generate(PROMPT, memory=whole, max_new_tokens=6, **options).tolist()


def test_gradients_are_those_of_the_one_bank_also_after_a_deletion(model):
    whole, banks = memorized(model, a=60, b=41), [memorized(model, a=60), memorized(model, b=41)]
    gradients = []
    for memory in (whole, BankShards(banks), BankShards(banks)):
        one = copy.deepcopy(model)
        loss = one(PROMPT, memory=memory, labels=PROMPT).loss
        if len(gradients) == 2:
            banks[1].delete("b")  # what the forward pass found there is kept for the backward pass
        loss.backward()
        gradients.append([parameter.grad for parameter in one.side_network.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients[:2], rtol=1e-3, atol=1e-5)
    assert all(map(torch.equal, *gradients[1:]))


def test_banks_of_another_model_and_lists_in_lists_are_refused(model):
    with pytest.raises(ValueError, match="was made for memory layers"):
        model(PROMPT, memory=BankShards([fill(make_bank(), {"a": 4})]))
    with pytest.raises(ValueError, match=r"got list; a row reads several banks through `BankShards"):
        model(PROMPT, memory=[[MemoryBank.for_model(model)], [MemoryBank.for_model(model)]])


def test_select_knows_the_documents_that_a_shard_has_by_a_tag():
    tagged, other = make_bank(), fill(make_bank(), {"b": 8})
    tagged.add("a", *draw(8, 1), tags=["novel"])
    tagged.add("hidden", *draw(8, 2))
    shards = BankShards([tagged.select(tags=["novel"]), other])
    assert {place[0] for place in shards.select("a").locate(torch.arange(4))} == {"a"}
    with pytest.raises(ValueError, match="'hidden'"):
        shards.select("hidden")


def test_one_folder_is_read_once(tmp_path):
    fill(make_bank(), {"a": 4}).save(tmp_path / "bank")
    (tmp_path / "link").symlink_to(tmp_path / "bank")
    banks = [MemoryBank.open(tmp_path / name, read_only=True) for name in ("bank", "link")]
    with pytest.raises(ValueError, match="different banks, got one again at place 1"):
        BankShards(banks)
    assert len(BankShards([banks[0], MemoryBank.load(tmp_path / "bank")]).shards) == 2  # a copy may go another way
