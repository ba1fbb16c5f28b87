"""`explain`: what it says was read is what attention read, and the page shows it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from tiny_models import some_text
from torch.nn import functional

import longmem
from longmem import MemoryBank
from longmem.model.index_queries import QueryRecorder
from longmem.tracing.words import pieces_of_text

PROMPT = "the cat sat on a mat"


@pytest.fixture
def filled(model):
    bank = MemoryBank.for_model(model)
    model.memorize(bank, some_text(30), "words")
    model.memorize(bank, "Zwölf Boxkämpfer jagen Viktor </script><b>x</b> quer über den Deich.", "deich")
    return bank


def reads_of(model, ids, bank):
    reads = model(torch.tensor([ids]), memory=bank, output_memory_reads=True).memory_reads
    weights = torch.stack([read.chunk_weights[0] * read.memory_share[0][..., None] for read in reads])
    return torch.stack([read.rows[0] for read in reads]), weights.detach()


def test_weights_of_a_token_sum_to_its_share_of_memory_also_over_several_windows(model, filled):
    trace = longmem.explain(model, some_text(12, seed=4), memory=filled, max_new_tokens=0)
    assert len(trace) > 2 * model.config.segment_length
    ids = model.tokenizer("".join(trace.words))["input_ids"]
    rows, weights = reads_of(model, ids, filled)
    expected = weights.sum(-1).mean((0, 1))
    torch.testing.assert_close(trace.memory_shares[1:], expected[:-1], atol=1e-4, rtol=1e-3)
    assert trace.memory_shares[0] == 0
    assert not trace.reads(0)
    for token in (1, 17, len(trace) - 1):
        reads = trace.reads(token)
        assert sum(read.weight for read in reads) == pytest.approx(float(trace.memory_shares[token]), rel=1e-5)
        named = {place[:3] for place in filled.locate(rows[:, :, token - 1].unique()) if place}
        assert {read[:3] for read in reads} == named
        assert reads == sorted(reads, key=lambda read: -read.weight)


def test_a_read_names_the_layer_and_head_that_read_most(model, filled):
    trace = longmem.explain(model, PROMPT[:14], memory=filled, max_new_tokens=0)
    rows, weights = reads_of(model, model.tokenizer(PROMPT[:14])["input_ids"], filled)
    read = trace.reads(6)[0]
    own = torch.where(torch.tensor([[[bool(place and place[:3] == read[:3]) for place in filled.locate(heads)]
        for heads in layer] for layer in rows[:, :, 5]]), weights[:, :, 5], 0).sum(-1)  # fmt: skip
    layer, head = np.unravel_index(int(own.argmax()), own.shape)
    assert (read.layer, read.head) == (model.config.memory_layers[layer], head)
    assert read.weight == pytest.approx(float(own.mean()), rel=1e-4)


def test_the_answer_reads_what_was_planted_for_it(model):
    """A document whose keys are the very queries of one position is what the word behind it reads."""
    bank = MemoryBank.for_model(model)
    model.memorize(bank, some_text(20), "words")
    recorder, ids = QueryRecorder(bank), model.tokenizer(PROMPT)["input_ids"]
    model(torch.tensor([ids]), memory=recorder)
    keys, values = model.encode(torch.tensor([ids[:4]]))
    for key, layer in zip(keys, model.config.memory_layers, strict=True):
        query = recorder.queries[layer][0].unflatten(1, (-1, len(ids)))[:, 0, 8]  # the first head of each group
        key[0] = 20 * query.unsqueeze(1) / query.norm(dim=-1)[:, None, None]
    bank.add("planted", [key[0] for key in keys], [value[0] for value in values], ids[:4])
    trace = longmem.explain(model, PROMPT, memory=bank, max_new_tokens=0)
    assert trace.reads(9)[0].document_id == "planted"
    assert trace.passages([9])[0].document_id == "planted"
    assert trace.passages([9])[0].text == PROMPT[:4]


def test_losses_are_those_of_the_two_passes(model, filled):
    trace = longmem.explain(model, PROMPT[:10], memory=filled, answer=" mat")
    assert trace.answer == " mat"
    assert trace.answer_without_memory is None
    ids = torch.tensor([model.tokenizer(PROMPT[:10] + " mat")["input_ids"]])
    for found, memory in ((trace.losses, filled), (trace.losses_without, None)):
        expected = functional.cross_entropy(model(ids, memory=memory).logits[0, :-1], ids[0, 1:], reduction="none")
        torch.testing.assert_close(found[1:], expected.detach(), atol=1e-4, rtol=1e-4)
    assert not torch.equal(trace.losses[1:], trace.losses_without[1:])
    assert trace.losses[0].isnan()


def test_the_answer_is_what_generate_writes_with_and_without(model, filled):
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    trace = longmem.explain(model, PROMPT, memory=filled, max_new_tokens=6)
    with_memory, without = (
        model.tokenizer.decode(model.generate(ids, memory=memory, max_new_tokens=6)[0, ids.shape[1] :])
        for memory in (filled, None)
    )
    assert (trace.answer, trace.answer_without_memory) == (with_memory, without)
    assert "".join(trace.words) == PROMPT + trace.answer


def test_selections_and_shards_are_read_like_a_bank(model, filled):
    view = longmem.explain(model, PROMPT, memory=filled.select("deich"), max_new_tokens=0)
    assert set(view.documents) == {"deich"}
    assert {place.document_id for place in view.places} == {"deich"}
    shards = longmem.explain(model, PROMPT, memory=longmem.memory.BankShards([filled]), max_new_tokens=0)
    whole = longmem.explain(model, PROMPT, memory=filled, max_new_tokens=0)
    assert [shards.reads(5), shards.documents] == [whole.reads(5), whole.documents]


def test_an_empty_memory_reads_nothing(model, filled):
    trace = longmem.explain(model, PROMPT, memory=filled.empty_like(), max_new_tokens=2)
    assert not trace.memory_shares.any()
    assert not trace.passages()
    assert not trace.documents
    torch.testing.assert_close(trace.losses[1:], trace.losses_without[1:])
    assert "Nothing was read" in trace.to_html()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": ""}, "`prompt` must hold"),
        ({"max_new_tokens": -1}, "`max_new_tokens` must be 0 or more"),
        ({"answer": "x", "do_sample": True}, "do_sample"),
        ({"answer": "x", "max_new_tokens": 3}, "['max_new_tokens'] would do nothing"),
        ({"max_new_tokens": True}, "`max_new_tokens` must be 0 or more"),
        ({"max_new_tokens": 2.5}, "`max_new_tokens` must be 0 or more"),
        ({"num_return_sequences": 2}, "`num_return_sequences` must be left out"),
        ({"return_dict_in_generate": True}, "`return_dict_in_generate` must be left out"),
        ({"memory": None}, "`memory` must be a MemoryBank"),
        ({"memory": []}, "`memory` must be a MemoryBank"),
        ({"prompt": "caf\udce9"}, "`prompt` must be text that UTF-8 can write"),
        ({"answer": "caf\udce9"}, "`answer` must be text that UTF-8 can write"),
        ({"prompt": None}, "`prompt` must be text or one flat sequence of token ids, got None"),
        ({"prompt": torch.ones(2, 3, dtype=torch.int64)}, "`prompt` must be text or one flat"),
        ({"answer": [0.5]}, "`answer` must be text or one flat"),
    ],
)
def test_what_cannot_be_explained_is_refused(model, filled, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        longmem.explain(model, **{"prompt": PROMPT, "memory": filled} | options)
    trace = longmem.explain(model, PROMPT, memory=filled, max_new_tokens=0)
    with pytest.raises(ValueError, match="`token` must be from 0 to"):
        trace.reads(len(trace))


def test_the_page_holds_the_trace_and_nothing_from_elsewhere(model, filled, tmp_path):
    trace = longmem.explain(model, PROMPT + " </script><i>", memory=filled, max_new_tokens=3)
    page = trace.to_html(tmp_path / "trace.html", title="<Who>")
    assert (tmp_path / "trace.html").read_text(encoding="utf-8") == page
    assert "&lt;Who&gt;" in page
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)|@import|url\(", page)
    blocks = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert len(blocks) == 2  # no text of ours has closed one
    data = json.loads(blocks[0])
    assert "".join(token[0] for token in data["tokens"]) == "".join(trace.words)
    shown = "".join(text for *_, pieces in data["passages"].values() for _, text in pieces)
    assert "Boxkämpfer" in shown
    assert "<b>x</b>" in shown
    for token in (1, len(trace) - 1):
        assert sum(weight for _, weight in data["reads"][token]) == pytest.approx(
            float(trace.memory_shares[token]), abs=1e-4
        )
    frame = trace._repr_html_()
    assert frame.startswith("<iframe")
    assert "sandbox" in frame
    assert "<script" not in frame


@pytest.mark.parametrize("text", ["naïve café", "日本語 text 🙂 end", "", "a\n\n b"])
def test_pieces_join_to_the_text(model, text):
    ids = model.tokenizer(text)["input_ids"]
    pieces = pieces_of_text(model.tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
