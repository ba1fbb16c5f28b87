"""A read is of one state: rows are used only with the generation of the memory that they were found in."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import pytest
import torch
from folder_banks import SETTINGS as FOLDER_SETTINGS
from folder_banks import write
from test_bank import LAYERS, new_bank, random_tokens

from longmem.errors import ChangedMemoryError
from longmem.memory import BankShards, MemoryBank
from longmem.memory.rows import table
from longmem.model.attention import read_memory

LAYER, KV_HEADS, DIM = LAYERS[0], 2, 6


def filled():
    bank = new_bank()
    for number, name in enumerate("abc"):
        bank.add(name, *random_tokens(20, seed=number))
    return bank


class ChangedBetween:
    """A bank that another thread changes after a search and before what was found is read, so many times."""

    def __init__(self, bank, changes):
        self.bank, self.changes = bank, list(changes)
        self.num_searches = 0

    def __getattr__(self, name):
        return getattr(self.bank, name)

    def search(self, *arguments, **options):
        self.num_searches += 1
        found = self.bank.search(*arguments, **options)
        if self.changes:
            thread = threading.Thread(target=self.changes.pop(0))
            thread.start()
            thread.join()
        return found


def read(memory, queries):
    return read_memory(queries, [memory], LAYER, num_kv_heads=KV_HEADS, num_chunks=3, scaling=0.4)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_deletion_between_search_and_gather_is_never_seen(with_gradients):
    queries = torch.randn(1, 4, 5, DIM, requires_grad=with_gradients)
    bank = filled()
    memory = ChangedBetween(bank, [lambda: bank.delete("a"), lambda: bank.rename("b", "z"), lambda: bank.delete("z")])
    result = read(memory, queries)
    assert memory.num_searches == 2  # the first deletion made rows worthless; a new name moves nothing
    alone = filled()
    alone.delete("a")
    torch.testing.assert_close(result.output, read(alone, queries).output, rtol=0, atol=0)
    assert (result.output - read(filled(), queries).output).abs().max() > 1e-3  # so the deletion mattered


def test_rows_of_another_generation_are_refused():
    bank = filled()
    shards = BankShards([bank, other := filled()])
    for memory, change in ((bank, bank), (bank.select("b"), bank), (shards, other)):
        found = memory.search(LAYER, torch.randn(KV_HEADS, 2, DIM), 3)
        memory.gather(LAYER, found.rows[:, 0], found.generation)
        change.delete(change.documents()[0].document_id)
        with pytest.raises(ChangedMemoryError, match="search again"):
            memory.gather(LAYER, found.rows[:, 0], found.generation)


def test_a_memory_that_changes_without_end_is_an_error():
    bank = filled()
    changes = [lambda: bank.append("a", *random_tokens(4)) or bank.add("x", *random_tokens(4)) or bank.delete("x")] * 40
    with pytest.raises(ChangedMemoryError):
        read(ChangedBetween(bank, changes), torch.randn(1, 4, 5, DIM))


def test_old_names_of_parts_still_answer_and_say_so(tmp_path):
    bank = filled()
    bank.save(tmp_path / "bank")
    with type(bank).open(tmp_path / "bank") as opened:
        with pytest.warns(DeprecationWarning, match=r"`bank.verify` is `bank.folder.verify` now"):
            assert opened.verify() == opened.folder.verify()
        with pytest.warns(DeprecationWarning, match=r"`bank.staleness` is `bank.freshness.report` now"):
            assert opened.staleness().entries == opened.num_chunks
    with pytest.warns(DeprecationWarning, match="compact"), pytest.raises(ValueError, match="without a folder"):
        bank.compact()
    with pytest.raises(AttributeError, match="no_such_name"):
        bank.no_such_name  # noqa: B018


@pytest.mark.parametrize("change", ["write", "transaction", "compact", "close"])
def test_a_thread_waited_for_inside_a_transaction_is_refused_its_change(change, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "TURN_SECONDS", 0.05)
    errors = []
    with MemoryBank.create(tmp_path, **FOLDER_SETTINGS) as bank:

        def act():
            if change == "compact":
                bank.folder.compact()
            elif change == "close":
                bank.close()
            elif change == "write":
                write(bank, "other", range(40, 50))
            else:
                with bank.transaction():
                    pass

        def other():
            try:
                act()
            except ValueError as error:
                errors.append(str(error))

        with bank.transaction():
            write(bank, "mine", range(10))
            thread = threading.Thread(target=other)
            thread.start()
            thread.join(30)
            assert not thread.is_alive()
        assert re.fullmatch(
            r"a bank must be changed by one thread at a time.*0\.05 seconds; if that one waits.*", *errors
        )
        assert [each.document_id for each in bank.documents()] == ["mine"]
        act()  # behind the block there is nothing to wait for
    with MemoryBank.open(tmp_path) as bank:
        bank.folder.verify()
        assert "mine" in bank
    assert len(errors) == 1


def test_closing_waits_for_the_transaction_of_another_thread(tmp_path):
    bank, is_inside, errors = MemoryBank.create(tmp_path, **FOLDER_SETTINGS), threading.Event(), []

    def change():
        try:
            with bank.transaction():
                write(bank, "a", range(10))
                is_inside.set()
                time.sleep(0.3)
                write(bank, "b", range(10))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    is_inside.wait()
    bank.close()
    thread.join()
    assert not errors
    with MemoryBank.open(tmp_path, read_only=True) as reader:
        assert [each.document_id for each in reader.documents()] == ["a", "b"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("where", ["memory", "folder", "transaction"])
def test_a_fork_beside_a_thread_that_is_at_a_bank_waits_for_no_thread_that_it_does_not_have(where, tmp_path):
    in_folder = where != "memory"
    bank = MemoryBank.create(tmp_path, **FOLDER_SETTINGS) if in_folder else MemoryBank(**FOLDER_SETTINGS)
    write(bank, "a", range(10))
    is_inside, may_go = threading.Event(), threading.Event()

    def hold():
        with bank.transaction() if where == "transaction" else bank.lock:
            is_inside.set()
            may_go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    is_inside.wait()
    if where != "transaction":
        threading.Timer(0.2, may_go.set).start()
    if not (child := os.fork()):
        signal.alarm(10)  # what waits for ever is ended
        try:
            assert len(bank.documents()) == 1
            try:
                write(bank, "b", range(10))
            except ValueError as error:
                os._exit(not in_folder or "opened to write by process" not in str(error))
            bank.close()
        except BaseException:
            os._exit(1)
        os._exit(0)
    may_go.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    write(bank, "c", range(10))
    assert [each.document_id for each in bank.documents()] == ["a", "c"]
    bank.close()


CUT_SHORT = {
    "append": lambda bank: write(bank, "a", range(10, 30)),
    "delete": lambda bank: bank.delete("a"),
    "replace": lambda bank: bank._take_version("a", with_documents("a")),
}


def with_documents(names):
    bank = MemoryBank(**FOLDER_SETTINGS, capacity_tokens=40)
    for name in names:
        write(bank, name, range(10))
    return bank


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    ("change", "owner", "name"),
    [
        *(("append", *place) for place in (("", "_tell_indexes_of"), ("storage", "write"), ("ledger", "evict"))),
        *(("delete", *place) for place in (("", "_remove"), ("storage", "drop"), ("storage", "move"))),
        *(("replace", *place) for place in (("", "_keep"), ("storage", "write"), ("ledger", "record"))),
    ],
)
def test_a_bank_in_memory_whose_change_is_cut_short_answers_no_more(change, owner, name, error, monkeypatch):
    bank = with_documents("abc")

    def stop(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(getattr(bank._table, owner) if owner else bank._table, name, stop)
        with pytest.raises(error):
            CUT_SHORT[change](bank)
    uses = (
        bank.documents,
        lambda: bank.text("b"),
        lambda: write(bank, "d", range(3)),
        bank.copy,
        lambda: bank.is_empty,
    )
    for use in uses:
        with pytest.raises(ValueError, match=r"was cut short \(.*\).*make it again, or load"):
            use()


def test_a_change_that_is_refused_leaves_a_bank_in_memory(monkeypatch):
    bank = MemoryBank(**FOLDER_SETTINGS)
    write(bank, "a", range(10))
    for wrong in (lambda: write(bank, "a", []), lambda: bank.delete("b"), lambda: write(bank, "", range(3))):
        with pytest.raises(ValueError, match="must"):
            wrong()

    def full(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(bank._table.storage, "reserve", full)
        with pytest.raises(MemoryError):
            write(bank, "a", range(10))
    assert bank.info("a").num_tokens == 10
