"""Saved banks: the same after a reload, whole or refused, and never half replaced."""

import json
import sqlite3
from pathlib import Path

import pytest
import torch
from named_encoder import NamedEncoder

from longmem.memory import MemoryBank
from longmem.memory.folder.catalogue import CATALOGUE

LAYERS = (1, 4)


def random_tokens(num_tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.randn(2, num_tokens, 6, generator=generator) for _ in LAYERS]
    values = [torch.randn(2, num_tokens, 5, generator=generator) for _ in LAYERS]
    return keys, values


def filled_bank(**options) -> MemoryBank:
    """Return a bank that is full, has evicted, has a hole filled by a delete, and short last chunks."""
    bank = MemoryBank(memory_layers=LAYERS, chunk_size=4, capacity_tokens=44, fingerprint="encoder-a", **options)
    for position, name in enumerate(["näive", "b", "c", "d"]):
        text, ends = "é" * 22, range(2, 24, 2)
        bank.add(name, *random_tokens(11, seed=position), range(11), text=text, char_ends=ends, tags=[name, "all"])
    bank.append("näive", *random_tokens(10, seed=9), range(11, 21), text="𝄞" * 10, char_ends=range(1, 11))
    bank.delete("c")
    bank.pin("d")
    bank.add("no ids", *random_tokens(5, seed=5), segment="new")
    return bank


def state(bank: MemoryBank):
    """Return all that can be read, whatever rows chunks are in."""
    read = []
    for layer in LAYERS if not bank.is_empty else ():
        queries = torch.linspace(-1, 1, 36).view(2, 3, 6)
        rows, scores, *_ = bank.search(layer, queries, 12)
        keys, values = bank.gather(layer, rows.flatten(1), bank.generation)
        found = (rows >= 0).flatten(1)
        read += [scores.tolist(), keys[found].tolist(), values[found].tolist(), bank.locate(rows)]
    names = [info.document_id for info in bank.documents()]
    ids = [bank.token_ids(name) for name in names]
    sources = [None if each is None else each.tolist() for each in ids], [bank.text(name) for name in names]
    return bank._settings(), bank.documents(), [bank.segments(name) for name in names], sources, read


def times(bank: MemoryBank):
    return [(info.num_reads, info.last_read, info.written_at) for info in bank.documents()]


def test_only_documents_that_were_read_have_a_row_that_says_how_often(tmp_path):
    with MemoryBank.create(tmp_path, memory_layers=[1], chunk_size=4) as bank:
        for number, name in enumerate("abc"):
            bank.add(name, *([torch.full((1, 4, 2), float(number))] for _ in "kv"))
        bank.search(1, torch.ones(1, 1, 2), 1)
    counts = [0, 0, 1]
    for _ in range(2):
        with sqlite3.connect(tmp_path / CATALOGUE) as connection:
            assert connection.execute("SELECT serial, num_reads FROM usage").fetchall() == [(2, 1)]
        connection.close()
        with MemoryBank.open(tmp_path) as bank:
            assert [info.num_reads for info in bank.documents()] == counts
            bank.tag("c", ["seen"])  # its row is written again


