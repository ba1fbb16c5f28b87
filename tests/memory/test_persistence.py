"""Saved banks: the same after a reload, whole or refused, and never half replaced."""

import errno
import json
from pathlib import Path

import pytest
import torch

from longmem.memory import MemoryBank, persistence

LAYERS = (1, 4)


def random_tokens(num_tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.randn(2, num_tokens, 6, generator=generator) for _ in LAYERS]
    values = [torch.randn(2, num_tokens, 5, generator=generator) for _ in LAYERS]
    return keys, values


def filled_bank(**options) -> MemoryBank:
    """Return a bank that is full, has evicted, has a hole filled by a delete, and tails that wait."""
    bank = MemoryBank(memory_layers=LAYERS, chunk_size=4, capacity_tokens=40, fingerprint="encoder-a", **options)
    for position, name in enumerate(["näive", "b", "c", "d"]):
        bank.add(name, *random_tokens(11, seed=position), range(11))
    bank.append("näive", *random_tokens(10, seed=9), range(11, 21))
    bank.delete("c")
    bank.add("no ids", *random_tokens(5, seed=5))
    return bank


def state(bank: MemoryBank):
    """Return all that can be read, in an order that tells rows apart."""
    read = []
    for layer in LAYERS if not bank.is_empty else ():
        scores, rows = bank.search(layer, torch.linspace(-1, 1, 36).view(2, 3, 6), 12)
        keys, values = bank.gather(layer, rows.flatten(1))
        read += [scores.tolist(), rows.tolist(), keys.tolist(), values.tolist(), bank.locate(rows)]
    ids = [bank.token_ids(info.document_id) for info in bank.documents()]
    return bank._settings(), bank.documents(), [None if each is None else each.tolist() for each in ids], read


class Encoder:
    def __init__(self, fingerprint):
        self.fingerprint = fingerprint

    def encoder_fingerprint(self):
        return self.fingerprint


@pytest.mark.parametrize("storage_dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("index", ["flat", "exact"])
def test_a_reloaded_bank_is_the_same_now_and_later(tmp_path, storage_dtype, index):
    bank = filled_bank(storage_dtype=storage_dtype, index=index)
    bank.save(tmp_path / "some" / "bank")
    loaded = MemoryBank.load(tmp_path / "some" / "bank", model=Encoder("encoder-a"))
    assert state(loaded) == state(bank)
    for change in (
        lambda bank: bank.append("b", *random_tokens(7, seed=20), range(11, 18)),
        lambda bank: bank.add("e", *random_tokens(18, seed=21)),
        lambda bank: bank.delete("b"),
        lambda bank: bank.append("no ids", *random_tokens(30, seed=22)),
    ):
        before = state(bank)
        change(bank)
        change(loaded)
        assert state(loaded) == state(bank) != before


def test_a_saved_bank_is_not_touched_by_what_the_loaded_one_does(tmp_path):
    filled_bank().save(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    loaded = MemoryBank.load(tmp_path)
    before = state(loaded)
    loaded.add("over all that is mapped", *random_tokens(40, seed=30))
    assert state(loaded) != before
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    loaded.save(tmp_path)  # over the very files that are mapped
    assert state(MemoryBank.load(tmp_path)) == state(loaded)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_bank_without_chunks_is_saved_too(tmp_path, num_tokens):
    bank = MemoryBank(memory_layers=LAYERS, chunk_size=4)
    if num_tokens:
        bank.add("a", *random_tokens(num_tokens))
    bank.save(tmp_path)
    loaded = MemoryBank.load(tmp_path)
    assert state(loaded) == state(bank)
    assert loaded.is_empty
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
        return any(wanted in path.read_bytes() for path in tmp_path.iterdir())

    bank.save(tmp_path)
    assert is_on_disk(bytes_of_secret)
    assert is_on_disk(b"secret name")
    bank.delete("secret name")
    bank.save(tmp_path)
    assert not is_on_disk(bytes_of_secret)
    assert not is_on_disk(b"secret name")


def saved_files(folder: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in folder.iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("which", range(4))
def test_damage_to_any_file_is_refused(tmp_path, damage, which):
    filled_bank().save(tmp_path)
    assert saved_files(tmp_path) == ["documents", "layer0", "layer1", "manifest.json"]
    path = sorted(tmp_path.iterdir())[which]
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "remove":
        path.unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(flipped if damage == "flip" else content[:middle])
    with pytest.raises(ValueError, match="`folder` must") as caught:
        MemoryBank.load(tmp_path)
    assert path.name in str(caught.value)
    path.write_bytes(content)
    MemoryBank.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not the manifest"),
        ("{}", "is not the manifest"),
        ("no json", "cannot be read"),
        (json.dumps({"format": persistence.FORMAT, "schema_version": 2}), "schema version 1, got version 2"),
    ],
)
def test_other_manifests_are_refused(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        MemoryBank.load(tmp_path)


def test_a_changed_number_in_the_manifest_is_refused(tmp_path):
    filled_bank().save(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest))
    MemoryBank.load(tmp_path)  # another layout of the same content is fine
    manifest["settings"]["capacity_tokens"] = 80
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="checksum"):
        MemoryBank.load(tmp_path)


