from __future__ import annotations

import pytest
import torch

from longmem.model.reads import table_of_reads
from longmem.tracing import read_passages


def test_weights_add_up_to_what_memory_got(model, bank, rest):
    reads = model(rest[None, :16], memory=bank, output_memory_reads=True).memory_reads
    table = table_of_reads([reads], 16)
    assert len(table) == 16
    expected = torch.stack([read.memory_share[0].mean(dim=0) for read in reads]).mean(dim=0)
    summed = torch.tensor([table.weights[table.of(position)].sum() for position in range(16)])
    torch.testing.assert_close(summed.float(), expected)
    (read,) = reads
    entry = table.of(7).start
    by_hand = sum(
        read.chunk_weights[0, head, 7, slot] * read.memory_share[0, head, 7] / 4
        for head in range(4)
        for slot in range(read.rows.shape[-1])
        if read.rows[0, head, 7, slot] == table.rows[table.chunks[entry]]
    )
    assert table.weights[entry] == pytest.approx(float(by_hand), rel=1e-5)


def test_a_passage_is_the_text_of_its_document(model, bank, past, rest):
    (first, second), (only, *_) = read_passages(model, bank, rest[:16], [slice(5, 6), slice(1, 16)], count=2, context=8)
    decode = model.tokenizer.decode
    for passage in (first, second, only):
        assert passage.document_id == "past"
        assert passage.stop - passage.start == model.config.chunk_size
        assert passage.chunk == decode(past[passage.start : passage.stop])
        assert passage.before == decode(past[max(0, passage.start - 8) : passage.start])
        assert passage.after == decode(past[passage.stop : passage.stop + 8])
    assert first != second
    assert 0 < first.share < 1


def test_the_token_before_makes_the_prediction(model, bank, rest):
    reads = model(rest[None, :16], memory=bank, output_memory_reads=True).memory_reads
    table = table_of_reads([reads], 16)
    own = table.of(4)
    best = own.start + table.surprise()[own].argmax()
    ((passage,),) = read_passages(model, bank, rest[:16], [slice(5, 6)])
    row = torch.tensor([table.rows[table.chunks[best]]])
    assert [place[:3] for place in bank.locate(row)] == [("past", passage.start, passage.stop)]
    assert passage.share == pytest.approx(table.weights[best], rel=1e-5)


def test_nothing_is_read_from_an_empty_bank(model, bank, rest):
    assert read_passages(model, bank.empty_like(), rest[:16], [slice(5, 6)]) == [[]]
