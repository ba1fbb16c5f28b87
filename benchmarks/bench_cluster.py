"""What it costs to read and to fill a bank on a cluster: time, and bytes on the wire against the formula of docs/scaling.md.

    python benchmarks/bench_cluster.py                                   65,536 and 262,144 tokens in 1, 2 and 4 shards
    python benchmarks/bench_cluster.py --tokens 4096 --shards 1 2 --fill 2048 --output results.json
    PYTHONPATH=tests/cluster python benchmarks/bench_cluster.py --without-ray       bytes alone, and processor time

Shards are processes of a Ray cluster: of the one in RAY_ADDRESS or, without one, of three nodes that are started on this
machine, which then share its cores. Keys and values are random, of one memory layer of SmolLM2-135M (3 heads of 64, 9 query
heads); figures are for one reading layer. `cpu` is what all shards and the driver compute, which other programs of a machine
change less than the time that passes.

Workers that fill a bank share the cores as well. With `--pause` each document takes so many seconds more, in which its worker
computes nothing here, as if it had a device of its own: what is left to limit them is the cluster. One and two take turns.

Each figure is in the file of `--output` once it is there, and the same command goes on behind those that the file has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from longmem import LongMemForCausalLM, MemoryBank
from longmem.cluster import ClusterBank, Encoders, engine
from longmem.cluster.wire import raised
from longmem.files import write_file
from longmem.memory import BankShards
from longmem.model.attention import search_and_attend

HEADS, GROUP, DIM, CHUNK, FOUND, LAYER = 3, 3, 64, 4, 8, 16
PIECE, DOCUMENT = 8_192, 1_024  # tokens of a document that is read, and of one that is written
NODE = {"num_cpus": 2, "object_store_memory": 200 * 2**20, "include_log_monitor": False, "no_monitor": True}


@contextlib.contextmanager
def three_nodes() -> Iterator[None]:
    """Start a cluster, unless there is one to join."""
    if "RAY_ADDRESS" in os.environ:
        yield
        return
    os.environ.setdefault("RAY_worker_niceness", "0")  # by itself Ray lets its workers give way to all other programs
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for number in range(3):
            cluster.add_node(**NODE, **({} if number else {"include_dashboard": False}))
        ray.init(address=cluster.address, namespace=engine.NAMESPACE, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def make_shards(root: Path, num_tokens: int, num_shards: int) -> None:
    """Write so many random tokens, evenly into so many shards."""
    generator = torch.Generator().manual_seed(0)
    for number in range(num_shards):
        folder = root / f"shard-{number}"
        with (
            MemoryBank.create(folder, memory_layers=[LAYER], chunk_size=CHUNK, index="flat") as bank,
            bank.transaction(),
        ):
            for start in range(0, num_tokens // num_shards, PIECE):
                count = min(PIECE, num_tokens // num_shards - start)
                keys, values = (torch.randn(HEADS, count, DIM, generator=generator) for _ in range(2))
                bank.add(f"{number}-{start}", [keys], [values])


def bytes_of_read(trips: int, num_shards: int, num_queries: int, num_chunks: int, dim: int, size: int = 2) -> float:
    """Return the bytes of a read, queries included; `size`: of a number of queries and outputs.

    In two trips it is a mean, for chunks that are spread over the shards at random.

    >>> bytes_of_read(1, 4, 9, 8, 64), round(bytes_of_read(2, 4, 9, 8, 64))
    (46080.0, 10842)
    """
    vector = dim * size
    if trips == 1:  # of each chunk score, row, log-sum-exp and output
        return float(num_queries * num_shards * (vector + num_chunks * (4 + 8 + 4 + vector)))
    asked = num_shards * (vector + 4 * num_chunks + 2)  # of each shard scores; then how many are wanted
    holders = num_shards * (1 - (1 - 1 / num_shards) ** num_chunks)  # shards that hold one of the best
    return num_queries * (asked + holders * vector + num_chunks * (8 + 4))


class Clock:
    """Time that passes, and processor time of this process and of others, in milliseconds."""

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self.processes = [psutil.Process(each) for each in (os.getpid(), *pids)]

    def cpu(self) -> float:
        """Return the processor time of all of them since they began."""
        return 1e3 * sum(sum(each.cpu_times()[:2]) for each in self.processes)

    def of(self, call: Callable[[], Any], times: int) -> tuple[float, float]:
        """Return the median time of a call, and its mean processor time; processor time is counted in steps of 10 ms."""
        call()
        taken, before = [], self.cpu()
        for _ in range(times):
            began = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - began))
        return round(statistics.median(taken), 2), round((self.cpu() - before) / times, 2)


def read(num_tokens: int, num_shards: int, times: int) -> dict[str, Any]:
    """Return what reading costs in so many shards, and in one process that has the same folders open."""
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), num_tokens, num_shards)
        name = f"bench-{num_tokens}-{num_shards}"
        bank = ClusterBank.start(name, folder, actor_options={"num_cpus": 0.5}, timeout=600, wire_dtype="float16")
        found: dict[str, Any] = {"tokens": num_tokens, "shards": num_shards, "load": os.getloadavg()[0]}
        try:
            ray = engine.join()
            pids = ray.get([each.__ray_call__.remote(lambda self: os.getpid()) for each in engine.actors_of(name)])
            clock, alone = Clock(pids), Clock()
            found["call_ms"] = clock.of(lambda: bank._ask(0, "look", "__contains__", "nothing"), times)[0]
            local = BankShards(MemoryBank.open(each["folder"], read_only=True) for each in bank._told)
            for what, count in (("token", 1), ("prompt", 1024)):
                queries = torch.randn(HEADS, GROUP * count, DIM, generator=torch.Generator().manual_seed(1))
                repeats = times if count == 1 else max(1, times // 5)

                def in_process(queries: torch.Tensor = queries) -> None:
                    search_and_attend(queries, local, LAYER, FOUND, DIM**-0.5, None)

                found[f"{what}_in_one_process"] = dict(zip(("ms", "cpu"), alone.of(in_process, repeats), strict=True))
                for trips in (1, 2):
                    own = ClusterBank(bank.shards, timeout=600, wire_dtype="float16", trips=trips)
                    attend = functools.partial(own.attend, LAYER, queries, FOUND, scaling=DIM**-0.5)
                    traffic, before = bank.shards.traffic, dataclasses.replace(bank.shards.traffic)
                    figures = dict(zip(("ms", "cpu"), clock.of(attend, repeats), strict=True))
                    crossed = traffic.sent - before.sent + traffic.received - before.received
                    figures["bytes"] = crossed // (repeats + 1)  # all calls send as much
                    figures["predicted"] = round(bytes_of_read(trips, num_shards, HEADS * GROUP * count, FOUND, DIM))
                    figures["ratio"] = round(figures["bytes"] / figures["predicted"], 4)
                    found[f"{what}_in_{trips}_trips"] = figures
        finally:
            engine.stop(name)
    return found


def read_here(num_tokens: int, num_shards: int) -> dict[str, Any]:
    """Return what one read sends, and takes of this process, where shards are here and their answers go through bytes."""
    from local_shards import LocalShards  # of tests/cluster

    torch.set_num_threads(1)
    found: dict[str, Any] = {"tokens": num_tokens, "shards": num_shards}
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), num_tokens, num_shards)
        shards = LocalShards([Path(folder) / f"shard-{number}" for number in range(num_shards)])
        whole = BankShards(each.bank for each in shards.shards)
        for what, count in (("token", 1), ("64_tokens", 64)):
            queries = torch.randn(HEADS, GROUP * count, DIM, generator=torch.Generator().manual_seed(1))
            plain = search_and_attend(queries, whole, LAYER, FOUND, DIM**-0.5, None)
            began = time.process_time()
            search_and_attend(queries, whole, LAYER, FOUND, DIM**-0.5, None)
            found[f"{what}_in_one_process"] = {"cpu": round(1e3 * (time.process_time() - began), 1)}
            for trips in (1, 2):
                bank, before = (
                    ClusterBank(shards, wire_dtype="float16", trips=trips),
                    dataclasses.replace(shards.traffic),
                )
                began = time.process_time()
                read = bank.attend(LAYER, queries, FOUND, scaling=DIM**-0.5)
                cpu = round(1e3 * (time.process_time() - began), 1)
                sent = shards.traffic.sent - before.sent + shards.traffic.received - before.received
                ratio = sent / bytes_of_read(trips, num_shards, HEADS * GROUP * count, FOUND, DIM)
                assert read is not None
                same = round(float((read.found.rows == plain.found.rows).float().mean()), 4)
                found[f"{what}_in_{trips}_trips"] = {
                    "bytes": sent,
                    "ratio": round(ratio, 4),
                    "cpu": cpu,
                    "same_rows": same,
                }
        shards.close()
    return found


def make_model(folder: str) -> LongMemForCausalLM:
    """Return the model of an encoding worker, which computes with one thread."""
    torch.set_num_threads(1)
    return LongMemForCausalLM.from_backbone(folder, segment_length=256).eval()


def memorize(bank: ClusterBank, model: LongMemForCausalLM, task: tuple[str, list[int], float]) -> int:
    """Write a document of ids, after a pause; return its tokens."""
    name, ids, pause = task
    time.sleep(pause)
    return int(model.memorize(bank, ids, name))


def fill(num_tokens: int, pause: float, rounds: int) -> dict[str, Any]:
    """Return the throughput of one encoding worker and of two with a small random backbone, which take turns in each round.

    So what else a machine does slows both, and `ratio`, of the two of one round, is of their own.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4}
    told: dict[str, Any] = {"to_fill": num_tokens, "pause": pause, "load": os.getloadavg()[0]}
    speeds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1024)).save_pretrained(f"{folder}/backbone")
        make = functools.partial(make_model, f"{folder}/backbone")
        ClusterBank.create(f"{folder}/bank", 2, make())
        bank = ClusterBank.start("bench-fill", f"{folder}/bank", actor_options={"num_cpus": 0.1}, timeout=600)
        try:
            with Encoders(make, 2, actor_options={"num_cpus": 0.5}) as workers:
                ray, both = engine.join(), workers.actors
                actors = [*both, *engine.actors_of("bench-fill")]
                clock = Clock(ray.get([each.__ray_call__.remote(lambda self: os.getpid()) for each in actors]))
                for number in range(rounds + 1):  # the first to warm up
                    for count, kept in speeds.items():
                        workers.actors = both[:count]
                        starts = range(0, num_tokens if number else 4 * DOCUMENT, DOCUMENT)
                        texts = [(f"{number}-{count}-{start}", [2 + start % 1000] * DOCUMENT) for start in starts]
                        tasks = [(*text, pause if number else 0.5) for text in texts]
                        began, before = time.perf_counter(), clock.cpu()
                        answers = workers.run(tasks, lambda actor, task: actor.work.remote(memorize, bank, task))
                        done = sum(raised(answer) for _, answer in answers)
                        seconds, cpu = time.perf_counter() - began, (clock.cpu() - before) / 1e3
                        figures = {"second": round(done / seconds, 1), "cpu_second": round(done / cpu, 1)}
                        kept.extend([figures] if number else [])
                workers.actors = both
        finally:
            engine.stop("bench-fill")
    for what in ("second", "cpu_second"):
        each = [[figures[what] for figures in kept] for kept in speeds.values()]
        told |= {f"tokens_per_{what}_of_{count}": rates for count, rates in zip(speeds, each, strict=True)}
        told[f"ratio_per_{what}"] = round(statistics.median(two / one for one, two in zip(*each, strict=True)), 3)
    return told


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65_536, 262_144], help="sizes of the bank")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--times", type=int, default=20, help="calls of which the median is taken")
    parser.add_argument("--fill", type=int, default=16_384, help="tokens to fill in, 0 for none")
    parser.add_argument("--rounds", type=int, default=3, help="in which one worker and then two fill in as much")
    parser.add_argument(
        "--pause", type=float, nargs="+", default=[0.0, 1.0], help="seconds that a document takes elsewhere"
    )
    parser.add_argument("--without-ray", action="store_true", help="bytes alone, with PYTHONPATH=tests/cluster")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    results: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "reading": [], "filling": []}
    if given.output is not None and given.output.exists():
        results = json.loads(given.output.read_text(encoding="utf-8"))
    reads = itertools.product(given.tokens, given.shards)
    fills = given.pause if given.fill and not given.without_ray else ()
    asked = [("reading", dict(zip(("tokens", "shards"), each, strict=True))) for each in reads]
    asked += [("filling", {"to_fill": given.fill, "pause": pause}) for pause in fills]
    asked = [(kind, about | {"with_ray": not given.without_ray}) for kind, about in asked]
    left = [(kind, about) for kind, about in asked if not any(about.items() <= each.items() for each in results[kind])]
    with contextlib.nullcontext() if given.without_ray or not left else three_nodes():
        for kind, about in left:
            if kind == "filling":
                figures = fill(given.fill, about["pause"], given.rounds)
            elif given.without_ray:
                figures = read_here(about["tokens"], about["shards"])
            else:
                figures = read(about["tokens"], about["shards"], given.times)
            results[kind].append(about | figures)
            print(json.dumps(results[kind][-1]), flush=True)
            if given.output is not None:
                write_file(given.output, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
