from __future__ import annotations

import pytest
import torch

from longmem.evaluation.reads import chunk_shares, read_passages


def test_shares_add_up_to_what_memory_got(model, bank, rest):
    reads = model(rest[None, :16], memory=bank, output_memory_reads=True).memory_reads
    rows, shares = chunk_shares(reads, slice(3, 9))
    expected = torch.stack([read.memory_share[0, :, 3:9].mean() for read in reads]).mean()
    torch.testing.assert_close(shares.sum(), expected)
    assert (shares.diff() <= 0).all()
    assert len(rows.unique()) == len(rows)
    assert rows.min() >= 0


def test_a_passage_is_the_text_of_its_document(model, bank, past, rest):
    (first, second), (only, *_) = read_passages(model, bank, rest[:16], [slice(5, 6), slice(1, 16)], count=2, context=8)
    decode = model.tokenizer.decode
    for passage in (first, second, only):
        assert passage.document_id == "past"
        assert passage.stop - passage.start == model.config.chunk_size
        assert passage.chunk == decode(past[passage.start : passage.stop])
        assert passage.before == decode(past[max(0, passage.start - 8) : passage.start])
        assert passage.after == decode(past[passage.stop : passage.stop + 8])
    assert first.share >= second.share > 0


def test_the_token_before_makes_the_prediction(model, bank, rest):
    reads = model(rest[None, :16], memory=bank, output_memory_reads=True).memory_reads
    _, shares = chunk_shares(reads, slice(4, 5))
    ((passage,),) = read_passages(model, bank, rest[:16], [slice(5, 6)])
    assert passage.share == pytest.approx(shares[0].item(), rel=1e-5)


def test_nothing_is_read_from_an_empty_bank(model, bank, rest):
    assert read_passages(model, bank.empty_like(), rest[:16], [slice(5, 6)]) == [[]]