def test_missing_folders_and_files_in_their_place_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a saved memory bank.*nowhere.*manifest\.json"):
        MemoryBank.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be read"):
        MemoryBank.load(tmp_path / "file")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="`folder` must be a folder that can be written"):
            filled_bank().save(folder)


def test_another_encoder_is_refused(tmp_path):
    filled_bank().save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"encoder-a, got encoder-b.*for_model"):
        MemoryBank.load(tmp_path / "a", model=Encoder("encoder-b"))
    MemoryBank.load(tmp_path / "a", model=Encoder("encoder-a"))
    MemoryBank.load(tmp_path / "a")
    MemoryBank(memory_layers=LAYERS, chunk_size=4).save(tmp_path / "none")
    with pytest.raises(ValueError, match="None, got encoder-a"):
        MemoryBank.load(tmp_path / "none", model=Encoder("encoder-a"))


class Killed(BaseException):
    """Nothing in the library may catch this, as nothing can catch a kill."""


def kill_at(monkeypatch, step: int) -> None:
    """Let the process end at the `step`-th call that changes the disk, in the middle of it where that is possible."""
    count = 0

    def dying(function, half=lambda *arguments, **options: None):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == step:
                half(*arguments, **options)
                raise Killed
            return function(*arguments, **options)

        return call

    def half_file(tensors, path):
        path.write_bytes(b"half")

    def half_text(path, text, **options):
        write_text(path, text[: len(text) // 2], **options)

    write_text = Path.write_text
    monkeypatch.setattr(persistence, "save_file", dying(persistence.save_file, half_file))
    monkeypatch.setattr(persistence.os, "fsync", dying(persistence.os.fsync))
    monkeypatch.setattr(persistence.os, "replace", dying(persistence.os.replace))
    monkeypatch.setattr(Path, "write_text", dying(write_text, half_text))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))


def test_a_kill_at_any_step_leaves_the_old_bank_or_the_new(tmp_path, monkeypatch):
    monkeypatch.setattr(persistence.os, "fsync", lambda descriptor: None)  # counted, not waited for
    old, new = filled_bank(), filled_bank()
    new.add("new", *random_tokens(9, seed=40))
    outcomes = []
    for step in range(1, 100):
        folder = tmp_path / str(step)
        old.save(folder)
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            try:
                new.save(folder)
                killed = False
            except Killed:
                killed = True
        found = state(MemoryBank.load(folder))
        assert found in (state(old), state(new))
        outcomes.append(found == state(new))
        new.save(folder)  # the next save works, and clears away what the killed one left
        assert state(MemoryBank.load(folder)) == state(new)
        assert saved_files(folder) == ["documents", "layer0", "layer1", "manifest.json"]
        if not killed:
            break
    assert not killed
    assert sorted(outcomes) == outcomes
    assert outcomes.count(False) >= 8
    assert outcomes.count(True) >= 4


def test_a_full_disk_leaves_the_old_bank_and_no_litter(tmp_path, monkeypatch):
    bank = filled_bank()
    bank.save(tmp_path)
    before, files = state(bank), sorted(tmp_path.iterdir())
    save_file, calls = persistence.save_file, []

    def full(tensors, path):
        calls.append(path)
        save_file(tensors, path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    bank.delete("b")
    with monkeypatch.context() as patch:
        patch.setattr(persistence, "save_file", full)
        with pytest.raises(ValueError, match=r"with room for the bank.*No space left.*unharmed"):
            bank.save(tmp_path)
    assert state(MemoryBank.load(tmp_path)) == before != state(bank)
    assert sorted(tmp_path.iterdir()) == files
