"""Workers that encode while the encoder moves on: the bound holds, the stalest come first, the queue is bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_models import VersionedModel
from local_shards import LocalShards

from longmem.cluster import ClusterBank, Encoders, Feed, engine
from longmem.cluster.engine import RayShards
from longmem.cluster.wire import Traffic
from longmem.cluster.workers import ATTEMPTS, IN_FLIGHT, EncodingWorker, Pool
from longmem.errors import StaleMemoryError

BOUND = 4
pytestmark = pytest.mark.filterwarnings("ignore:.* chunks of an earlier encoder")


class LocalRay:
    """As much of Ray as a pool uses, in this process: a task is done when it was waited for a number of times."""

    class exceptions:
        class RayActorError(Exception):
            pass

        class ObjectLostError(Exception):  # a node has gone, and the answer with it
            pass

    lost = [exceptions.RayActorError]  # how a worker that is dead is told of; a test may say another

    @staticmethod
    def put(content: Any) -> Any:
        return content

    @staticmethod
    def get(task: LocalTask) -> Any:
        if task.actor.is_dead:
            raise LocalRay.lost[0]
        return task.call()

    @staticmethod
    def wait(
        tasks: list[LocalTask], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[LocalTask], list[LocalTask]]:
        for _ in range(100):
            for task in tasks:
                task.waits -= 1
            ready = [task for task in tasks if task.waits <= 0 and not (task.name == "ready" and task.actor.is_dead)]
            if ready or timeout is not None:
                return ready[:num_returns], []
        raise AssertionError("it would wait for ever")


class LocalTask:
    def __init__(self, actor: LocalActor, name: str, call: Callable[[], Any]) -> None:
        self.actor, self.name, self.call, self.waits = actor, name, call, actor.waits


class LocalActor:
    """An encoding worker in this process, whose tasks take so many waits."""

    def __init__(self, waits: int = 1) -> None:
        self.worker, self.waits, self.is_dead = EncodingWorker(VersionedModel), waits, False

    def __getattr__(self, name: str) -> LocalMethod:
        return LocalMethod(self, name)


class LocalMethod:
    def __init__(self, actor: LocalActor, name: str) -> None:
        self.actor, self.name = actor, name

    def options(self, **options: Any) -> LocalMethod:
        assert options == {"max_task_retries": -1}
        return self

    def remote(self, *given: Any) -> LocalTask:
        return LocalTask(self.actor, self.name, lambda: getattr(self.actor.worker, self.name)(*given))


@pytest.fixture(autouse=True)
def local_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "join", lambda: LocalRay)


def pool_of(*actors: LocalActor) -> Encoders:
    workers = Encoders.__new__(Encoders)
    workers.actors = list(actors)
    return workers


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[ClusterBank]:
    policy = f"bounded:max_lag={BOUND},on_violation=mask"
    folders = ClusterBank.create(tmp_path, 2, VersionedModel(), storage_dtype="float32", refresh=policy)
    shards = LocalShards([Path(each) for each in folders])
    yield ClusterBank(shards)
    shards.close()


def oldest_read(bank: ClusterBank) -> float | None:
    """Return the version of the oldest chunk that a search finds; None if it finds nothing."""
    found = bank.search(1, torch.randn(2, 2, 6), 99)
    is_there = found.rows.flatten(1) >= 0
    if found.generation is None or not is_there.any():
        return None
    return float(bank.gather(1, found.rows.flatten(1), found.generation)[1][is_there].min())


def test_no_read_is_older_than_the_bound(bank):
    model, quick, slow = VersionedModel(), LocalActor(1), LocalActor(9)
    feed, lags, longest = Feed(bank, pool_of(quick, slow), max_waiting=3), [], 0
    for step in range(1, 61):
        model.version = step
        feed.publish(model)
        if step <= 6:
            feed.put(f"document-{step}", list(range(20)))
        longest = max(longest, len(feed.waiting))
        if step == 30:
            slow.is_dead = True  # what it had in hand is done by whoever is free
        if step == 34:
            slow.is_dead = False
        if (oldest := oldest_read(bank)) is not None:
            lags.append(step - oldest)
    assert len(lags) > 40
    assert 0 < max(lags) <= BOUND
    assert feed.num_refused > 0  # the slow worker's come too late
    assert longest <= 3
    assert sorted(each.document_id for each in bank.documents()) == [f"document-{step}" for step in range(1, 7)]
    assert all(each.num_tokens == 20 for each in bank.documents())


def test_the_stalest_document_is_encoded_first(bank, monkeypatch):
    model, actor, chosen = VersionedModel(), LocalActor(1), []
    feed = Feed(bank, pool_of(actor), max_waiting=9)
    give = feed._pool.give

    def give_and_note(task: Any) -> None:
        others = [version for name, version in feed.versions.items() if name not in feed._given]
        chosen.append((task.document_id, feed.versions.get(task.document_id, -1), min(others, default=99)))
        give(task)

    monkeypatch.setattr(feed._pool, "give", give_and_note)
    for step in range(1, 25):
        model.version = step
        feed.publish(model)
        if step <= 3:
            feed.put(f"document-{step}", list(range(8)))
    assert len({name for name, version, _ in chosen if version >= 0}) == 3
    assert all(version <= oldest for _, version, oldest in chosen)


def test_what_was_encoded_too_long_ago_is_refused_and_never_read(bank):
    model = VersionedModel()
    stamps = []
    for step in range(BOUND + 2):
        model.version = step
        bank.ready_for(model)
        stamps.append(model.encoder_stamp())
    old = VersionedModel(0)
    keys, values = ([layer[0] for layer in part] for part in old.encode(torch.zeros(1, 8)))
    bank.write_as(stamps[0])
    with pytest.raises(StaleMemoryError, match=f"{BOUND + 1} changes behind"):
        bank.add("late", keys, values, [1] * 8)
    assert "late" not in bank
    bank.write_as(stamps[1])
    bank.add("in time", keys, values, [1] * 8)
    assert bank.info("in time").num_tokens == 8
    bank.write_as(VersionedModel(99).encoder_stamp())
    with pytest.raises(StaleMemoryError, match="was made ready for"):
        bank.add("unknown", keys, values, [1] * 8)


def test_a_queue_that_nobody_empties_is_given_up(bank):
    feed = Feed(bank, pool_of(LocalActor(10**9)), max_waiting=2, patience=0.01)
    feed.publish(VersionedModel())
    for number in range(IN_FLIGHT + 2):
        feed.put(f"document-{number}", [1, 2, 3])
    with pytest.raises(TimeoutError, match="2 documents wait"):
        feed.put("one more", [1, 2, 3])


@pytest.mark.parametrize("error", ["RayActorError", "ObjectLostError"])
def test_tasks_are_done_once_and_in_bounded_numbers(error, monkeypatch):
    monkeypatch.setattr(LocalRay, "lost", [getattr(LocalRay.exceptions, error)])
    first, second = LocalActor(1), LocalActor(3)
    workers, taken, longest = pool_of(first, second), [], 0

    def tasks() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    done = []
    for task, answer in workers.run(
        tasks(), lambda actor, task: actor.work.remote(lambda *given: given[2] + 100, None, task)
    ):
        done.append(task)
        longest = max(longest, len(taken) - len(done))
        assert answer == task + 100
        first.is_dead = len(done) == 5
    assert sorted(done) == list(range(20))
    assert longest <= IN_FLIGHT * 2


def test_a_task_that_kills_its_workers_is_an_error():
    actor = LocalActor(1)

    def die() -> None:
        raise LocalRay.exceptions.RayActorError

    pool = Pool(pool_of(actor), lambda actor, task: LocalTask(actor, "work", die))
    pool.give("bad")

    def wait() -> None:
        while pool.is_busy:
            assert list(pool.done(None)) == []

    with pytest.raises(RuntimeError, match=f"{ATTEMPTS} encoding workers died"):
        wait()


@pytest.mark.parametrize("error", ["RayActorError", "ObjectLostError"])
def test_a_shard_whose_answer_is_lost_is_asked_again_or_is_interrupted(error, monkeypatch):
    monkeypatch.setattr(LocalRay, "lost", [getattr(LocalRay.exceptions, error)])
    monkeypatch.setattr(engine, "PAUSE", 0)
    actor = LocalActor(1)
    actor.worker = type("Folder", (), {"ask": lambda self, *given: list(given)})()
    shards = RayShards.__new__(RayShards)
    shards.actors, shards.traffic = [actor], Traffic()
    send = LocalMethod.remote

    def die_once(method: LocalMethod, *given: Any) -> LocalTask:
        actor.is_dead = shards.traffic.calls == 1
        return send(method, *given)

    monkeypatch.setattr(LocalMethod, "remote", die_once)
    assert shards.ask({0: ("look", 1)}) == {0: ["look", 1]}
    assert shards.traffic.calls == 2
    shards.traffic.calls = 0
    with pytest.raises(InterruptedError, match="shard 0 died while it was written to"):
        shards.ask({0: ("commit", 1)}, repeats=False)


def test_a_worker_that_can_not_make_its_model_is_an_error_at_once(monkeypatch):
    actor, done = LocalActor(1), []

    class CannotStart(LocalRay.exceptions.RayActorError):
        actor_init_failed = True

        def __str__(self) -> str:
            return "Traceback of Ray\nValueError: no model 'x'"

    monkeypatch.setattr(LocalRay, "lost", [CannotStart])
    actor.is_dead = True
    with pytest.raises(ValueError, match="could not make its model: ValueError: no model 'x'"):
        done.extend(pool_of(actor).run([1], lambda actor, task: actor.work.remote(None, None, task)))
    assert not done
    with pytest.raises(ValueError, match="`count` must be"):
        Encoders(VersionedModel, 0)


def test_a_document_that_is_put_again_while_it_is_written_ends_as_its_newest(bank):
    model, quick, slow = VersionedModel(), LocalActor(1), LocalActor(30)
    feed = Feed(bank, pool_of(slow, quick), max_waiting=9)
    feed.publish(model)
    for length in (8, 12, 16, 20):  # the slow worker gets the first
        feed.put("a", list(range(length)))
        feed.put(f"other-{length}", [1, 2, 3, 4])
    for _ in range(200):
        feed.pump(0.0)
    assert bank.token_ids("a").tolist() == list(range(20))
    assert not feed._given
    assert not feed.waiting
    assert feed.num_written == 8