@pytest.mark.parametrize("storage_dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("index", ["flat", "exact"])
def test_a_reloaded_bank_is_the_same_now_and_later(tmp_path, storage_dtype, index):
    bank = filled_bank(storage_dtype=storage_dtype, index=index)
    state(bank)  # reads are counted
    bank.save(tmp_path / "some" / "bank")
    loaded = MemoryBank.load(tmp_path / "some" / "bank", model=NamedEncoder("encoder-a"))
    opened = MemoryBank.open(tmp_path / "some" / "bank", model=NamedEncoder("encoder-a"), device="cpu")
    assert times(loaded) == times(opened) == times(bank)
    assert any(num_reads for num_reads, _, _ in times(bank))
    assert state(loaded) == state(opened) == state(bank)
    for change in (
        lambda bank: bank.append("b", *random_tokens(7, seed=20), range(11, 18), text="b" * 7, char_ends=range(1, 8)),
        lambda bank: bank.add("e", *random_tokens(11, seed=21)),
        lambda bank: bank.delete("b"),
        lambda bank: bank.append("no ids", *random_tokens(12, seed=22)),
    ):
        before = state(bank)
        for each in (bank, loaded, opened):
            change(each)
        assert state(loaded) == state(opened) == state(bank) != before
    opened.close()
    assert state(MemoryBank.load(tmp_path / "some" / "bank")) == state(bank)


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_saved_bank_is_not_touched_by_what_the_loaded_one_does(tmp_path):
    filled_bank().save(tmp_path)
    files = content_of(tmp_path)
    loaded = MemoryBank.load(tmp_path)
    before = state(loaded)
    loaded.pin("d", False)
    loaded.add("over all that was mapped", *random_tokens(40, seed=30))
    assert state(loaded) != before
    assert content_of(tmp_path) == files
    loaded.save(tmp_path)
    assert state(MemoryBank.load(tmp_path)) == state(loaded)
    assert not files.keys() <= content_of(tmp_path).keys(), "files of the old bank are gone"


def test_an_open_bank_is_saved_elsewhere_over_another_and_over_itself(tmp_path):
    filled_bank().save(tmp_path / "a")
    MemoryBank(memory_layers=[2], chunk_size=8).save(tmp_path / "b")
    with MemoryBank.open(tmp_path / "a") as bank:
        for seed, folder in enumerate("abc"):
            bank.save(tmp_path / folder)
            bank.add(f"after {folder}", *random_tokens(4, seed=50 + seed))
            with MemoryBank.open(tmp_path / folder, read_only=True) as saved:
                saved.folder.verify()
                assert (state(saved) == state(bank)) == (folder == "a"), "the others do not follow"
        bank.save(tmp_path / "c")
        assert state(MemoryBank.load(tmp_path / "c")) == state(bank)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_bank_without_whole_chunks_is_saved_too(tmp_path, num_tokens):
    bank = MemoryBank(memory_layers=LAYERS, chunk_size=4)
    if num_tokens:
        bank.add("a", *random_tokens(num_tokens))
    bank.save(tmp_path)
    loaded = MemoryBank.load(tmp_path)
    assert state(loaded) == state(bank)
    assert loaded.is_empty == (num_tokens == 0)
    for each in (bank, loaded):
        each.append("a", *random_tokens(5)) if num_tokens else each.add("a", *random_tokens(8))
    assert state(loaded) == state(bank)
    assert bank.num_chunks == 2


def test_a_deleted_document_is_gone_from_the_disk(tmp_path):
    bank = filled_bank(storage_dtype="float32")
    secret = random_tokens(4, seed=99)
    bank.add("secret name", *secret)
    bytes_of_secret = secret[0][0][0, 1].numpy().tobytes()

    def is_on_disk(wanted: bytes) -> bool:
        return any(wanted in content for content in content_of(tmp_path).values())

    bank.save(tmp_path)
    assert is_on_disk(bytes_of_secret)
    assert is_on_disk(b"secret name")
    bank.delete("secret name")
    bank.save(tmp_path)
    assert not is_on_disk(bytes_of_secret)
    assert not is_on_disk(b"secret name")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_to_any_file_is_refused_when_it_is_loaded(tmp_path, damage):
    filled_bank().save(tmp_path)
    files = {path: content for path, content in content_of(tmp_path).items() if content}
    assert {path.suffix for path in files} == {".sqlite", ".safetensors"}
    for path, content in files.items():
        place = content.index(b"num_tokens") if path.name == CATALOGUE else len(content) // 2
        if damage == "remove":
            path.unlink()
        else:
            flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            path.write_bytes(flipped if damage == "flip" else content[:place])
        with pytest.raises(ValueError, match=path.name):
            MemoryBank.load(tmp_path)
        path.write_bytes(content)
        MemoryBank.load(tmp_path)


@pytest.mark.parametrize(
    ("pragma", "message"),
    [
        ("user_version = 6", r"schema version 5, got version 6 in .*catalogue\.sqlite.*newer"),
        ("user_version = 2", "schema version 5, got version 2"),
        ("application_id = 7", r"catalogue\.sqlite.*is not the catalogue of a memory bank"),
    ],
)
def test_other_versions_and_other_programs_files_are_refused(tmp_path, pragma, message):
    filled_bank().save(tmp_path)
    connection = sqlite3.connect(tmp_path / CATALOGUE)
    connection.execute(f"PRAGMA {pragma}")
    connection.commit()
    connection.close()
    for use in (MemoryBank.load, MemoryBank.open, filled_bank().save):
        with pytest.raises(ValueError, match=message):
            use(tmp_path)


def test_a_changed_setting_is_refused(tmp_path):
    filled_bank().save(tmp_path)
    connection = sqlite3.connect(tmp_path / CATALOGUE)
    connection.execute("""UPDATE bank SET content = replace(content, '"chunk_size": 4', '"chunk_size": 8')""")
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match=r"catalogue\.sqlite.*checksum"):
        MemoryBank.load(tmp_path)


def test_the_format_before_this_one_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 1}))
    for use in (MemoryBank.load, MemoryBank.open):
        with pytest.raises(ValueError, match=r"manifest\.json.*earlier version.*memorize its documents again"):
            use(tmp_path)


def test_missing_folders_and_files_in_their_place_are_refused(tmp_path):
    for use in (MemoryBank.load, MemoryBank.open):
        with pytest.raises(ValueError, match=r"must be a saved memory bank.*nowhere.*catalogue\.sqlite"):
            use(tmp_path / "nowhere")
        assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a saved memory bank"):
        MemoryBank.load(tmp_path / "file")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="`folder` must be a folder that can be written"):
            filled_bank().save(folder)
        with pytest.raises(ValueError, match="`folder` must be a folder that can be written"):
            MemoryBank.create(folder, memory_layers=LAYERS, chunk_size=4)


def test_another_encoder_is_refused(tmp_path):
    filled_bank().save(tmp_path / "a")
    for use in (MemoryBank.load, MemoryBank.open):
        with pytest.raises(ValueError, match=r"written by encoder encoder-a.*encoder is encoder-b.*Ways out"):
            use(tmp_path / "a", model=NamedEncoder("encoder-b"))
    MemoryBank.load(tmp_path / "a", model=NamedEncoder("encoder-a"))
    MemoryBank.open(tmp_path / "a").close()  # and the refused one has let go of the lock
    MemoryBank(memory_layers=LAYERS, chunk_size=4).save(tmp_path / "none")
    with pytest.raises(ValueError, match="names no encoder"):
        MemoryBank.load(tmp_path / "none", model=NamedEncoder("encoder-a"))


def test_a_bank_is_loaded_to_another_device(tmp_path):
    filled_bank().save(tmp_path / "a")
    loaded = MemoryBank.load(tmp_path / "a", device="meta")  # stands for a GPU: it, too, refuses what is elsewhere
    assert {store.device.type for store in loaded._table.storage.stores} == {"meta"}
