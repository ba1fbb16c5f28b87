"""What memory does and costs on a GPU, in one run of under eight minutes: is it what a CPU computes, and what does it cost.

    python benchmarks/bench_gpu.py [--device auto] [--output gpu-results]
    python benchmarks/bench_gpu.py --small --device cpu                               # tiny sizes, seconds
    python benchmarks/bench_gpu.py --device cpu --models SmolLM2-135M --only decoding

Models have the shapes of SmolLM2-135M and of Llamas with 1 and 8 billion weights, and random weights. What is stored is random
as well, because neither changes a time. Memory is read as the packaged network of SmolLM2-135M reads it: the same settings, in
as many layers, at the same heights. What is compared takes turns in the same rounds; figures are medians of seconds, ratios
are of these. What does not fit the device, or the minutes, is named and left out. Writes results.json and table.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_cost import flops, random_cache
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from longmem import LongMemConfig, LongMemForCausalLM, MemoryBank
from longmem.backbone.cache_names import as_keyword, cache_of
from longmem.cli.common import add_device, use_device
from longmem.memory.index import make_index
from longmem.memory.rows.storage import Chunks, ChunkStore
from longmem.model.names import TRAINED_FOLDER
from longmem.settings.environment import chosen_device, environment

SHAPES = {
    "SmolLM2-135M": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9),
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32),
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "tiny": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4),
}
KV_HEADS, VOCABULARY = {"SmolLM2-135M": 3, "tiny": 2}, {"SmolLM2-135M": 49_152, "tiny": 97}
READING = ("chunk_size", "search", "choice_per", "num_retrieved_tokens", "memory_null_init", "memory_distance", "lora")
SECTIONS = ("correctness", "memorizing", "reading", "decoding", "training", "search")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    models: tuple[str, ...] = ("SmolLM2-135M", "1B", "8B")
    segment: int = 1024
    stored: tuple[int, ...] = (65_536, 1_048_576)
    window: int = 65_536  # of the backbone that has in its window what the other has in memory
    batch: int = 4
    rounds: int = 5
    steps: int = 16  # decoded tokens of a round
    keys: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)


SMALL = Sizes(("tiny",), 64, (256, 1024), 256, 2, 2, 2, (1_000, 10_000))


class Run:
    """The measurements so far, and the time that is left for more."""

    def __init__(self, sizes: Sizes, device: torch.device, seconds: float, console: Console) -> None:
        self.sizes, self.device, self.console = sizes, device, console
        self.ends = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    def note(self, section: str, what: str, **figures: float | None) -> None:
        """Keep figures and print them."""
        figures = {name: value for name, value in figures.items() if value is not None}
        self.rows.append({"section": section, "what": what, **figures})
        self.console.print(f"{section}: {what}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))

    def tries(self, what: str, measure: Callable[[], None]) -> None:
        """Measure, unless the time is over; what has no room on the device is named."""
        try:
            if time.monotonic() > self.ends:
                raise TimeoutError("no time left")
            measure()
        except (TimeoutError, torch.OutOfMemoryError) as error:
            self.left_out.append(f"{what}: {str(error).partition('.')[0]}")
            self.console.print(f"left out: {self.left_out[-1]}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Return the median seconds of each call; they take turns, after one round to warm up."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(self.sizes.rounds + 1):
            for name, call in calls.items():
                self.wait()
                start = time.perf_counter()
                call()
                self.wait()
                times[name] += [time.perf_counter() - start] * (number > 0)
        return {name: statistics.median(each) for name, each in times.items()}

    def wait(self) -> None:
        """Wait until the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def packaged_settings(num_layers: int, num_kv_heads: int) -> dict[str, Any]:
    """Return how the packaged network reads, with its memory layers where they are in a backbone of so many layers."""
    packaged = LongMemConfig.from_pretrained(TRAINED_FOLDER / "smollm2-135m")
    heads: dict[int, set[int]] = {}
    for layer, own in zip(packaged.memory_layers, packaged.memory_heads, strict=True):
        place = round(layer * num_layers / packaged.get_text_config().num_hidden_layers)
        heads.setdefault(place, set()).update(head % num_kv_heads for head in own)
    layers = sorted(heads)
    placed = {"memory_layers": layers, "memory_heads": [sorted(heads[layer]) for layer in layers]}
    return placed | {name: getattr(packaged, name) for name in READING}


