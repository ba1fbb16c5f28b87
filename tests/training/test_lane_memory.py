from __future__ import annotations

import dataclasses

import pytest
import torch
from datasets import Dataset
from tiny_models import save_tiny_backbone

from longmem.data import Lanes
from longmem.memory import BankShards
from longmem.model.modeling import LongMemForCausalLM
from longmem.training.features import FrozenFeatures
from longmem.training.lane_memory import LaneMemories, preceding_tokens

WINDOW = 16
CAPACITY = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_backbone(tmp_path_factory.mktemp("backbone"))
    return LongMemForCausalLM.from_backbone(str(folder), num_retrieved_tokens=8, segment_length=WINDOW).eval()


@pytest.fixture(scope="module")
def lanes():
    generator = torch.Generator().manual_seed(2)
    lengths = (150, 70, 33, 90, 17)
    documents = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    corpus = Dataset.from_dict({"document_id": [f"d{n}" for n in range(len(lengths))], "input_ids": documents})
    return Lanes(corpus, num_lanes=2, window=WINDOW, seed=1)


@pytest.fixture
def states_of(model):
    features = FrozenFeatures(model)
    return lambda batch: features.of(batch.input_ids, batch.lengths).states


def make(model, **changes):
    options = {"keep_documents": False, "foreign_lanes": 0, "index": "flat", **changes}
    return LaneMemories(model, 2, **options)


def contents(memories):
    """Return what each bank holds: documents, token ids, keys and values of every layer."""
    found = []
    for bank in memories.banks:
        documents = bank.documents()
        rows = torch.arange(bank.num_chunks).expand(2, -1)
        layers = () if bank.is_empty else bank.memory_layers
        stored = [torch.zeros(1), *(tensor for layer in layers for tensor in bank.gather(layer, rows, bank.generation))]
        ids = [bank.token_ids(document.document_id).tolist() for document in documents]
        found.append(
            ([document.document_id for document in documents], ids, torch.cat([each.flatten() for each in stored]))
        )
    return found


def play(memories, lanes, steps, states_of, capacity=CAPACITY):
    """Do what a run does before each of `steps` steps and after it, but before the last: only what comes before."""
    for step in range(steps + 1):
        batch = lanes.batch(step)
        size = capacity(step) if callable(capacity) else capacity
        memories.prepare(batch, step, size, lanes.batch, states_of)
        if step < steps:
            memories.write(batch, states_of(batch))
    return memories


def same_contents(first, second):
    for (names, ids, stored), (other_names, other_ids, other_stored) in zip(
        contents(first), contents(second), strict=True
    ):
        assert names == other_names
        assert ids == other_ids
        torch.testing.assert_close(stored.sort().values, other_stored.sort().values, rtol=0, atol=0)


@pytest.mark.parametrize("keep_documents", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 6, 9, 13, 22, 40])
def test_rebuilt_memory_is_that_of_an_uninterrupted_run(model, lanes, states_of, steps, keep_documents):
    went_on = play(make(model, keep_documents=keep_documents), lanes, steps, states_of)
    rebuilt = make(model, keep_documents=keep_documents)
    rebuilt.prepare(lanes.batch(steps), steps, CAPACITY, lanes.batch, states_of)
    same_contents(rebuilt, went_on)


@pytest.mark.parametrize("steps", [5, 8, 12])
def test_a_growing_memory_holds_what_one_of_that_size_would(model, lanes, states_of, steps):
    grown = play(make(model), lanes, steps, states_of, lambda step: 16 if step < 4 else 32 if step < 8 else 64)
    final = 16 if steps < 4 else 32 if steps < 8 else 64
    same_contents(grown, play(make(model), lanes, steps, states_of, final))
    assert max(bank.num_tokens for bank in grown.banks) <= final


def test_a_lane_holds_the_text_before_its_window_and_nothing_else(model, lanes, states_of):
    memories = make(model)
    seen = 0
    for step in range(30):
        batch = lanes.batch(step)
        memories.prepare(batch, step, 4096, lanes.batch, states_of)
        for lane, bank in enumerate(memories.banks):
            if batch.is_new[lane]:
                assert bank.is_empty
                assert not bank.documents()
                continue
            (document,) = bank.documents()
            assert document.document_id == batch.document_ids[lane]
            whole = preceding_tokens(lanes.batch, step, lane, 10_000)
            assert len(whole) == batch.offsets[lane]
            assert bank.token_ids(document.document_id).tolist() == whole.tolist()
            seen += 1
        memories.write(batch, states_of(batch))
    assert seen > 20


def test_padding_is_never_stored(model, lanes, states_of):
    memories = make(model, keep_documents=True)
    written = 0
    for step in range(12):
        batch = lanes.batch(step)
        memories.prepare(batch, step, 4096, lanes.batch, states_of)
        memories.write(batch, states_of(batch))
        written += batch.lengths[0]
    documents = memories.banks[0].documents()
    assert any(length < WINDOW for step in range(12) for length in lanes.batch(step).lengths)
    assert sum(len(memories.banks[0].token_ids(each.document_id)) for each in documents) <= written


def test_foreign_lanes_are_read_beside_the_own(model, lanes, states_of):
    alone, together = make(model), make(model, foreign_lanes=1)
    for memories in (alone, together):
        play(memories, lanes, 2, states_of)
    batch = lanes.batch(2)
    assert alone.readable(batch) == alone.banks
    for lane, readable in enumerate(together.readable(batch)):
        assert isinstance(readable, BankShards)
        assert readable.shards[0] is together.banks[lane]
        assert readable.num_tokens == sum(bank.num_tokens for bank in together.banks)


def test_a_foreign_lane_with_the_same_document_is_not_read(model, lanes, states_of):
    memories = play(make(model, foreign_lanes=1), lanes, 1, states_of)
    batch = lanes.batch(1)
    (other,) = memories.banks[1].documents()
    same = dataclasses.replace(batch, document_ids=(other.document_id, other.document_id))
    assert memories.readable(same)[0] is memories.banks[0]
    assert isinstance(memories.readable(batch)[0], BankShards)


def test_more_foreign_lanes_than_there_are(model):
    with pytest.raises(ValueError, match="`memory.foreign_lanes` must be below the 2 lanes"):
        make(model, foreign_lanes=2)


@pytest.mark.parametrize("count", [0, 1, 5, 16, 20, 1000])
def test_preceding_tokens_end_where_the_window_begins(lanes, count):
    for step in range(12):
        for lane in range(2):
            batch = lanes.batch(step)
            found = preceding_tokens(lanes.batch, step, lane, count).tolist()
            assert len(found) == min(count, batch.offsets[lane])
            tokens, at = [], step
            while not lanes.batch(at).is_new[lane]:
                at -= 1
                earlier = lanes.batch(at)
                tokens = earlier.input_ids[lane, : earlier.lengths[lane]].tolist() + tokens
            assert found == tokens[len(tokens) - len(found) :]
