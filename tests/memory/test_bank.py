"""The memory bank: reading, writing, forgetting."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from named_encoder import NamedEncoder

from longmem.memory import BankView, DocumentInfo, MemoryBank
from longmem.memory.memorize import memorize
from longmem.memory.rows import storage as store_module
from longmem.memory.rows.storage import ChunkStore

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


def everything(bank: MemoryBank | BankView, layer: int = 3):
    """Return all that can be read from one layer, sorted by place: {place: (score, keys, values)} of head 0."""
    heads, dim, _ = SIZES[layer]
    queries = torch.ones(heads, 1, dim)
    rows, scores, *_ = bank.search(layer, queries, 30)
    if bank.is_empty:
        return {}
    keys, values = bank.gather(layer, rows[:, 0], bank.generation)
    places = [place and place[:3] for place in bank.locate(rows[0, 0])]
    return {
        place: (score, key.tolist(), value.tolist())
        for place, score, key, value in sorted(
            zip(places, scores[0, 0].tolist(), keys[0], values[0], strict=True), key=lambda item: str(item[0])
        )
        if place is not None
    }


class TinyEncoder(NamedEncoder):
    """A stand-in for the model: it writes random numbers seeded by the text, in segments of eight letters."""

    config = SimpleNamespace(
        search="chunk_mean",
        memory_layers=list(LAYERS),
        chunk_size=4,
        segment_length=8,
        get_text_config=lambda: SimpleNamespace(vocab_size=256),
    )

    def __init__(self, fingerprint: str = "encoder-a", fail_after: int | None = None) -> None:
        super().__init__(fingerprint)
        self.fail_after, self.num_encoded = fail_after, 0

    def tokenizer(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text]}

    def encode(self, input_ids):
        if self.fail_after is not None and self.num_encoded >= self.fail_after:
            raise RuntimeError("the encoder failed")
        self.num_encoded += input_ids.numel()
        keys, values = random_tokens(input_ids.shape[1], seed=int(input_ids.sum()))
        return [key[None] for key in keys], [value[None] for value in values]

    def memorize(self, bank, text, *, document_id):
        return memorize(self, bank, text, document_id)


def test_pieces_equal_the_whole():
    keys, values = random_tokens(23)
    whole, pieces = new_bank(), new_bank()
    whole.add("a", keys, values, range(23))
    pieces.add("a", part(keys, 0, 1), part(values, 0, 1), [0])
    for start, stop in ((1, 2), (2, 3), (3, 5), (5, 18), (18, 23)):
        pieces.append("a", part(keys, start, stop), part(values, start, stop), range(start, stop))
    assert pieces.documents() == whole.documents() == [DocumentInfo("a", 23, 6, 3, 0)]
    assert pieces.token_ids("a").tolist() == whole.token_ids("a").tolist() == list(range(23))
    for layer in LAYERS:
        assert everything(pieces, layer) == everything(whole, layer)
        assert len(everything(whole, layer)) == 6


def test_half_precision_pieces_equal_the_whole():
    keys, values = ([tensor.bfloat16() for tensor in tensors] for tensors in random_tokens(8))
    whole, pieces = new_bank(), new_bank()
    whole.add("a", keys, values)
    pieces.add("a", part(keys, 0, 3), part(values, 0, 3))
    pieces.append("a", part(keys, 3, 8), part(values, 3, 8))
    assert everything(pieces) == everything(whole)


@pytest.mark.parametrize("index", ["flat", "exact"])
def test_search_scores_are_inner_products_with_mean_keys(index):
    keys, values = random_tokens(20)
    bank = new_bank(index=index)
    bank.add("a", keys, values)
    queries = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(9))
    rows, scores, *_ = bank.search(3, queries, 3)
    naive = queries @ keys[0].unflatten(1, (5, 4)).mean(2).transpose(1, 2)
    torch.testing.assert_close(scores, naive.sort(dim=2, descending=True).values[..., :3], rtol=1e-5, atol=1e-5)
    stored_keys, stored_values = bank.gather(3, rows.flatten(1), bank.generation)
    for head in range(2):
        for slot, (document_id, start, stop) in enumerate(place[:3] for place in bank.locate(rows[head])):
            assert document_id == "a"
            assert stop - start == 4
            torch.testing.assert_close(stored_keys[head, slot], keys[0][head, start:stop].half(), rtol=0, atol=0)
            torch.testing.assert_close(stored_values[head, slot], values[0][head, start:stop].half(), rtol=0, atol=0)


def test_layers_hold_their_own_numbers():
    bank = new_bank()
    bank.add("a", *random_tokens(8))
    assert everything(bank, 3) != everything(bank, 7)
    assert everything(bank, 3).keys() == everything(bank, 7).keys()


def test_what_is_stored_is_detached_and_a_copy():
    keys, values = random_tokens(10)
    bank = new_bank(storage_dtype="float32")
    bank.add("a", [key.requires_grad_() for key in keys], values)
    before = everything(bank)
    with torch.no_grad():
        for tensor in (*keys, *values):
            tensor.zero_()
    assert everything(bank) == before
    assert not any(
        tensor.requires_grad for tensor in bank.gather(3, torch.zeros(2, 1, dtype=torch.int64), bank.generation)
    )
    bank.append("a", *random_tokens(2, seed=1))
    last = bank.gather(3, bank.search(3, torch.ones(2, 1, 6), 3).rows[:, 0], bank.generation)[0]
    assert (last.abs().sum(dim=-1) > 0).all()


def test_fifo_takes_the_oldest_chunks_of_any_document():
    bank = new_bank(capacity_tokens=24)
    bank.add("a", *random_tokens(8), range(8))
    bank.add("b", *random_tokens(10, seed=1), range(10))
    bank.append("a", *random_tokens(4, seed=2), range(8, 12))
    bank.append("b", *random_tokens(6, seed=3), range(10, 16))  # two more chunks, and room for one
    assert bank.num_chunks == 6
    assert bank.num_tokens == 24
    assert bank.documents() == [DocumentInfo("a", 12, 2, 0, 4), DocumentInfo("b", 16, 4, 0, 0)]
    assert bank.token_ids("a").tolist() == list(range(4, 12))
    bank.add("c", *random_tokens(16, seed=4))
    assert bank.documents() == [DocumentInfo("b", 16, 2, 0, 8), DocumentInfo("c", 16, 4, 0, 0)]
    assert "a" not in bank
    assert bank.token_ids("c") is None


def test_a_document_goes_with_its_last_chunk_however_short():
    bank = new_bank(capacity_tokens=12)
    bank.add("a", *random_tokens(9))
    bank.add("b", *random_tokens(8, seed=1))
    assert bank.documents() == [DocumentInfo("a", 9, 1, 1, 8), DocumentInfo("b", 8, 2, 0, 0)]
    bank.append("a", *random_tokens(3, seed=2))
    assert bank.documents() == [DocumentInfo("a", 12, 1, 0, 8), DocumentInfo("b", 8, 2, 0, 0)]
    bank.append("b", *random_tokens(1, seed=3))
    assert set(everything(bank)) == {("a", 8, 12), ("b", 4, 8), ("b", 8, 9)}
    assert (bank.num_tokens, bank.num_evicted_tokens) == (9, 8 + 4)
    bank.add("c", *random_tokens(9, seed=4))
    assert bank.documents() == [DocumentInfo("c", 9, 3, 1, 0)]


def test_one_add_beyond_the_capacity_keeps_its_end_and_warns():
    bank = new_bank(capacity_tokens=8)
    with pytest.warns(UserWarning, match=r"'a'.*first 16 tokens are dropped.*`capacity_tokens` by 16"):
        bank.add("a", *random_tokens(21), range(21))
    assert bank.documents() == [DocumentInfo("a", 21, 2, 1, 16)]
    assert bank.token_ids("a").tolist() == list(range(16, 21))
    assert set(everything(bank)) == {("a", 16, 20), ("a", 20, 21)}


def test_a_warning_that_is_an_error_writes_nothing():
    bank = new_bank(capacity_tokens=8)
    bank.add("a", *random_tokens(8))
    before = everything(bank), bank.documents()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            bank.append("a", *random_tokens(20))
        assert (everything(bank), bank.documents()) == before
        bank.append("a", *random_tokens(8))  # fits: no warning, though it evicts all that was there
    assert bank.documents() == [DocumentInfo("a", 16, 2, 0, 8)]


def test_delete_removes_one_document_and_nothing_else():
    bank = new_bank()
    for position, name in enumerate("abc"):
        bank.add(name, *random_tokens(12, seed=position))
    before = everything(bank)
    bank.delete("b")
    assert everything(bank) == {place: held for place, held in before.items() if place[0] != "b"}
    bank.add("b", *random_tokens(4, seed=8))
    assert everything(bank)[("b", 0, 4)] != before[("b", 0, 4)]
    bank.clear()
    assert bank.is_empty
    assert bank.documents() == []
    assert everything(bank) == {}
    assert bank.nbytes == 0


def test_generation_changes_with_the_rows_that_were_found():
    bank = new_bank(capacity_tokens=24)
    bank.add("a", *random_tokens(8))
    bank.add("b", *random_tokens(8, seed=1))
    seen = [bank.generation]
    for change, rows_stay in (
        (lambda: bank.append("a", *random_tokens(7, seed=2)), True),
        (lambda: bank.rename("a", "z"), True),
        (lambda: bank.append("b", *random_tokens(8, seed=3)), False),
        (lambda: bank.delete("z"), False),
        (bank.clear, False),
        (lambda: bank.add("a", *random_tokens(8)), True),
    ):
        change()
        assert (bank.generation in seen) == rows_stay
        seen.append(bank.generation)
    assert bank.select("a").generation == bank.generation


def test_rename_changes_the_name_only():
    bank = new_bank()
    bank.add("a", *random_tokens(8))
    bank.add("b", *random_tokens(8, seed=1))
    before = everything(bank)
    bank.rename("a", "z")
    assert [info.document_id for info in bank.documents()] == ["z", "b"]
    assert everything(bank) == {(place[0].replace("a", "z"), *place[1:]): held for place, held in before.items()}


def test_a_view_reads_only_its_documents_and_sees_them_grow():
    bank = new_bank()
    for position, name in enumerate("abc"):
        bank.add(name, *random_tokens(8, seed=position))
    whole, view = everything(bank), bank.select(["c", "a"])
    assert everything(view) == {place: held for place, held in whole.items() if place[0] in "ac"}
    assert (view.num_chunks, view.num_tokens, view.memory_layers, view.chunk_size) == (4, 16, LAYERS, 4)
    bank.append("a", *random_tokens(4, seed=5))
    assert set(everything(view)) - set(whole) == {("a", 8, 12)}
    bank.delete("c")
    assert {place[0] for place in everything(view)} == {"a"}
    bank.clear()
    assert view.is_empty
    bank.add("x", *random_tokens(20))
    assert view.is_empty
    assert everything(view) == {}
    assert not bank.is_empty
    assert everything(bank.select("x")) == everything(bank)


def test_update_replaces_the_text_and_a_failure_changes_nothing():
    bank = MemoryBank.for_model(TinyEncoder(), capacity_tokens=20)
    TinyEncoder().memorize(bank, "keep", document_id="k")
    TinyEncoder().memorize(bank, "old text.", document_id="a")
    before = everything(bank), bank.documents()
    with pytest.raises(RuntimeError, match="the encoder failed"):
        bank.update("a", "a longer text that would have filled the bank", model=TinyEncoder(fail_after=18))
    with pytest.raises(ValueError, match=r"written by encoder encoder-a.*encoder is encoder-b"):
        bank.update("a", "text", model=TinyEncoder("encoder-b"))
    assert (everything(bank), bank.documents()) == before

    bank.update("a", "new text, now", model=TinyEncoder())
    fresh = bank.empty_like()
    TinyEncoder().memorize(fresh, "new text, now", document_id="a")
    assert everything(bank.select("a")) == everything(fresh)
    assert everything(bank.select("k")) == {("k", 0, 4): before[0][("k", 0, 4)]}
    assert bank.token_ids("a").tolist() == [ord(letter) for letter in "new text, now"]
    bank.append("a", *random_tokens(3), range(3))  # the last chunk of the new text is filled up like any other
    assert bank.documents() == [DocumentInfo("k", 4, 1, 0, 0), DocumentInfo("a", 16, 4, 0, 0)]


def test_for_model_reads_config_and_fingerprint():
    bank = MemoryBank.for_model(TinyEncoder(), capacity_tokens=32, index="exact", storage_dtype=torch.bfloat16)
    assert (bank.memory_layers, bank.chunk_size, bank.fingerprint) == (LAYERS, 4, "encoder-a")
    assert (bank.capacity_tokens, bank.index, bank.storage_dtype) == (32, "exact", torch.bfloat16)
    assert bank.empty_like()._settings() == bank._settings()


def test_an_empty_bank_answers_searches():
    for bank in (new_bank(), new_bank()):
        rows, scores, *_ = bank.search(3, torch.ones(2, 3, 6), 4)
        assert rows.shape == scores.shape == (2, 3, 4)
        assert (rows == -1).all()
        assert torch.isneginf(scores).all()
        assert bank.locate(rows) == [None] * 24
        bank.add("short", *random_tokens(1))
        assert not bank.is_empty
        assert (bank.search(3, torch.ones(2, 3, 6), 4).rows == torch.tensor([0, -1, -1, -1])).all()


def test_work_is_proportional_to_what_is_written(monkeypatch):
    counts = {"written": 0, "moved": 0, "grown": 0}
    write, move, grow = ChunkStore.write, ChunkStore.move, store_module.with_rows

    def counting_write(self, rows, chunks):
        counts["written"] += len(rows)
        write(self, rows, chunks)

    def counting_move(self, sources, destinations):
        counts["moved"] += len(sources)
        move(self, sources, destinations)

    def counting_grow(tensor, rows, num_live):
        counts["grown"] += num_live
        return grow(tensor, rows, num_live)

    monkeypatch.setattr(ChunkStore, "write", counting_write)
    monkeypatch.setattr(ChunkStore, "move", counting_move)
    monkeypatch.setattr(store_module, "with_rows", counting_grow)
    bank = new_bank(capacity_tokens=4 * 256)
    for position in range(64):
        bank.add(f"{position}", *random_tokens(16))
    assert bank.num_chunks == 256
    assert counts["written"] == 256 * len(LAYERS)
    assert counts["moved"] == 0
    assert counts["grown"] <= 256 * len(LAYERS) * 3  # three tensors, and a sum of halves: less than the rows there are

    counts.update(written=0, grown=0)
    bank.append("63", *random_tokens(12))
    bank.add("new", *random_tokens(8))
    assert bank.num_chunks == 256
    assert counts == {"written": 5 * len(LAYERS), "moved": 0, "grown": 0}
    bank.delete("30")
    assert 0 < counts["moved"] <= 4 * len(LAYERS)
    assert counts["written"] == 5 * len(LAYERS)