def random_model(name: str, device: torch.device, segment: int) -> LongMemForCausalLM:
    """Return a model of this shape with random weights: bfloat16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    tokens = dict(vocab_size=VOCABULARY.get(name, 128_256), bos_token_id=None, eos_token_id=None)
    config = LlamaConfig(
        **SHAPES[name], **tokens, num_key_value_heads=KV_HEADS.get(name, 8), max_position_embeddings=131_072
    )
    config._attn_implementation = "sdpa"
    with device:
        backbone = LlamaForCausalLM(config).to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    return with_memory(backbone, segment)


def with_memory(backbone: Any, segment: int) -> LongMemForCausalLM:
    """Return a model that reads as the packaged one does, with this backbone."""
    settings = packaged_settings(backbone.config.num_hidden_layers, backbone.config.num_key_value_heads)
    return LongMemForCausalLM.from_backbone(backbone, segment_length=segment, **settings).eval()


def random_ids(model: LongMemForCausalLM, *shape: int) -> Tensor:
    return torch.randint(0, model.config.get_text_config().vocab_size, shape, device=model.device)


def random_bank(model: LongMemForCausalLM, tokens: int, **options: Any) -> MemoryBank:
    """Return a bank with so many random tokens, on the model's device."""
    bank = MemoryBank.for_model(model, capacity_tokens=None, **options)
    text = model.config.get_text_config()
    width = text.hidden_size // text.num_attention_heads
    for number, count in enumerate(torch.arange(tokens).split(65_536)):
        states = [
            torch.randn(len(heads), len(count), width, device=model.device, dtype=model.backbone.dtype)
            for heads in model.config.memory_heads
        ]
        bank.add(str(number), states, states)
    return bank


def correctness(run: Run, name: str) -> None:
    """Compare a small model in float32, its gradients and its memory, on the device and on the CPU."""
    found = []
    for device in (torch.device("cpu"), run.device):
        model = random_model("tiny", torch.device("cpu"), 64).to(device).float().train()
        ids = torch.randint(0, 97, (2, 48), generator=torch.Generator().manual_seed(1)).to(device)
        text = torch.randint(0, 97, (512,), generator=torch.Generator().manual_seed(2))
        bank = MemoryBank.for_model(model, index="flat")
        model.memorize(bank, text, "text")
        output = model(ids, memory=bank, labels=ids, output_memory_reads=True)
        output.loss.backward()
        gradients = [each.grad.flatten() for each in model.side_network.parameters() if each.grad is not None]
        bank.to(device, device_budget=bank.device_bytes()[0])  # keys and values come from the host
        again = model(ids, memory=bank).logits
        rows = torch.stack([read.rows for read in output.memory_reads])
        found.append([each.detach().cpu() for each in (output.logits, again, torch.cat(gradients), rows)])
    differences = [float((one - other).abs().max()) for one, other in zip(*found, strict=True)][:3]
    same = float((found[0][3] == found[1][3]).float().mean())
    if max(differences) > 1e-3 or same < 0.999:
        raise AssertionError(f"{run.device} and CPU differ: {differences}, {same:.4f} of the rows are the same")
    figures = zip(("logits", "logits_from_the_host", "gradients"), differences, strict=True)
    run.note("correctness", "largest differences from the CPU", **dict(figures), same_rows=same)


@torch.no_grad()
def memorizing(run: Run, name: str) -> None:
    """Memorize, against the backbone's forward pass with logits, in tokens per second."""
    sizes = run.sizes
    model = random_model(name, run.device, sizes.segment)
    ids = random_ids(model, sizes.batch, sizes.segment)
    allowed = flops(lambda: model.backbone(ids)) / flops(lambda: model.encode(ids))

    def write() -> None:
        bank = MemoryBank.for_model(model, capacity_tokens=None)
        model.memorize(bank, ids.flatten(), "text", batch_size=sizes.batch)

    calls = {"write": write, "encode": lambda: model.encode(ids), "forward": lambda: model.backbone(ids)}
    times = run.seconds(calls)
    figures = {
        "of_forward": times["forward"] / times["write"],
        "of_what_skipped_layers_allow": times["forward"] / times["write"] / allowed,
        "encoding_of_it": times["forward"] / times["encode"] / allowed,
    }
    run.note("memorizing", name, tokens_per_second=ids.numel() / times["write"], **figures)


