"""A stream that is saved again and again: what interrupts it leaves the stream before, or this one, and nothing for ever."""

from __future__ import annotations

import json
import os

import pytest
import torch
from killing import kill_at_any_time, kill_at_every_change
from model.test_streaming import make

from longmem.streaming import MemoryStream
from longmem.streaming.state import read_state


@pytest.fixture
def started(tmp_path):
    """A stream that was saved, what saves it after a few more tokens, and what checks the folder."""
    model, bank = make()
    tokens = torch.arange(200) % 97
    stream = model.stream(bank)
    stream.read(tokens[:60])
    folder = tmp_path / "stream"
    stream.save(folder)
    seen = []

    def save() -> None:
        stream.read(tokens[60:80])
        stream.save(folder)

    def check() -> None:
        loaded = MemoryStream.load(folder, model)
        seen.append(loaded.num_tokens)
        in_bank = loaded.memory.token_ids(loaded._state.document_id)
        count = loaded.num_tokens
        expected = torch.cat([tokens[:60], *[tokens[60:80]] * ((count - 60) // 20)])
        assert torch.equal(torch.cat([in_bank, loaded.local_ids]), expected)

    return stream, folder, save, check, seen


def test_a_killed_save_leaves_a_stream_and_the_next_one_no_copies(started):
    stream, folder, save, check, seen = started
    assert kill_at_every_change(folder, save, check, every=4) >= 5
    assert set(seen) == {60, 80}
    stream.save(folder)
    assert len(os.listdir(folder)) == 3  # a bank, the state, the lock


@pytest.mark.slow
def test_sixty_kills_lose_no_stream(started):
    _, folder, save, check, seen = started
    kill_at_any_time(save, check, kills=60, seconds=1)
    kill_at_every_change(folder, save, check)
    assert min(seen) >= 60
    assert max(seen) > 60


def test_no_changed_bit_of_a_state_passes(started):
    _, folder, *_ = started
    path = folder / "stream.json"
    whole = path.read_bytes()
    state = read_state(folder)
    for bit in torch.randint(0, 8 * len(whole), (200,), generator=torch.Generator().manual_seed(0)).tolist():
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match="`folder` must hold a saved stream"):
            read_state(folder)
    saved = json.loads(whole)
    del saved["checksum"]  # of an earlier version
    path.write_text(json.dumps(saved))
    assert read_state(folder) == state


def test_a_full_disk_leaves_the_stream_of_before(started, monkeypatch):
    stream, folder, _, check, seen = started
    before = sorted(os.listdir(folder))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("longmem.streaming.state.write_file", full)
        with pytest.raises(ValueError, match="`folder` must be a folder that can be written, .*No space left"):
            stream.save(folder)
    assert sorted(os.listdir(folder)) == before
    check()
