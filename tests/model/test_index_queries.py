"""Queries as a model asks them."""

import torch

from longmem.model.index_queries import QueryRecorder, recorded_queries


@torch.no_grad()
def test_a_recorder_changes_nothing_and_keeps_what_every_layer_asks(model, bank, rest):
    recorder, window = QueryRecorder(bank), rest[None, :16]
    with_recorder = model(window, memory=recorder, output_memory_reads=True)
    plain = model(window, memory=bank, output_memory_reads=True)
    torch.testing.assert_close(with_recorder.logits, plain.logits, rtol=0, atol=0)
    assert list(recorder.queries) == list(bank.memory_layers) == [read.layer for read in plain.memory_reads]
    for read in plain.memory_reads:
        (queries,) = recorder.queries[read.layer]
        num_chunks = read.rows.shape[-1]
        found = bank.search(read.layer, queries, num_chunks).rows
        assert found.shape == (2, 2 * 16, num_chunks)  # two query heads share a key-value head
        assert sorted(found.flatten().tolist()) == sorted(read.rows.flatten().tolist())


def test_queries_are_spaced_evenly_over_the_first_windows(model, bank, rest):
    layer = bank.memory_layers[0]
    everything = recorded_queries(model, bank, rest, layer, num_windows=2)
    assert everything.shape[1] == 2 * 2 * 16
    torch.testing.assert_close(recorded_queries(model, bank, rest[:32], layer, num_windows=9), everything)
    some = recorded_queries(model, bank, rest, layer, num_windows=2, num_queries=4)
    torch.testing.assert_close(some, everything[:, [0, 21, 42, 63]])
