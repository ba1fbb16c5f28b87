"""Three nodes of a real cluster: shards, workers, drivers and nodes die, and nothing committed is lost or read twice."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from cluster_models import OPTIONS, SlowWorker, VersionedModel, memorize_once
from tiny_models import save_tiny_backbone, some_text

from longmem import LongMemForCausalLM, MemoryBank
from longmem.cli.main import main
from longmem.cluster import ClusterBank, Encoders, Feed, engine
from longmem.cluster.engine import NAMESPACE, actors_of, stop
from longmem.errors import MissingShardError
from longmem.memory import BankShards
from longmem.memory.memorize import memorize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
BOUND = 4
TIMEOUT = 400  # seconds, on a machine that has other work; no test waits so long for what is to fail
NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_log_monitor": False, "no_monitor": True}


def obey(orders: Connection, other_end: Connection) -> None:
    """Do, in a process of its own, the command that is sent."""
    other_end.close()  # so that this process ends with the one that forked it
    environment, command = orders.recv()
    os.environ.update(environment)
    main(command)


@pytest.fixture(scope="module")
def driver() -> Iterator[tuple[BaseProcess, Connection]]:
    """A process that waits for a command: forked with all that is imported here, and before Ray starts threads here."""
    here, there = Pipe()
    made = get_context("fork").Process(target=obey, args=(there, here), daemon=True)
    made.start()
    there.close()
    yield made, here
    made.kill()
    made.join()


@pytest.fixture(scope="module")
def cluster(driver: object) -> Iterator[object]:
    import ray
    from ray.cluster_utils import Cluster

    made, patient = Cluster(), pytest.MonkeyPatch()
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    patient.setenv("PYTHONPATH", paths, prepend=os.pathsep)  # workers have what pytest has given this process
    wait_for_nodes(patient)
    patient.setattr(engine, "PATIENCE", TIMEOUT)
    patient.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # some twenty processes import the same
    try:
        for number in range(3):
            made.add_node(**NODE, **({} if number else {"include_dashboard": False}))
        ray.init(address=made.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        patient.undo()


def wait_for_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ray wait for a node that starts: by itself it gives up after 30 seconds, and a busy machine may take longer."""
    from ray._private import services

    look = services.get_node

    def get_node(*given: object, **options: object) -> object:
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                return look(*given, **options)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    monkeypatch.setattr(services, "get_node", get_node)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone")))


@pytest.fixture(scope="module")
def model(backbone: str) -> LongMemForCausalLM:
    return LongMemForCausalLM.from_backbone(backbone, **OPTIONS).eval()


@pytest.fixture(scope="module")
def workers(cluster: object) -> Iterator[Encoders]:
    """Two workers of all tests, with encoder `VersionedModel`, which needs no transformers: they start in half the time."""
    with Encoders(VersionedModel, 2, kind=SlowWorker, actor_options={"num_cpus": 0.1}) as made:
        yield made


@pytest.fixture(scope="module")
def notes(
    workers: Encoders, model: LongMemForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClusterBank]:
    root = tmp_path_factory.mktemp("notes")
    ClusterBank.create(root, 3, model)
    bank = ClusterBank.start("notes", root, actor_options={"num_cpus": 0.1}, timeout=TIMEOUT)
    for number in range(6):
        model.memorize(bank, some_text(14, seed=number), f"document-{number}")
    yield bank
    stop("notes")


@pytest.fixture(scope="module")
def started(workers: Encoders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root = tmp_path_factory.mktemp("moving")
    policy = f"bounded:max_lag={BOUND},on_violation=mask"
    ClusterBank.create(root, 2, VersionedModel(), storage_dtype="float32", refresh=policy)
    ClusterBank.start("moving", root, actor_options={"num_cpus": 0.1}, timeout=TIMEOUT)
    yield
    stop("moving")


@pytest.fixture
def moving(started: None) -> Iterator[ClusterBank]:
    """An empty bank of encoder `VersionedModel`."""
    bank = ClusterBank.connect("moving", timeout=TIMEOUT)
    yield bank
    bank = ClusterBank.connect("moving", timeout=TIMEOUT)  # a test may have started it again
    for each in bank.documents():
        bank.delete(each.document_id)


def opened(bank: ClusterBank) -> BankShards:
    return BankShards(MemoryBank.open(each["folder"], read_only=True) for each in bank._told)


def inside(actor: object, look: Callable[[object], object]) -> object:
    """Return what a function finds in the process of an actor."""
    import ray

    return ray.get(actor.__ray_call__.remote(look))


def kill(actor: object) -> None:
    """Kill the process of an actor as the system would."""
    os.kill(inside(actor, lambda self: os.getpid()), signal.SIGKILL)


def let_pause(workers: Encoders, *pauses: float, version: int = 0) -> None:
    """Let workers take so many seconds longer for a segment, with an encoder of this version; wait for those that start."""
    import ray

    actors = zip(workers.actors, pauses, strict=True)
    ray.get([each.slow_down.options(max_task_retries=-1).remote(pause, version) for each, pause in actors])


def node_of(actor: object) -> object:
    """Return the node that an actor runs on."""
    return inside(actor, lambda self: __import__("ray").get_runtime_context().get_node_id())


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(5))


