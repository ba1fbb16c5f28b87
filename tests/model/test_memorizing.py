"""Writing documents with a model: windows, appended text, updates that copy what did not change."""

import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny_models import save_tiny_backbone, some_text

from longmem import LongMemForCausalLM, MemoryBank
from longmem.memory.rows import ledger
from longmem.memory.rows.storage import ChunkStore

LENGTH = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_backbone(tmp_path_factory.mktemp("backbone"))
    return LongMemForCausalLM.from_backbone(str(folder), segment_length=LENGTH).eval()


@pytest.fixture
def encoded(model, monkeypatch):
    """The tokens that were encoded since the test began."""
    counted = []
    encode = model.encoder.encode

    def counting(ids, *args, **kwargs):
        counted.append(ids.numel())
        return encode(ids, *args, **kwargs)

    monkeypatch.setattr(model.encoder, "encode", counting)
    return counted


def bank_of(model, *parts, **options) -> MemoryBank:
    bank = MemoryBank.for_model(model, **options)
    for part in parts:
        model.memorize(bank, part, "a", append="a" in bank)
    return bank


def assert_same(bank: MemoryBank, other: MemoryBank, tolerance: float) -> None:
    assert bank.documents() == other.documents()
    assert bank.token_ids("a").tolist() == other.token_ids("a").tolist()
    rows, other_rows = (each._table.ledger.documents["a"].rows.values for each in (bank, other))
    for layer in bank.memory_layers:
        heads = bank.shapes[0].kv_heads
        stored, others = (
            each.gather(layer, which.expand(heads, -1), each.generation)
            for each, which in ((bank, rows), (other, other_rows))
        )
        for one, two in zip(stored, others, strict=True):
            torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 60, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cuts", [(5,), (32,), (33, 34, 35), (64, 70), (10, 90)])
def test_appended_parts_are_encoded_as_one_document(model, cuts):
    ids = random_ids(101)
    bank = bank_of(model, *torch.tensor_split(ids, cuts))
    assert_same(bank, bank_of(model, ids), 2e-3)
    assert [each.stop - each.start for each in bank.segments("a")] == [LENGTH] * 3 + [101 % LENGTH]
    assert all(each.is_known for each in bank.segments("a"))


def test_appending_costs_the_window_and_not_the_document(model, encoded):
    bank = bank_of(model, random_ids(100))
    encoded.clear()
    model.memorize(bank, random_ids(3, seed=1), "a", append=True)
    assert encoded == [100 % LENGTH + 3]


def test_what_cannot_be_continued_begins_a_window(model, encoded):
    bank = bank_of(model, random_ids(40))
    chunk = bank.chunk_size
    keys, values = ([layer[0] for layer in part] for part in model.encode(random_ids(chunk)[None]))
    bank.append("a", keys, values, random_ids(chunk))  # encoded in another way: by the caller
    encoded.clear()
    model.memorize(bank, random_ids(7), "a", append=True)
    assert encoded == [7]
    assert [each.is_known for each in bank.segments("a")] == [True, True, False, True]


def test_an_update_copies_the_windows_that_did_not_change(model, encoded):
    ids = random_ids(5 * LENGTH + 7)
    bank = bank_of(model, ids)
    changed = ids.clone()
    changed[2 * LENGTH + 3] += 1
    encoded.clear()
    bank.update("a", changed, model=model)
    assert sum(encoded) == LENGTH + 7  # one window, and the rest that is shorter than one
    assert_same(bank, bank_of(model, changed), 0)


def test_an_update_finds_windows_that_moved(model, encoded):
    ids = random_ids(4 * LENGTH)
    bank = bank_of(model, ids)
    swapped = torch.cat([random_ids(LENGTH, seed=9), ids[2 * LENGTH :], ids[:LENGTH]])
    encoded.clear()
    bank.update("a", swapped, model=model)
    assert sum(encoded) == LENGTH
    assert_same(bank, bank_of(model, swapped), 0)


