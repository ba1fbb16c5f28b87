"""Training steps: LongMem with full memories beside fine-tuning the same backbone, and a second epoch beside the first.

    python benchmarks/bench_training.py [--backbone smollm2-135m] [--lanes 2] [--window 1024] [--memory-tokens 16384]
        [--steps 5] [--config longmem/training/configs/smollm2-books.yaml] [--output FILE.json] [section.key=value ...]

Each kind of training has a process of its own, so that its peak memory is its own, and they take their steps in turn, so
that a busy machine slows all of them. Ratios are of times of the same round. Epochs that keep features read the same windows
twice, the second time with what the backbone made of them from the disk. The text is Python's reference manual; another
is given by `data.train=FOLDER data.lanes_per_document=1`, and any other setting of the configuration in the same way.
"""

import argparse
import dataclasses
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from accelerate import Accelerator
from bench_bank import peak_resident
from bench_cost import seconds, summary
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from longmem.backbone.loading import load_backbone, load_tokenizer
from longmem.settings.environment import environment
from longmem.training import Trainer, load_settings, setup
from longmem.training.settings import TrainingSettings

LONGMEM, FIRST, SECOND = "LongMem", "features kept, epoch 1", "features kept, epoch 2"
FULL, LORA = "full fine-tuning", "LoRA fine-tuning"
# speed of one / of the other
RATIOS = [(LONGMEM, FULL), (LORA, FULL), (LONGMEM, LORA), (SECOND, FULL), (SECOND, FIRST)]
Steps = Iterator[dict[str, float]]  # seconds of a step of each kind; the first warms up


def longmem_steps(settings: TrainingSettings, first: int, keeps_features: bool) -> Steps:
    """Train from step `first` on: as in a run that goes on there, memories are written from the text before."""
    trainer = Trainer(settings)
    trainer.step = first

    def step() -> None:
        record = trainer.train_step()
        if record.memory_tokens < settings.memory.tokens:
            raise ValueError(
                f"`--memory-tokens` must be less than a lane reads before step {trainer.step}, got "
                f"{settings.memory.tokens} for {record.memory_tokens:.0f}; give a longer text by "
                "`data.train=FOLDER data.lanes_per_document=1`, or take fewer lanes, tokens or steps."
            )

    while True:
        number, new = trainer.step, seconds(step)
        if not keeps_features:
            yield {LONGMEM: new}
            continue
        trainer.step = number  # the same window again: its features are kept, as they are in a second epoch
        yield {FIRST: new, SECOND: seconds(step)}


def finetuning_steps(settings: TrainingSettings, first: int, rank: int | None) -> Steps:
    """Train the backbone itself on the same windows: by LoRA of a rank on its frozen weights, or all of it in float32."""
    name, wanted = settings.model.backbone, settings.optimization
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    lanes, device = setup.make_lanes(settings, load_tokenizer(name), accelerator), accelerator.device
    dtype = "float32" if rank is None else settings.model.backbone_dtype
    model = load_backbone(name, dtype=getattr(torch, dtype)).to(device).train().requires_grad_()
    if rank is not None:
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = setup.make_optimizer(trained, wanted)
    autocast = {"dtype": torch.bfloat16, "enabled": wanted.mixed_precision == "bf16"}

    def step(number: int) -> None:
        for window in range(wanted.gradient_accumulation):
            batch = lanes.batch(number * wanted.gradient_accumulation + window).to(device)
            with torch.autocast(device.type, **autocast):
                loss = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
            (loss / wanted.gradient_accumulation).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), wanted.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    while True:
        yield {FULL if rank is None else LORA: seconds(lambda number=first: step(number))}
        first += 1


def serve(connection: Connection, kind: Callable[..., Steps], *arguments: object) -> None:
    """Do a step and tell its seconds as often as asked, then tell the most MB that this process has taken."""
    steps = kind(*arguments)
    while connection.recv():
        connection.send(next(steps))
    on_gpu = torch.cuda.is_available()
    connection.send((torch.cuda.max_memory_allocated() if on_gpu else peak_resident()) / 1e6)


def measure(settings: TrainingSettings, num_steps: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of each kind of step, round by round, and the peak MB of the process that did it."""
    windows = -(-settings.memory.tokens // settings.data.window) + 1  # one more: a tail waits for its chunk to be full
    first = -(-windows // settings.optimization.gradient_accumulation)
    rank = (settings.model.config.get("lora") or {"rank": 32})["rank"]
    keeping = dataclasses.replace(settings.features, folder=f"{settings.output}/features")
    kinds = [
        (longmem_steps, settings, first, False),
        (longmem_steps, dataclasses.replace(settings, features=keeping), first, True),
        (finetuning_steps, settings, first, None),
        (finetuning_steps, settings, first, rank),
    ]
    context, connections = multiprocessing.get_context("spawn"), []
    for kind in kinds:
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, *kind), daemon=True).start()
        theirs.close()  # so that the end of the process ends the connection
        connections.append(ours)
    times: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for number in track(range(num_steps + 1), "training steps, the first to warm up"):
        for connection in connections:
            connection.send(True)
            for name, taken in connection.recv().items():
                times.setdefault(name, []).extend([taken] if number else [])
    for connection, names in zip(connections, ([LONGMEM], [FIRST, SECOND], [FULL], [LORA]), strict=True):
        connection.send(False)
        peaks |= dict.fromkeys(names, connection.recv())
    return times, peaks


def own_settings(given: argparse.Namespace, folder: str) -> list[str]:
    """Return the overrides for a run on Python's manual, with the sizes that a command line gave, in a folder that goes."""
    own = {
        "output": folder,
        "model.backbone": given.backbone,
        "data.train": "python-manual",
        "data.lanes": given.lanes,
        "data.lanes_per_document": given.lanes,
        "data.document_tokens": "null",
        "data.window": given.window,
        "memory.tokens": given.memory_tokens,
        "validation.every_steps": 0,
    }
    return [f"{name}={value}" for name, value in own.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--config", default="longmem/training/configs/smollm2-books.yaml")
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--memory-tokens", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=5, help="of each kind, after one to warm up")
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace all others")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(given.config, own_settings(given, folder) + given.overrides)
        times, peaks = measure(settings, given.steps)
    tokens = settings.data.lanes * settings.data.window * settings.optimization.gradient_accumulation
    speeds = {name: summary([tokens / taken for taken in each]) for name, each in times.items()}
    ratios = {
        f"{one} / {other}": summary([b / a for a, b in zip(times[one], times[other], strict=True)])
        for one, other in RATIOS
    }
    memory = "GPU memory" if torch.cuda.is_available() else "resident memory"
    title = f"{given.backbone}, {tokens} tokens a step, {given.memory_tokens} in memory, {given.steps} steps"
    columns = (Column(name, no_wrap=True, justify="right") for name in ("median", "min", "max", "peak MB"))
    table = Table("tokens/s, and their ratios", *columns, title=title, caption=f"peak MB: of {memory}")
    for name, figures in speeds.items():
        table.add_row(name, *(f"{each:,.1f}" for each in figures.values()), f"{peaks[name]:,.0f}")
    for name, figures in ratios.items():
        table.add_row(name, *(f"{each:.2f}" for each in figures.values()))
    Console().print(table)
    if given.output:
        setup_of_run = {**vars(given), "output": None, "settings": dataclasses.asdict(settings)}
        result = {"tokens_per_second": speeds, "speed_ratios": ratios, f"peak {memory} (MB)": peaks}
        written = {"setup": setup_of_run, "environment": environment(), "result": result}
        given.output.write_text(json.dumps(written, indent=2))


if __name__ == "__main__":
    main()
