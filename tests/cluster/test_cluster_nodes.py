"""Three nodes of a real cluster: shards, workers, drivers and nodes die, and nothing committed is lost or read twice."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cluster_models import OPTIONS, SlowWorker, VersionedModel, memorize_once
from tiny_models import save_tiny_backbone, some_text

from longmem import LongMemForCausalLM, MemoryBank
from longmem.cluster import ClusterBank, Encoders, Feed, engine
from longmem.cluster.engine import NAMESPACE, actors_of, stop
from longmem.errors import MissingShardError
from longmem.memory import BankShards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
BOUND = 4
TIMEOUT = 400  # seconds, on a machine that has other work; no test waits so long for what is to fail
NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_log_monitor": False, "no_monitor": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    import ray
    from ray.cluster_utils import Cluster

    made, patient = Cluster(), pytest.MonkeyPatch()
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    patient.setenv("PYTHONPATH", paths, prepend=os.pathsep)  # workers have what pytest has given this process
    wait_for_nodes(patient)
    patient.setattr(engine, "PATIENCE", TIMEOUT)
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
def notes(
    cluster: object, model: LongMemForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClusterBank]:
    root = tmp_path_factory.mktemp("notes")
    ClusterBank.create(root, 3, model)
    bank = ClusterBank.start("notes", root, actor_options={"num_cpus": 0.1}, timeout=TIMEOUT)
    for number in range(6):
        model.memorize(bank, some_text(14, seed=number), f"document-{number}")
    yield bank
    stop("notes")


@pytest.fixture(scope="module")
def moving(cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterBank]:
    """A bank whose encoder is `VersionedModel`, which needs no transformers: its workers start in half the time."""
    root = tmp_path_factory.mktemp("moving")
    policy = f"bounded:max_lag={BOUND},on_violation=mask"
    ClusterBank.create(root, 2, VersionedModel(), storage_dtype="float32", refresh=policy)
    yield ClusterBank.start("moving", root, actor_options={"num_cpus": 0.1}, timeout=TIMEOUT)
    stop("moving")


def opened(bank: ClusterBank) -> BankShards:
    return BankShards(MemoryBank.open(each["folder"], read_only=True) for each in bank._told)


def inside(actor: object, look: Callable[[object], object]) -> object:
    """Return what a function finds in the process of an actor."""
    import ray

    return ray.get(actor.__ray_call__.remote(look))


def kill(actor: object) -> None:
    """Kill the process of an actor as the system would."""
    os.kill(inside(actor, lambda self: os.getpid()), signal.SIGKILL)


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
    cluster, notes, moving, model, prompt
):
    import ray

    draw = torch.Generator().manual_seed(3)
    texts = {f"filled-{number}": torch.randint(0, 100, (24,), generator=draw).tolist() for number in range(16)}
    with torch.no_grad():
        expected = model(prompt, memory=notes).logits
    done = []
    with Encoders(VersionedModel, 2, actor_options={"num_cpus": 0.1}) as encoders:
        ray.get([each.ready.remote() for each in encoders.actors])
        ask = lambda actor, task: actor.work.remote(memorize_once, moving, task)  # noqa: E731
        for (name, _), answer in encoders.run(texts.items(), ask):
            assert answer is None, answer
            done.append(name)
            if len(done) == 2:
                kill(encoders.actors[0])
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
    for name in texts:
        moving.delete(name)


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


def test_a_folder_that_is_gone_is_said_and_is_read_again_when_it_is_back(cluster, model, tmp_path):
    ClusterBank.create(tmp_path, 2, model)
    bank = ClusterBank.start("moved", tmp_path, actor_options={"num_cpus": 0.1}, timeout=TIMEOUT)
    model.memorize(bank, "the dog sat", "kept")
    number = bank.shard_of("kept")
    other = next(f"new-{place}" for place in range(99) if bank.shard_of(f"new-{place}") != number)
    model.memorize(bank, "the cat sat", other)
    folder = tmp_path / f"shard-{number}"
    folder.rename(tmp_path / "elsewhere")
    kill(actors_of("moved")[number])
    said = f"shard {number} of 'moved' could not open its folder"
    with pytest.warns(UserWarning, match=said), pytest.raises(MissingShardError):
        bank.documents()
    with pytest.raises(ValueError, match="1 of the 2 shards of 'moved' have ended"):
        ClusterBank.connect("moved")
    with pytest.warns(UserWarning, match="left out of what is read"):
        some = ClusterBank.connect("moved", on_missing="skip")
    with pytest.warns(UserWarning, match="left out of what is read"):
        listed = some.documents()
    assert [each.document_id for each in listed] == [other]
    assert some.missing == (number,)
    stop("moved")
    (tmp_path / "elsewhere").rename(folder)
    with ClusterBank.start("moved", tmp_path, actor_options={"num_cpus": 0.1}, timeout=TIMEOUT) as bank:
        assert bank.text("kept") == "the dog sat"
    stop("moved")


def test_a_driver_that_is_killed_is_followed_by_one_that_does_the_rest(cluster, notes, backbone, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = {f"page-{number}.txt": some_text(150, seed=100 + number) for number in range(10)}
    for name, text in texts.items():
        (corpus / name).write_text(text)
    model_folder = tmp_path / "model"
    LongMemForCausalLM.from_backbone(backbone, **OPTIONS).save_pretrained(model_folder)
    command = [sys.executable, "-m", "longmem.cli.main", "memorize", str(corpus), "--bank", "ray://notes"]
    command += ["--model", str(model_folder), "--workers", "2", "--quiet"]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + TIMEOUT
    while not any(name in notes for name in texts) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    driver.kill()
    driver.communicate()
    there = {name for name in texts if name in notes}
    assert there
    for name in there:
        assert texts[name].startswith(notes.text(name))
    command[command.index("--workers") + 1] = "1"
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert again.returncode == 0, again.stderr
    assert {name: notes.text(name) for name in texts} == texts
    assert all(notes.info(name).num_tokens == len(text) for name, text in texts.items())


def test_unequal_workers_that_encode_again_end_together(cluster, tmp_path):
    import ray

    old, new, segments = VersionedModel(0), VersionedModel(1), 80
    ClusterBank.create(tmp_path, 1, old, storage_dtype="float32", refresh="bounded:max_lag=0")
    bank = ClusterBank.start("stale", tmp_path, actor_options={"num_cpus": 0.1}, timeout=TIMEOUT)
    try:
        bank.ready_for(old)
        for number in range(segments // 4):
            old_keys = old.encode(torch.zeros(1, 32))
            parts = [[layer[0] for layer in part] for part in old_keys]
            with bank.transaction():
                for start in range(0, 32, 8):
                    piece = [[layer[:, start : start + 8] for layer in part] for part in parts]
                    ids = [1] * 8
                    if start:
                        bank.append(f"d{number}", *piece, ids, segment="new")
                    else:
                        bank.add(f"d{number}", *piece, ids, segment="new")
        with Encoders(
            functools.partial(VersionedModel, 1), 2, kind=SlowWorker, actor_options={"num_cpus": 0.1}
        ) as pool:
            ray.get([each.encode.remote(new.encoder_stamp().to_json(), torch.zeros(1, 8)) for each in pool.actors])
            ray.get([each.slow_down.remote(pause) for each, pause in zip(pool.actors, (0.1, 0.4), strict=True)])
            done = bank.reencode(new, pool.actors)
            speeds = ray.get([each.speed.remote() for each in pool.actors])
        assert done.tokens == segments * 8
        ideal = segments / sum(speeds)  # if each had worked at its speed, which the machine's load tells, to the end
        assert speeds[0] > 2 * speeds[1]
        assert done.seconds <= 1.1 * ideal + 0.5, (done.seconds, ideal)  # half a second for the first call of each
        bank.ready_for(new)
        found = bank.search(1, torch.randn(2, 3, 6), 4)
        assert (bank.gather(1, found.rows.flatten(1), found.generation)[1] == 1).all()
    finally:
        stop("stale")


@pytest.mark.filterwarnings("ignore:.* chunks of an earlier encoder")
def test_no_read_is_older_than_the_bound_while_a_trainer_goes_on(moving):
    model, ages, longest = VersionedModel(), [], 0
    with Encoders(VersionedModel, 2, actor_options={"num_cpus": 0.1}) as workers:
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
        while len(feed.versions) < 12 and time.monotonic() < deadline:
            feed.pump(0.5)
    assert longest <= 3
    assert len(feed.versions) == 12
    assert ages
    assert max(ages) <= BOUND, max(ages)
    assert len({each.document_id for each in moving.documents()}) == len(moving.documents()) == 12


@pytest.mark.filterwarnings("ignore:.* chunks of an earlier encoder")
def test_the_feed_gives_up_when_no_worker_is_left(moving):
    with Encoders(VersionedModel, 1, actor_options={"num_cpus": 999}) as workers:  # no node has room for it
        feed = Feed(moving, workers, max_waiting=2, patience=1)
        feed.publish(VersionedModel(999))
        for number in range(4):  # two wait for a worker, and two to be given to one
            feed.put(f"new-{number}", [1, 2, 3])
        with pytest.raises(TimeoutError, match="no encoding worker"):
            feed.put("new-4", [1, 2, 3])
