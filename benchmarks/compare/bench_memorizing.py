"""A training step and reading, of LongMem beside Memorizing Transformers at the same sizes, in processor seconds.

    pip install memorizing-transformers-pytorch einops-exts
    python benchmarks/compare/bench_memorizing.py [--window 512] [--memory 2048] [--rounds 3] [--output FILE.json]

Sizes are those of the backbone, in float32. The same is counted for all. A step is a forward pass of one window that reads the
memory, its loss, the backward pass, an update by AdamW of all that is trained, and storing the window. Reading is the forward
pass and storing. Nobody encodes a window twice: what a forward pass made of it is stored. The peer trains all weights and reads
in one layer, as in its paper. LongMem is measured as packaged, which reads in most layers, and in the paper's form, which reads
in one layer of a side network of half the depth. Memories grow by what is stored. Rounds take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from longmem import MemoryBank
from longmem.model.opening import open_model

PEER = "Memorizing Transformers"
FORMS: dict[str, dict[str, Any]] = {
    "LongMem, as packaged": {},
    "LongMem, the paper's form": {"layer_reduction_factor": 2, "search": "chunk_mean"},
}
Calls = dict[str, Callable[[], Any]]


def trained(model: torch.nn.Module) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Return what of a model is trained, and what updates it."""
    weights = [each for each in model.parameters() if each.requires_grad]
    return weights, torch.optim.AdamW(weights, lr=1e-5)


@contextlib.contextmanager
def memorizing(config: Any, window: int, memory: int, rounds: int, ids: torch.Tensor) -> Iterator[tuple[Calls, int]]:
    """Give a step and a reading of the peer, its memory filled with `memory` tokens, and how many weights it trains."""
    from memorizing_transformers_pytorch import MemorizingTransformer

    depth = config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        model = MemorizingTransformer(
            num_tokens=config.vocab_size,
            dim=config.hidden_size,
            depth=depth,
            heads=config.num_attention_heads,
            dim_head=config.hidden_size // config.num_attention_heads,
            memorizing_layers=(2 * depth // 3,),  # one layer, as in its paper
            max_knn_memories=memory + 2 * (rounds + 1) * window,  # it empties its index where it holds more
            num_retrieved_memories=32,
            knn_memories_directory=folder,
        )
        weights, optimizer = trained(model)
        with model.knn_memories_context(batch_size=1) as memories:
            with torch.no_grad():
                for start in range(0, memory, window):
                    model(ids[:, start : start + window], knn_memories=memories)
            own = ids[:, memory : memory + window]

            def step() -> None:
                loss = model(own, knn_memories=memories, labels=own.roll(-1, 1))
                (loss if isinstance(loss, torch.Tensor) else loss[0]).mean().backward()
                optimizer.step()
                optimizer.zero_grad()

            @torch.no_grad()
            def read() -> None:
                model(own, knn_memories=memories)

            yield {"step": step, "read": read}, sum(each.numel() for each in weights)


def ours(model: Any, window: int, memory: int, ids: torch.Tensor) -> tuple[Calls, int]:
    """Return a step and a reading of LongMem, its memory filled with `memory` tokens, and how many weights it trains."""
    bank = MemoryBank.for_model(model, capacity_tokens=None)
    model.memorize(bank, ids[0, :memory], "text")
    own, name = ids[:, memory : memory + window], iter(range(10**6))
    weights, optimizer = trained(model)

    def store(output: Any) -> None:
        keys, values = ([layer[0].detach() for layer in part] for part in (output.memory_keys, output.memory_values))
        bank.add(f"more {next(name)}", keys, values, own[0], segment="new")

    def step() -> None:
        output = model(own, memory=bank, labels=own, output_memory_keys=True, use_cache=False)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        store(output)

    @torch.no_grad()
    def read() -> None:
        store(model(own, memory=bank, output_memory_keys=True, use_cache=False))

    return {"step": step, "read": read}, sum(each.numel() for each in weights)


def processor_seconds(call: Callable[[], Any]) -> float:
    """Return what a call takes of processors."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--memory", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    models = {name: open_model(arguments.model, dtype="float32", **fields) for name, fields in FORMS.items()}
    config = next(iter(models.values())).config.get_text_config()
    sizes = (arguments.window, arguments.memory)
    ids = torch.randint(0, config.vocab_size, (1, sum(sizes)), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {}
    with memorizing(config, *sizes, arguments.rounds, ids) as peer:
        calls = {PEER: peer, **{name: ours(model, *sizes, ids) for name, model in models.items()}}
        for number in range(arguments.rounds + 1):
            for name, (own, _) in calls.items():
                for kind, call in own.items():
                    taken = processor_seconds(call)
                    if number:  # the first warms up
                        found.setdefault(f"{name}, {kind}", []).append(taken)
    medians = {name: statistics.median(own) for name, own in found.items()}
    weights = {name: count for name, (_, count) in calls.items()}
    print(*(f"{name}: trains {count / 1e6:.1f} million weights" for name, count in weights.items()), sep="\n")
    for name in FORMS:
        for kind in ("step", "read"):
            mine, peers = medians[f"{name}, {kind}"], medians[f"{PEER}, {kind}"]
            print(f"{name}: a {kind} takes {mine:.2f} s, the peer's {peers:.2f} s: {mine / peers:.2f} of it.")
    if arguments.output is not None:
        settings = {"model": arguments.model, "window": arguments.window, "memory": arguments.memory}
        content = {**settings, "weights": weights, "seconds": found}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