@torch.no_grad()
def reading(run: Run, name: str) -> None:
    """Read a segment with memory, against memory off and against the backbone alone."""
    model = random_model(name, run.device, run.sizes.segment)
    ids = random_ids(model, 1, run.sizes.segment)
    for stored in run.sizes.stored:

        def measure(stored: int = stored) -> None:
            bank = random_bank(model, stored)
            calls = {
                "off": lambda: model(ids),
                "on": lambda: model(ids, memory=bank),
                "backbone": lambda: model.backbone(ids),
            }
            if run.device.type == "cuda":
                calls["fused"] = fused(calls["on"])
            times = run.seconds(calls)
            added = {
                name: (times[name] - times["off"]) / times["backbone"] for name in ("on", "fused") if name in times
            }
            figures = {"off_of_backbone": times["off"] / times["backbone"], "added_of_backbone": added["on"]}
            figures |= {"added_by_the_kernel": added["fused"]} if "fused" in added else {}
            run.note("reading", f"{name}, {stored:,} stored", seconds=times["on"], **figures, bank_bytes=bank.nbytes)

        run.tries(f"reading, {name}, {stored:,}", measure)


def fused(call: Callable[[], object]) -> Callable[[], object]:
    """Return a call for which a kernel reads what is stored where it is."""

    def asked() -> object:
        before = os.environ.get("LONGMEM_FUSED_READ")
        os.environ["LONGMEM_FUSED_READ"] = "1"
        try:
            return call()
        finally:
            os.environ.pop("LONGMEM_FUSED_READ") if before is None else os.environ.update(LONGMEM_FUSED_READ=before)

    return asked


def decoder(model: Any, cache: Any, token: Tensor, steps: int, **options: Any) -> Callable[[], None]:
    """Return a call that decodes so many tokens behind a cache, which is as long afterwards as before."""

    def decode() -> None:
        for _ in range(steps):
            model(token, use_cache=True, **as_keyword(cache), **options)
        cache.crop(-steps)  # what was decoded is forgotten

    return decode


