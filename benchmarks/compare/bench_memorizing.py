"""A training step and reading, of LongMem beside Memorizing Transformers at the same sizes, in processor seconds.

    pip install memorizing-transformers-pytorch einops-exts
    python benchmarks/compare/bench_memorizing.py [--window 512] [--memory 2048] [--rounds 3] [--output FILE.json]

The peer trains all of its weights, LongMem its side network; both read what they stored of the text before. Reading is a
forward pass of one window over a full memory, and then storing it, without gradients. Sizes are those of the backbone. Rounds
take turns.
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


@contextlib.contextmanager
def memorizing(config: Any, window: int, memory: int, ids: torch.Tensor) -> Iterator[dict[str, Callable[[], Any]]]:
    """Give a step and a reading of the peer, its memory filled with `memory` tokens."""
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
            max_knn_memories=memory,
            num_retrieved_memories=32,
            knn_memories_directory=folder,
        )
        with model.knn_memories_context(batch_size=1) as memories:
            with torch.no_grad():
                for start in range(0, memory, window):
                    model(ids[:, start : start + window], knn_memories=memories)
            own = ids[:, memory : memory + window]

            def step() -> None:
                loss = model(own, knn_memories=memories, labels=own.roll(-1, 1))
                (loss if isinstance(loss, torch.Tensor) else loss[0]).mean().backward()
                model.zero_grad()

            @torch.no_grad()
            def read() -> None:
                model(own, knn_memories=memories)

            yield {"step": step, "read": read}


def ours(model: Any, window: int, memory: int, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return a step and a reading of LongMem, its memory filled with `memory` tokens."""
    bank = MemoryBank.for_model(model, capacity_tokens=memory)
    model.memorize(bank, ids[0, :memory], "text")
    own, name = ids[:, memory : memory + window], iter(range(10**6))

    def store() -> None:
        model.memorize(bank, own[0], f"more {next(name)}")

    def step() -> None:
        model(own, memory=bank, labels=own).loss.backward()
        model.zero_grad()
        store()

    @torch.no_grad()
    def read() -> None:
        model(own, memory=bank, use_cache=False)
        store()

    return {"step": step, "read": read}


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
    model = open_model(arguments.model, dtype="float32")
    config, sizes = model.config.get_text_config(), (arguments.window, arguments.memory)
    ids = torch.randint(0, config.vocab_size, (1, sum(sizes)), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {}
    with memorizing(config, *sizes, ids) as peer:
        calls = {"Memorizing Transformers": peer, "LongMem": ours(model, *sizes, ids)}
        for number in range(arguments.rounds + 1):
            for name, own in calls.items():
                for kind, call in own.items():
                    taken = processor_seconds(call)
                    if number:  # the first warms up
                        found.setdefault(f"{name}, {kind}", []).append(taken)
    medians = {name: statistics.median(own) for name, own in found.items()}
    print(*(f"{name}: {taken:.2f} s" for name, taken in medians.items()), sep="\n")
    for kind in ("step", "read"):
        ratio = medians[f"LongMem, {kind}"] / medians[f"Memorizing Transformers, {kind}"]
        print(f"LongMem takes {ratio:.2f} of the peer's processor time for a {kind}.")
    if arguments.output is not None:
        settings = {"model": arguments.model, "window": arguments.window, "memory": arguments.memory, "seconds": found}
        arguments.output.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