def test_it_reads_what_the_shards_hold(notes, model, prompt):
    with torch.no_grad():
        got = model(prompt, memory=ClusterBank.connect("ray://notes"), output_memory_reads=True)
        expected = model(prompt, memory=opened(notes), output_memory_reads=True)
        without = model(prompt)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert (got.logits - without.logits).abs().max() > 1e-3
    torch.testing.assert_close(got.memory_reads[0].rows, expected.memory_reads[0].rows)
    with pytest.raises(ValueError, match="no bank 'letters' runs"):
        ClusterBank.connect("letters")


def test_a_shard_that_is_killed_is_read_again_and_written_once(notes, model, prompt):
    with torch.no_grad():
        expected = model(prompt, memory=notes).logits
    for actor in actors_of("notes")[:2]:
        kill(actor)
    with torch.no_grad():
        torch.testing.assert_close(model(prompt, memory=notes).logits, expected)
    name = next(f"new-{number}" for number in range(99) if notes.shard_of(f"new-{number}") == 2)
    kill(actors_of("notes")[2])
    model.memorize(notes, "the dog sat", name)
    assert notes.text(name) == "the dog sat"
    assert sorted(each.document_id for each in notes.documents()).count(name) == 1
    notes.delete(name)


def test_a_shard_needs_no_library_of_models(notes, moving):
    """It takes seconds of each start to import them."""
    for bank in ("notes", "moving"):
        libraries = inside(
            actors_of(bank)[0], lambda self: {"transformers", "accelerate", "torch._dynamo"} & {*sys.modules}
        )
        assert libraries == set()


def test_workers_shards_and_a_node_that_go_in_a_fill_leave_nothing_out_and_nothing_twice(
    cluster, notes, moving, workers, model, prompt
):
    draw = torch.Generator().manual_seed(3)
    texts = {f"filled-{number}": torch.randint(0, 100, (24,), generator=draw).tolist() for number in range(16)}
    with torch.no_grad():
        expected = model(prompt, memory=notes).logits
    done = []
    let_pause(workers, 0, 0)
    ask = lambda actor, task: actor.work.remote(memorize_once, moving, task)  # noqa: E731
    for (name, _), answer in workers.run(texts.items(), ask):
        assert answer is None, answer
        done.append(name)
        if len(done) == 2:
            kill(workers.actors[0])
        if len(done) == 5:  # with the shards and workers that are there
            where = [node_of(each) for each in (*actors_of("notes"), *actors_of("moving"))]
            lost = max(cluster.worker_nodes, key=lambda node: where.count(node.node_id))
            assert lost.node_id in where
            cluster.remove_node(lost, allow_graceful=False)
    with torch.no_grad():  # on the nodes that are left
        torch.testing.assert_close(model(prompt, memory=notes).logits, expected)
    cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    with torch.no_grad():
        torch.testing.assert_close(model(prompt, memory=notes).logits, expected)
    assert sorted(done) == sorted(texts)
    for name, ids in texts.items():
        assert moving.token_ids(name).tolist() == ids
    listed = [each.document_id for each in moving.documents()]
    assert len(listed) == len(set(listed))


def test_what_can_not_be_started_is_an_error_in_one_sentence(cluster, notes, model, tmp_path, monkeypatch):
    for name, root, said in (
        ("notes", Path(notes._told[0]["folder"]).parent, "'notes', known: .*notes"),
        ("none", tmp_path, "must hold the folders shard-0"),
        ("a/b", tmp_path, "must be named by letters"),
    ):
        with pytest.raises(ValueError, match=said):
            ClusterBank.start(name, root)
    ClusterBank.create(tmp_path, 1, model)
    with pytest.raises(ValueError, match="must hold no shards before they are made"):
        ClusterBank.create(tmp_path, 2, model)
    monkeypatch.setattr(engine, "PATIENCE", 1)
    with pytest.raises(ValueError, match="is there a node with 99 processors free"):
        ClusterBank.start("large", tmp_path, actor_options={"num_cpus": 99})
    assert "large" not in engine.running()