def bytes_of(cache: Any) -> int:
    """Return the bytes of the keys and values of a cache."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)


@torch.no_grad()
def decoding(run: Run, name: str) -> None:
    """Decode with memory behind a window, against the backbone with that window and with all of it in its window.

    LoRA is folded into weights of the model's own, which takes as many bytes again as the layers that read memory.
    """
    sizes = run.sizes
    model = random_model(name, run.device, sizes.segment)
    merged = with_memory(model.backbone, sizes.segment)
    merged.merge_lora()
    token, prompt = random_ids(model, 1, 1), random_ids(model, 1, sizes.segment - sizes.steps)
    plain = decoder(model.backbone, random_cache(model.backbone, prompt.shape[1], model.device), token, sizes.steps)
    for stored in sizes.stored:

        def measure(stored: int = stored) -> None:
            bank = random_bank(model, stored)
            cache = cache_of(model(prompt, memory=bank, use_cache=True))
            long = random_cache(model.backbone, sizes.window, model.device)
            calls = {
                "plain": plain,
                "window": decoder(model.backbone, long, token, sizes.steps),
                "memory": decoder(model, cache, token, sizes.steps, memory=bank),
                "merged": decoder(merged, cache_of(merged(prompt, use_cache=True)), token, sizes.steps, memory=bank),
            }
            if run.device.type == "cuda":
                calls["merged_fused"] = fused(calls["merged"])
            times = run.seconds(calls)
            figures = {
                "tokens_per_second": sizes.steps / times["merged"],
                "of_plain": times["plain"] / times["merged"],
                "of_plain_without_merging": times["plain"] / times["memory"],
                "of_long_window": times["window"] / times["merged"],
            }
            if "merged_fused" in times:
                figures["of_plain_with_the_kernel"] = times["plain"] / times["merged_fused"]
            held = {"bank_bytes": bank.nbytes, "cache_bytes": bytes_of(cache), "long_cache_bytes": bytes_of(long)}
            run.note("decoding", f"{name}, {stored:,} stored, {sizes.window:,} in the long window", **figures, **held)

        run.tries(f"decoding, {name}, {stored:,}", measure)


def training(run: Run, name: str) -> None:
    """One step of the side network that reads memory, against one of all weights of the backbone."""
    sizes, times, peaks = run.sizes, {}, {}
    for kind in ("side network", "all weights"):

        def measure(kind: str = kind) -> None:
            model = random_model(name, run.device, sizes.segment)
            ids = random_ids(model, sizes.batch, sizes.segment)
            bank = random_bank(model, sizes.stored[0])
            trained = model if kind == "side network" else model.backbone
            options = {"memory": bank} if trained is model else {}
            if trained is not model:
                trained.requires_grad_()
            trained.train()
            weights = [each for each in trained.parameters() if each.requires_grad]
            optimizer = torch.optim.AdamW(weights, lr=1e-5)

            def step() -> None:
                with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.device.type == "cuda"):
                    trained(ids, labels=ids, **options).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            if run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(run.device)
            times[kind] = run.seconds({kind: step})[kind]
            if run.device.type == "cuda":
                peaks[kind] = torch.cuda.max_memory_allocated(run.device)

        run.tries(f"training, {name}, {kind}", measure)
    for kind, taken in times.items():
        of_all = times["all weights"] / taken if "all weights" in times else None
        run.note("training", f"{name}, {kind}", seconds=taken, speed_of_all_weights=of_all, peak_bytes=peaks.get(kind))


@torch.no_grad()
def search(run: Run, name: str) -> None:
    """Exact and clustered search of one head, for one token's queries and for a segment's."""
    for count in run.sizes.keys:

        def measure(count: int = count) -> None:
            torch.manual_seed(0)
            keys = torch.randn(1, count, 64, device=run.device)
            store = ChunkStore(Chunks(keys[:, :, None], keys[:, :, None, :1], keys))
            queries = {
                "3": keys[:, :3] + 0.1,
                str(run.sizes.segment): torch.randn(1, run.sizes.segment, 64, device=run.device),
            }
            for kind in ("exact", "flat", "ivf"):
                if kind == "ivf" and time.monotonic() > run.ends - 60 and run.sizes is not SMALL:
                    raise TimeoutError("no time left for clusters")
                index = make_index(kind, store)
                start = time.perf_counter()
                index.rows_written(torch.arange(count))
                index.search(queries["3"], 16)
                run.wait()
                built = time.perf_counter() - start
                times = run.seconds(
                    {size: lambda index=index, asked=asked: index.search(asked, 16) for size, asked in queries.items()}
                )
                figures = {f"milliseconds_{size}_queries": 1000 * taken for size, taken in times.items()}
                run.note("search", f"{kind}, {count:,} keys", **figures, first_seconds=built)

        run.tries(f"search, {count:,} keys", measure)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| section | what | figures |"
    yield "|---|---|---|"
    for row in rows:
        figures = (
            f"{name.replace('_', ' ')} {value:,.4g}" for name, value in row.items() if name not in ("section", "what")
        )
        yield f"| {row['section']} | {row['what']} | {'; '.join(figures)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes: whether all of this runs")
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), help="default: all three")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS)
    )
    parser.add_argument("--stored", nargs="+", type=int, metavar="TOKENS", help="default: 65536 1048576")
    parser.add_argument("--rounds", type=int, help="default: 5")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin nothing new afterwards")
    parser.add_argument("--output", type=Path, default=Path("gpu-results"))
    add_device(parser)
    given = parser.parse_args()
    use_device(given.device)
    sizes = SMALL if given.small else Sizes()
    chosen = {"models": given.models, "stored": given.stored, "rounds": given.rounds}
    sizes = dataclasses.replace(sizes, **{name: value for name, value in chosen.items() if value})
    run = Run(sizes, chosen_device(), 60 * given.minutes, Console(highlight=False, soft_wrap=True))
    for section in given.only:
        measure = globals()[section]
        for name in sizes.models if section not in ("correctness", "search") else ("tiny",):
            run.tries(f"{section}, {name}", lambda measure=measure, name=name: measure(run, name))
    given.output.mkdir(parents=True, exist_ok=True)
    results = {"device": str(run.device), "environment": environment(), "sizes": dataclasses.asdict(sizes)}
    results |= {"results": run.rows, "left_out": run.left_out}
    (given.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    (given.output / "table.md").write_text("\n".join(table(run.rows)) + "\n", "utf-8")
    run.console.print(f"in {given.output}: results.json, table.md")


if __name__ == "__main__":
    main()
