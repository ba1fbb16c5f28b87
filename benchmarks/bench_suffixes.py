"""What scoring six suffixes after a context costs, against plain forwards of the same tokens.

    python benchmarks/bench_suffixes.py [--model smollm2-135m] [--contexts 896 8064] [--rounds 5] [--output FILE.json]

For the backbone, and for memory on, which reads the tokens before the context. The plain forwards compute the logits that
are needed and no others. "apart" is one forward of the context and one of the suffixes, which see nothing of it: less
than scoring, whose suffixes attend to all of the context. "in a row" is one forward of the context and all suffixes
after each other: as many tokens as are scored. All are timed in turn in the same round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longmem.cli.common import add_device, use_device
from longmem.data.sample_texts import python_manual
from longmem.evaluation.systems import Question, System, make_systems
from longmem.model.opening import open_model
from longmem.settings.environment import chosen_device, environment

NAMES = ("backbone", "on")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def apart(forward: Callable[..., Any], context: torch.Tensor, suffixes: torch.Tensor) -> None:
    forward(context, use_cache=False, logits_to_keep=1)
    forward(suffixes, use_cache=False)


def in_a_row(forward: Callable[..., Any], context: torch.Tensor, suffixes: torch.Tensor) -> None:
    row = torch.cat([context, suffixes.view(1, -1)], dim=1)
    forward(row, use_cache=False, logits_to_keep=suffixes.numel() + 1)


def summary(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--contexts", type=int, nargs="+", default=[896, 8064])
    parser.add_argument("--suffixes", type=int, default=6)
    parser.add_argument("--suffix-tokens", type=int, default=128)
    parser.add_argument("--stored", type=int, default=8192, help="tokens in memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    add_device(parser)
    given = parser.parse_args()
    use_device(given.device)
    model = open_model(given.model, dtype=given.dtype).to(chosen_device())
    ids: list[int] = model.tokenizer(python_manual(), verbose=False)["input_ids"]
    asked = given.suffixes * given.suffix_tokens
    needed = given.stored + max(given.contexts) + asked
    ids = (ids * -(-needed // len(ids)))[:needed]
    suffixes = torch.tensor(ids[-asked:], device=model.input_device).view(given.suffixes, -1)
    question = Question([], suffixes.tolist())
    times: dict[str, list[tuple[float, float, float]]] = {}
    for size in given.contexts:
        stream = ids[: given.stored + size]
        window = size + given.suffix_tokens
        made: list[System] = make_systems(NAMES, model, window=window, local_tokens=size, batch_size=given.suffixes)
        context = torch.tensor([stream[-size:]], device=model.input_device)
        for system in made:
            system.read([stream])
            forward, own = system.context([], given.suffix_tokens, [question])  # memory is encoded here, once
            assert own == stream[-size:]
            for round_number in track(range(given.rounds + 1), f"{system.name}, {size:,} tokens of context"):
                calls = [
                    lambda s=system: s.score([question]),
                    lambda f=forward, c=context: apart(f, c, suffixes),
                    lambda f=forward, c=context: in_a_row(f, c, suffixes),
                ]
                taken = [seconds(call) for call in calls]
                if round_number:  # the first round warms up
                    times.setdefault(f"{system.name}, {size:,} tokens", []).append(tuple(taken))
    title = f"{given.model}: {given.suffixes} suffixes of {given.suffix_tokens} tokens, {given.rounds} rounds"
    table = Table("after a context of", "scored / apart", "scored / in a row", "s scored", title=title)
    result = {}
    for name, own in times.items():
        ratios = {"apart": [a / b for a, b, _ in own], "in a row": [a / c for a, _, c in own]}
        result[name] = {"seconds": own, **{each: summary(values) for each, values in ratios.items()}}
        figures = ["{median:.2f} ({min:.2f} to {max:.2f})".format(**result[name][each]) for each in ratios]
        table.add_row(name, *figures, f"{statistics.median(a for a, _, _ in own):.2f}")
    Console().print(table)
    setup = {**vars(given), "output": None, "dtype": str(model.backbone.dtype), **environment()}
    if given.output:
        given.output.write_text(json.dumps({"setup": setup, "result": result}, indent=2))


if __name__ == "__main__":
    main()
