"""What it costs to read and to fill a bank on a cluster: time, and bytes on the wire against the formula of docs/scaling.md.

    python benchmarks/bench_cluster.py                                   262,144 tokens in 1, 2 and 4 shards
    python benchmarks/bench_cluster.py --tokens 4096 --shards 1 2 --fill 2048 --output results.json

Shards are processes of a Ray cluster: of the one in RAY_ADDRESS or, without one, of three nodes that are started on this
machine, which then share its cores. Keys and values are random, of one memory layer of SmolLM2-135M (3 heads of 64, 9 query
heads); figures are for one reading layer.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from longmem import LongMemForCausalLM, MemoryBank
from longmem.cluster import ClusterBank, Encoders, engine
from longmem.cluster.wire import raised
from longmem.memory import BankShards

HEADS, GROUP, DIM, CHUNK, FOUND, LAYER = 3, 3, 64, 4, 8, 16
PIECE = 8_192  # tokens of a document
NODE = {"num_cpus": 2, "object_store_memory": 200 * 2**20, "include_log_monitor": False, "no_monitor": True}


@contextlib.contextmanager
def three_nodes() -> Iterator[None]:
    """Start a cluster, unless there is one to join."""
    if "RAY_ADDRESS" in os.environ:
        yield
        return
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


def predicted_bytes(num_queries: int, num_shards: int) -> int:
    """Return queries out and C back: for each chunk a score, a row, an output and a log-sum-exp, in float16 and float32."""
    return num_queries * num_shards * (DIM * 2 + FOUND * (DIM * 2 + 16))


def milliseconds(call: Callable[[], Any], times: int) -> float:
    """Return the median time of a call."""
    call()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken)


def read(num_tokens: int, num_shards: int, times: int) -> dict[str, Any]:
    """Return what reading costs in so many shards, and in one process that has the same folders open."""
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), num_tokens, num_shards)
        name = f"bench-{num_tokens}-{num_shards}"
        bank = ClusterBank.start(name, folder, actor_options={"num_cpus": 0.5}, timeout=600, wire_dtype="float16")
        found: dict[str, Any] = {"tokens": num_tokens, "shards": num_shards}
        try:
            found["call_ms"] = milliseconds(lambda: bank._ask(0, "look", "__contains__", "nothing"), times)
            local = BankShards(MemoryBank.open(each["folder"], read_only=True) for each in bank._told)
            for what, count in (("token", 1), ("prompt_of_1024", 1024)):
                queries = torch.randn(HEADS, GROUP * count, DIM, generator=torch.Generator().manual_seed(1))
                attend = functools.partial(bank.attend, LAYER, queries, FOUND, scaling=DIM**-0.5, dtype=torch.float32)
                repeats = times if count == 1 else max(1, times // 5)
                found[f"{what}_ms"] = milliseconds(attend, repeats)
                traffic = bank.shards.traffic
                before = traffic.sent + traffic.received
                attend()
                found[f"{what}_bytes"] = traffic.sent + traffic.received - before
                found[f"{what}_bytes_predicted"] = predicted_bytes(HEADS * GROUP * count, num_shards)

                def in_process(queries: torch.Tensor = queries) -> None:
                    there = local.search(LAYER, queries, FOUND, scaling=DIM**-0.5)
                    for rows in there.rows.split(256, dim=1):
                        local.gather(LAYER, rows.flatten(1), there.generation)

                found[f"{what}_in_one_process_ms"] = milliseconds(in_process, repeats)
        finally:
            engine.stop(name)
    return found


def make_model(folder: str) -> LongMemForCausalLM:
    """Return the model of an encoding worker, which computes with one thread."""
    torch.set_num_threads(1)
    return LongMemForCausalLM.from_backbone(folder, segment_length=256).eval()


def memorize(bank: ClusterBank, model: LongMemForCausalLM, task: tuple[str, list[int]]) -> int:
    """Write a document of ids; return its tokens."""
    name, ids = task
    return int(model.memorize(bank, ids, name))


def fill(num_tokens: int, num_workers: int) -> dict[str, Any]:
    """Return the throughput of encoding workers with a small random backbone, from the second task of each on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1024)).save_pretrained(f"{folder}/backbone")
        model = make_model(f"{folder}/backbone")
        ClusterBank.create(f"{folder}/bank", 2, model)
        name = f"bench-fill-{num_workers}"
        bank = ClusterBank.start(name, f"{folder}/bank", actor_options={"num_cpus": 0.1}, timeout=600)
        try:
            with Encoders(
                functools.partial(make_model, f"{folder}/backbone"), num_workers, actor_options={"num_cpus": 0.5}
            ) as workers:
                warm = [(f"warm-{number}", [1] * 256) for number in range(4 * num_workers)]
                tasks = [(f"document-{start}", [2 + start % 1000] * 1024) for start in range(0, num_tokens, 1024)]
                for part in (warm, tasks):
                    began = time.perf_counter()
                    answers = workers.run(part, lambda actor, task: actor.work.remote(memorize, bank, task))
                    done = sum(raised(answer) for _, answer in answers)
                    seconds = time.perf_counter() - began
        finally:
            engine.stop(name)
    return {"workers": num_workers, "tokens": done, "tokens_per_second": round(done / seconds, 1)}


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[262_144], help="sizes of the bank")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--times", type=int, default=20, help="calls of which the median is taken")
    parser.add_argument("--fill", type=int, default=32_768, help="tokens to fill in, 0 for none")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    results: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "reading": [], "filling": []}
    with three_nodes():
        for num_tokens in given.tokens:
            for num_shards in given.shards:
                results["reading"].append(read(num_tokens, num_shards, given.times))
                print(json.dumps(results["reading"][-1]), flush=True)
        for num_workers in (1, 2) if given.fill else ():
            results["filling"].append(fill(given.fill, num_workers))
            print(json.dumps(results["filling"][-1]), flush=True)
    if given.output is not None:
        given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
