"""One process writes, others read: each sees one commit, whole, for as long as it likes."""

import time

import pytest
import torch
from folder_banks import LAYERS, SETTINGS, SIZES, contents, keys_and_values, write

from longmem.memory import MemoryBank


def make_bank(folder) -> None:
    with MemoryBank.create(folder, **SETTINGS) as bank:
        write(bank, "stable", range(800, 837))
        write(bank, "one", range(5))
        write(bank, "twin", range(500, 505))
        write(bank, "log", range(700, 705))


def check_version(reader: MemoryBank) -> int | None:
    """Check that all that is read is of one version; return it, or None if a document is no longer to be had."""
    ids = {info.document_id: reader.token_ids(info.document_id) for info in reader.documents()}
    assert set(ids) == {"stable", "one", "twin", "log"}
    if any(each is None for each in ids.values()):
        return None
    version = int(ids["one"][0]) // 1000
    for name, offset in (("one", 0), ("twin", 500)):
        assert ids[name].tolist() == list(range(1000 * version + offset, 1000 * version + offset + 5 + version % 17))
    contents(reader)
    return version


def check_snapshot(reader: MemoryBank) -> None:
    """Check that a reader that opened the first version still has its chunks."""
    assert [(info.document_id, info.num_chunks) for info in reader.documents()] == [
        ("stable", 10),
        ("one", 2),
        ("twin", 2),
        ("log", 2),
    ]
    every = reader.locate(torch.arange(reader.num_chunks))
    for name, first, num_tokens in (("stable", 800, 37), ("one", 0, 5), ("twin", 500, 5), ("log", 700, 5)):
        keys, values = keys_and_values(torch.arange(first, first + num_tokens))
        found = sorted((place.start, place.stop, row) for row, place in enumerate(every) if place.document_id == name)
        assert [place[:2] for place in found] == [(i, min(i + 4, num_tokens)) for i in range(0, num_tokens, 4)]
        for position, layer in enumerate(LAYERS):
            heads = SIZES[layer][0]
            means = torch.stack([keys[position][:, start:stop].mean(dim=1) for start, stop, _ in found], dim=1)
            assert (reader.search(layer, means, len(every)).rows.sort().values == torch.arange(len(every))).all()
            rows = torch.tensor([row for _, _, row in found]).expand(heads, -1)
            for stored, written in zip(reader.gather(layer, rows, reader.generation), (keys, values), strict=True):
                assert torch.equal(stored.float().flatten(1, 2)[:, :num_tokens], written[position])


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_readers_see_whole_commits_while_another_process_writes(workers, tmp_path, seconds):
    folder = tmp_path / "bank"
    make_bank(folder)
    with MemoryBank.open(folder, read_only=True) as early, MemoryBank.open(folder, read_only=True) as reader:
        enough = tmp_path / "enough"
        wait = workers.start("write_versions", folder=str(folder), seconds=seconds, enough=str(enough))
        seen, refused, stop = [], 0, time.monotonic() + seconds + 60
        # The first commits take a moment; the last writer closes the bank before it reports.
        while time.monotonic() < stop:
            if len(seen) % 3 == 0:
                with MemoryBank.open(folder, read_only=True) as another:
                    version = check_version(another)
                    assert version is not None or another.reload()
            reader.folder.reload()
            version = check_version(reader)
            if version is None:
                assert reader.folder.reload(), "only a commit deletes documents"
                continue
            assert not seen or version >= seen[-1]
            seen.append(version)
            if len(set(seen)) > seconds:
                enough.touch()
            if not version:
                continue  # the writer may not have opened the bank yet
            try:
                MemoryBank.open(folder).close()
                break  # the writer is done
            except ValueError as error:
                refused += "somebody is writing the bank" in str(error)
        reports, status = wait()
        assert status == 0, reports
        assert len(set(seen)) > seconds
        assert refused
        check_snapshot(early)
        assert early.token_ids("stable").tolist() == list(range(800, 837))
        assert early.text("one") is None
        assert early.reload()
        assert check_version(early) == reports[-1] - 1
        early.verify()


def test_a_snapshot_outlives_deletion_compaction_and_another_bank_in_its_place(tmp_path):
    make_bank(tmp_path)
    with MemoryBank.open(tmp_path, read_only=True) as reader, MemoryBank.open(tmp_path, read_only=True) as other:
        with MemoryBank.open(tmp_path) as bank:
            for name in ("one", "twin", "log"):
                bank.delete(name)
            bank.folder.compact()
        check_snapshot(reader)
        assert reader.token_ids("one") is None
        assert reader.token_ids("stable").tolist() == list(range(800, 837))
        replacement = MemoryBank(**SETTINGS | {"capacity_tokens": None})
        write(replacement, "new", range(3000, 3009))
        replacement.save(tmp_path)
        check_snapshot(reader)
        check_snapshot(other)
        assert other.token_ids("stable") is None, "not what the new bank holds"
        assert reader.folder.reload()
        assert contents(reader) == contents(replacement)


def test_a_reader_is_told_when_the_bank_was_replaced_by_one_with_other_settings(tmp_path):
    make_bank(tmp_path)
    replacement = MemoryBank(**SETTINGS | {"chunk_size": 8})
    write(replacement, "new", range(3000, 3020))
    with MemoryBank.open(tmp_path, read_only=True) as reader:
        replacement.save(tmp_path)
        for _ in range(2):
            with pytest.raises(ValueError, match="other settings.*open it again"):
                reader.folder.reload()
            check_snapshot(reader)


def test_two_readers_and_one_writer_in_one_process(tmp_path):
    make_bank(tmp_path)
    with MemoryBank.open(tmp_path) as bank, MemoryBank.open(tmp_path, read_only=True) as reader:
        for refused in (lambda: MemoryBank.open(tmp_path), lambda: MemoryBank(**SETTINGS).save(tmp_path)):
            with pytest.raises(ValueError, match="somebody is writing the bank"):
                refused()
        with pytest.raises(ValueError, match="must not hold a bank yet"):
            MemoryBank.create(tmp_path, **SETTINGS)
        for change in (
            lambda: write(reader, "stable", [1]),
            lambda: reader.delete("one"),
            lambda: reader.rename("one", "two"),
            lambda: reader.pin("one"),
            lambda: reader.tag("one", ["tag"]),
            reader.clear,
            reader.folder.compact,
        ):
            with pytest.raises(ValueError, match="read_only=True"):
                change()
        check_snapshot(reader)
        assert not reader.folder.reload()
        write(bank, "stable", [837])
        assert reader.folder.reload()
        assert contents(reader) == contents(bank)
    MemoryBank.open(tmp_path).close()