def test_a_driver_that_is_killed_is_followed_by_one_that_does_the_rest(cluster, notes, driver, backbone, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = {f"page-{number}.txt": some_text(150, seed=100 + number) for number in range(10)}
    for name, text in texts.items():
        (corpus / name).write_text(text)
    model_folder = tmp_path / "model"
    LongMemForCausalLM.from_backbone(backbone, **OPTIONS).save_pretrained(model_folder)
    command = ["memorize", str(corpus), "--bank", "ray://notes", "--model", str(model_folder), "--quiet"]
    process, orders = driver
    orders.send(({"RAY_ADDRESS": cluster.address}, [*command, "--workers", "2"]))
    deadline = time.monotonic() + TIMEOUT
    there: set[str] = set()
    while not there and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
        there = texts.keys() & {each.document_id for each in notes.documents()}
    assert process.is_alive()
    process.kill()
    process.join()
    there = texts.keys() & {each.document_id for each in notes.documents()}
    assert there
    for name in there:
        assert texts[name].startswith(notes.text(name))
    assert main([*command, "--workers", "1"]) == 0
    assert {name: notes.text(name) for name in texts} == texts
    assert all(notes.info(name).num_tokens == len(text) for name, text in texts.items())


def test_unequal_workers_that_encode_again_end_together(moving, workers):
    import ray

    old, new, segments = VersionedModel(0), VersionedModel(1), 80
    moving.ready_for(old)
    names = [name for name in map("d{}".format, range(segments)) if moving.shard_of(name) == 0][: segments // 4]
    parts = [[layer[0] for layer in part] for part in old.encode(torch.zeros(1, 32))]
    for name in names:  # of one shard, which divides them among the workers
        with moving.transaction():
            for start in range(0, 32, 8):
                piece = [[layer[:, start : start + 8] for layer in part] for part in parts]
                put = moving.append if start else moving.add
                put(name, *piece, [1] * 8, segment="new")
    let_pause(workers, 0.1, 0.4, version=1)
    done = moving.reencode(new, workers.actors)
    speeds = ray.get([each.speed.remote() for each in workers.actors])
    assert done.tokens == segments * 8
    ideal = segments / sum(speeds)  # if each had worked at its speed, which the machine's load tells, to the end
    assert speeds[0] > 2 * speeds[1]
    assert done.seconds <= 1.1 * ideal + 0.5, (done.seconds, ideal)  # half a second for the first call of each
    moving.ready_for(new)
    found = moving.search(1, torch.randn(2, 3, 6), 4)
    assert (moving.gather(1, found.rows.flatten(1), found.generation)[1] == 1).all()


@pytest.mark.filterwarnings("ignore:.* chunks of an earlier encoder")
def test_no_read_is_older_than_the_bound_while_a_trainer_goes_on(moving, workers):
    model, ages, longest = VersionedModel(), [], 0
    let_pause(workers, 0, 0)
    feed = Feed(moving, workers, max_waiting=3, patience=TIMEOUT)
    for step in range(200):
        model.version = step
        feed.publish(model)
        if step < 12:
            feed.put(f"document-{step}", list(range(24)))
        longest = max(longest, len(feed.waiting))
        if step == 100:
            kill(workers.actors[0])
        found = moving.search(1, torch.randn(2, 2, 6), 8)
        if found.generation is None or not (found.rows >= 0).any():
            continue
        values = moving.gather(1, found.rows.flatten(1), found.generation)[1]
        ages.append(step - float(values[found.rows.flatten(1) >= 0].min()))
    deadline = time.monotonic() + TIMEOUT
    while [*feed.versions.values()] != [feed.version] * 12 and time.monotonic() < deadline:
        feed.pump(0.5)
    assert longest <= 3
    assert [*feed.versions.values()] == [feed.version] * 12
    assert ages
    assert max(ages) <= BOUND, max(ages)
    assert len({each.document_id for each in moving.documents()}) == len(moving.documents()) == 12


@pytest.mark.filterwarnings("ignore:.* chunks of an earlier encoder")
def test_the_feed_gives_up_when_no_worker_is_left(moving):
    with Encoders(VersionedModel, 1, actor_options={"num_cpus": 999}) as nobody:  # no node has room for it
        feed = Feed(moving, nobody, max_waiting=2, patience=1)
        feed.publish(VersionedModel(999))
        for number in range(4):  # two wait for a worker, and two to be given to one
            feed.put(f"new-{number}", [1, 2, 3])
        with pytest.raises(TimeoutError, match="no encoding worker"):
            feed.put("new-4", [1, 2, 3])


def test_a_folder_that_is_gone_is_said_and_is_read_again_when_it_is_back(moving):
    model, root = VersionedModel(), Path(moving._told[0]["folder"]).parent
    names = [next(name for name in "abcdefgh" if moving.shard_of(name) == number) for number in range(2)]
    for name in names:
        memorize(model, moving, list(range(24)), name)
    folder = root / "shard-0"
    folder.rename(root / "elsewhere")
    kill(actors_of("moving")[0])
    said = "shard 0 of 'moving' could not open its folder"
    with pytest.warns(UserWarning, match=said), pytest.raises(MissingShardError):
        moving.documents()
    with pytest.raises(ValueError, match="1 of the 2 shards of 'moving' have ended"):
        ClusterBank.connect("moving")
    with pytest.warns(UserWarning, match="left out of what is read"):
        some = ClusterBank.connect("moving", on_missing="skip")
    with pytest.warns(UserWarning, match="left out of what is read"):
        listed = some.documents()
    assert [each.document_id for each in listed] == names[1:]
    assert some.missing == (0,)
    stop("moving")
    (root / "elsewhere").rename(folder)
    with ClusterBank.start("moving", root, actor_options={"num_cpus": 0.1}, timeout=TIMEOUT) as bank:
        assert [bank.token_ids(name).tolist() for name in names] == [list(range(24))] * 2
