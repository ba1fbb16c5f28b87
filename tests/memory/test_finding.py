"""`bank.find`: passages by words, and by the heads of a model."""

from __future__ import annotations

import pytest
import tiny_memory
import torch
from tiny_models import some_text

from longmem import MemoryBank
from longmem.memory import BankShards
from longmem.memory.finding import text_of
from longmem.model.index_queries import QueryRecorder

model = tiny_memory.model


@pytest.fixture
def bank(model):
    bank = MemoryBank.for_model(model)
    model.memorize(bank, some_text(40) + " The locker code is 4417. " + some_text(10, seed=2), "notes", tags=["mine"])
    model.memorize(bank, 'A "quoted" AND (odd) text about lockers*.', "odd")
    return bank


def test_words_find_the_passage_that_has_them(bank):
    best, *others = bank.find("Locker CODE?")
    assert best.document_id == "notes"
    assert "ocker c" in best.text
    assert bank.text("notes", best.start, best.stop) == best.text
    assert all(best.score >= other.score for other in others)
    assert bank.find('odd "AND" (', k=1)[0].document_id == "odd"  # no operators
    assert bank.find("zebra") == []


def test_a_word_that_passages_cut_is_found(model):
    """Rare words are of many tokens, so it is they that are cut; the passage in which one begins has it."""
    bank = MemoryBank.for_model(model)
    for before in range(0, 34, 3):
        text = "x" * before + f" Lindqvist{before}. It rained{before}."
        model.memorize(bank, text, f"notes {before}")
        (found,) = bank.find(f"lindqvist{before}")
        assert found.document_id == f"notes {before}"
        assert found.start <= text.index("L") < found.stop
        assert found.text == text[found.start : found.stop]
        assert [found.start for found in bank.find(f"rained{before}")] == [text.index("rained") // 32 * 32]


def test_what_no_search_reads_is_not_found(bank):
    assert {found.document_id for found in bank.select("odd").find("the cat text")} == {"odd"}
    assert {found.document_id for found in bank.select(tags=["mine"]).find("cat text")} == {"notes"}
    assert BankShards([bank]).find("locker") == bank.find("locker")
    bank.supersede("notes")
    assert bank.find("locker") == []


def test_heads_find_what_they_would_read(model, bank):
    text, recorder = "where is my code", QueryRecorder(bank)
    ids = model.tokenizer(text)["input_ids"]
    model(torch.tensor([ids]), memory=recorder)
    keys, values = model.encode(torch.tensor([ids[:4]]))
    for key, layer in zip(keys, model.config.memory_layers, strict=True):
        query = recorder.queries[layer][0].unflatten(1, (-1, len(ids)))[:, 0, 12]
        key[0] = 20 * query.unsqueeze(1) / query.norm(dim=-1)[:, None, None]
    bank.add("planted", [key[0] for key in keys], [value[0] for value in values], ids[:4])
    found = bank.find(text, model, k=3)
    assert found[0].document_id == "planted"
    assert found[0].text == "wher"
    assert len(found) == 3
    assert found == sorted(found, key=lambda each: -each.score)
    assert model.find(bank.select("odd"), text, 9)[0].document_id == "odd"
    assert model.find(bank.empty_like(), text) == []


@pytest.mark.parametrize(("text", "k"), [("", 3), ("?!", 3), ("locker", 0)])
def test_a_text_without_words_and_no_passages_are_refused(bank, text, k):
    with pytest.raises(ValueError, match="`k` must be" if text == "locker" else "`text` must have a word"):
        bank.find(text, k=k)


def test_heads_refuse_an_empty_text(model, bank):
    with pytest.raises(ValueError, match="`text` must hold at least one token"):
        bank.find("", model)


def test_what_is_deleted_while_passages_are_looked_for_is_no_error(model, bank, monkeypatch):
    parts = [(bank, ["notes", "odd"])]
    bank.delete("notes")
    monkeypatch.setattr(bank, "parts", lambda: parts)
    assert {found.document_id for found in bank.find("locker text")} == {"odd"}
    assert text_of(bank, "notes", 0, 4, str) == ""
