"""What lazy refresh takes first."""

import torch

from longmem import MemoryBank
from longmem.memory.refresh.kinds import most_wanted, strongest
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