def test_an_update_of_an_evicted_document_copies_what_is_left(model, encoded):
    ids = random_ids(4 * LENGTH)
    bank = bank_of(model, ids, capacity_tokens=2 * LENGTH + 8)
    encoded.clear()
    bank.update("a", ids, model=model)
    assert sum(encoded) == 2 * LENGTH
    assert_same(bank, bank_of(model, ids, capacity_tokens=2 * LENGTH + 8), 0)


def test_tags_and_pins_stay_with_an_updated_document(model):
    bank = MemoryBank.for_model(model)
    model.memorize(bank, random_ids(50), "a", tags=["law"])
    bank.pin("a")
    bank.update("a", random_ids(60, seed=1), model=model)
    info = bank.info("a")
    assert (info.tags, info.is_pinned, info.num_tokens) == (("law",), True, 60)


def test_text_is_kept_with_the_places_of_tokens(model):
    text = some_text(60)
    bank = MemoryBank.for_model(model)
    model.memorize(bank, text, "a")
    assert bank.text("a") == text
    for place in bank.locate(torch.arange(bank.num_chunks)):
        assert text[place.char_start : place.char_stop] == place.text
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][place.start : place.stop]
        assert model.tokenizer.decode(ids).strip() == place.text.strip()


def test_a_failure_while_appending_to_a_folder_changes_nothing(model, tmp_path, monkeypatch):
    bank = MemoryBank.for_model(model, folder=tmp_path / "bank")
    model.memorize(bank, random_ids(50), "a")
    before = bank.documents()

    def stop(done, total):
        if done > LENGTH:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.memorize(bank, random_ids(200), "a", append=True, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        model.memorize(bank, random_ids(200), "b", progress=stop)
    assert bank.documents() == before
    bank.close()
    with MemoryBank.open(tmp_path / "bank", model, read_only=True) as reopened:
        assert reopened.documents() == before
        assert_same(reopened, bank_of(model, random_ids(50)), 0)


def test_a_bank_in_a_folder_is_read_like_one_in_memory(model, tmp_path):
    memory, folder = MemoryBank.for_model(model), MemoryBank.for_model(model, folder=tmp_path / "bank")
    for bank in (memory, folder):
        model.memorize(bank, random_ids(150), "a")
        model.memorize(bank, random_ids(90, seed=1), "b")
        bank.delete("a")
    with torch.no_grad():
        expected = model(random_ids(20, seed=2)[None], memory=memory).logits
        assert torch.equal(model(random_ids(20, seed=2)[None], memory=folder).logits, expected)
        folder.close()
        with MemoryBank.open(tmp_path / "bank", model, read_only=True) as reopened:
            assert torch.equal(model(random_ids(20, seed=2)[None], memory=reopened).logits, expected)


def test_windows_that_were_evicted_from_under_a_copy_are_encoded(model):
    ids = random_ids(96)
    moved = torch.cat([ids[64:], ids[:64]])
    bank = MemoryBank.for_model(model, capacity_tokens=96)
    model.memorize(bank, ids, "old")
    model.memorize(bank, moved, "a", reuse=(bank, "old"))
    assert_same(bank, bank_of(model, moved, capacity_tokens=96), 2e-3)


def test_windows_are_not_copied_behind_a_tail(model):
    ids = random_ids(64)
    bank = bank_of(model, ids)
    tensors = [torch.randn(2, 5, 8) for _ in bank.memory_layers]
    bank.add("other", tensors, tensors, [1] * 5)
    assert model.memorize(bank, ids, "other", append=True, reuse=(bank, "a")) == 64


NOTES = ["Hi Bob", "My locker code is 4417.", *(f"Note {n}: {'tea ' * n}at {n}." for n in range(10))]


@pytest.mark.parametrize("search", ["token", "chunk_mean"])
def test_every_token_of_every_note_is_found_and_memorize_says_so(search, tmp_path):
    folder = save_tiny_backbone(tmp_path)
    model = LongMemForCausalLM.from_backbone(str(folder), segment_length=LENGTH, search=search).eval()
    bank = MemoryBank.for_model(model, storage_dtype="float32")
    for number, note in enumerate(NOTES):
        written = model.memorize(bank, note, f"{number}")
        tokens = len(model.tokenizer(note, add_special_tokens=False)["input_ids"])
        assert (written, written.num_encoded, written.num_forgotten) == (tokens, tokens, 0)
    for number in range(len(NOTES)):
        ids, view, found = bank.token_ids(f"{number}"), bank.select(f"{number}"), set()
        keys, _ = model.encode(ids[:LENGTH][None])
        rows, _, _, _, sizes = view.search(bank.memory_layers[0], keys[0][0], bank.num_chunks)
        size = rows[0, 0] >= 0
        for place in bank.locate(rows[0, 0][size]):
            found |= set(range(place.start, place.stop))
        assert found == set(range(len(ids)))
        if search == "token" and len(ids) <= LENGTH:  # a key finds a chunk in which no key is longer in its direction
            stored, _ = bank.gather(bank.memory_layers[0], rows[:, :, 0], bank.generation)
            best = torch.einsum("hqd,hqtd->hqt", keys[0][0], stored)
            every, _ = bank.gather(
                bank.memory_layers[0],
                bank._table.ledger.documents[f"{number}"].rows.values.expand(len(stored), -1),
                bank.generation,
            )
            own = torch.einsum("hqd,hctd->hqct", keys[0][0], every).flatten(2).amax(-1)
            torch.testing.assert_close(best.amax(-1), own)
    assert bank.num_tokens == sum(info.num_tokens for info in bank.documents())


def test_memorize_says_what_was_forgotten(model):
    bank = MemoryBank.for_model(model, capacity_tokens=64)
    first = model.memorize(bank, random_ids(30), "a")
    assert (first, first.num_forgotten) == (30, 0)
    second = model.memorize(bank, random_ids(49, seed=1), "b")
    assert (second, second.num_encoded, second.num_forgotten) == (49, 49, 20)
    third = model.memorize(bank, random_ids(90, seed=2), "c")
    assert (third, third.num_encoded) == (62, 90)
    assert third.num_forgotten == 30 + 49 + 90 - 20 - 62
    fourth = model.memorize(bank, random_ids(7, seed=3), "c", append=True)
    assert fourth == 7
    with pytest.raises(ValueError, match="some text"):
        model.memorize(bank, "\n", "d")


def test_a_bank_of_the_default_capacity_says_once_that_it_forgets(monkeypatch, model):
    monkeypatch.setattr("longmem.memory.rows.table.DEFAULT_CAPACITY", 16)
    bank, chosen = (MemoryBank.for_model(model, capacity_tokens=size) for size in (16, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.memorize(bank, random_ids(16), "a")
        model.memorize(chosen, random_ids(12), "a")
        model.memorize(chosen, random_ids(12), "b")
    with pytest.warns(UserWarning, match="default `capacity_tokens` of 16 is full.*forgets by `eviction='fifo'`"):
        model.memorize(bank, random_ids(1), "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.memorize(bank, random_ids(4), "c").num_forgotten == 4


def test_a_document_grows_by_lines_of_which_some_are_blank(model):
    text = some_text(20)
    lines = f"{text[:20]}\n\n  \n{text[20:50]}\n".splitlines(keepends=True)
    bank = bank_of(model, *lines)
    assert bank.text("a") == "".join(lines)
    assert model.tokenizer.decode(bank.token_ids("a")) == "".join(lines)
    assert model.memorize(bank, "", "a", append=True) == 0


def test_ids_are_not_copied_into_a_document_with_text(model):
    text = some_text(20)[:LENGTH]
    bank = bank_of(model, text)
    ids = bank.token_ids("a")
    with pytest.raises(ValueError, match="`text` must be given for every part"):
        model.memorize(bank, ids, "a", append=True, reuse=(bank, "a"))
    assert len(bank.token_ids("a")) == len(ids)


@pytest.mark.parametrize(
    ("text_or_ids", "options", "message"),
    [
        ("text", {"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        ("half \ud800", {}, "half of a surrogate pair"),
        (None, {}, "must be text or one flat sequence"),
        (b"text", {}, "must be text or one flat sequence"),
        ("text", {"reuse": "notes"}, "`reuse` must be a MemoryBank and the name"),
    ],
)
def test_wrong_arguments_are_refused(model, text_or_ids, options, message):
    bank = MemoryBank.for_model(model)
    with pytest.raises(ValueError, match=message):
        model.memorize(bank, text_or_ids, "a", **options)
    assert not bank.documents()


def test_windows_are_copied_from_banks_with_the_same_settings_only(model):
    bank = bank_of(model, random_ids(64))
    with pytest.raises(ValueError, match="`reuse` must be a bank with the `storage_dtype`"):
        model.memorize(MemoryBank.for_model(model, storage_dtype="int8"), random_ids(64), "a", reuse=(bank, "a"))


def test_a_bank_that_cannot_be_written_is_refused_before_anything_is_encoded(model, encoded, tmp_path):
    with MemoryBank.for_model(model, folder=tmp_path / "bank") as bank:
        model.memorize(bank, some_text(20), "a")
    encoded.clear()
    with MemoryBank.open(tmp_path / "bank", model, read_only=True) as bank:
        for change in (
            lambda: bank.update("a", some_text(30), model=model),
            lambda: model.memorize(bank, "more", "a", append=True),
            lambda: model.stream(bank, document_id="talk"),
        ):
            with pytest.raises(ValueError, match="read_only=True"):
                change()
    assert not encoded


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_update_that_takes_longer_than_a_text_lives_is_whole(on_disk, model, tmp_path, monkeypatch):
    clock = SimpleNamespace(late=0.0)
    monkeypatch.setattr(ledger, "time", SimpleNamespace(time=lambda: time.time() + clock.late))
    folder = {"folder": tmp_path / "bank"} if on_disk else {}
    with bank_of(model, random_ids(100), eviction="ttl:seconds=3600", **folder) as bank:
        bank.pin("a")  # or it would be gone itself
        bank.update(
            "a", random_ids(90, seed=1), model=model, progress=lambda *done: setattr(clock, "late", clock.late + 3000)
        )
        bank.pin("a", False)
        assert bank.token_ids("a").tolist() == random_ids(90, seed=1).tolist()
        assert bank.info("a").num_resident_tokens == 90
        clock.late += 3600  # it lives from the update on
        assert "a" not in bank


def test_a_window_that_somebody_else_has_replaced_is_not_copied(model, encoded):
    ids, others = random_ids(96), random_ids(96, seed=1)
    others[:LENGTH] = ids[:LENGTH]
    bank = bank_of(model, ids)

    def replace(done, total):
        if done == LENGTH:
            bank.update("a", others, model=model)

    bank.update("a", torch.cat([ids, random_ids(5)]), model=model, progress=replace)
    assert_same(bank, bank_of(model, torch.cat([ids, random_ids(5)])), 1e-3)


def test_what_interrupts_a_write_to_memory_is_raised_as_it_is(model, monkeypatch):
    bank = MemoryBank.for_model(model)
    write = ChunkStore.write

    def interrupted(store, rows, chunks):
        if store.num_rows:
            raise KeyboardInterrupt
        write(store, rows, chunks)

    monkeypatch.setattr(ChunkStore, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.memorize(bank, random_ids(90), "a")
    with pytest.raises(ValueError, match="was cut short"):
        bank.documents()
