"""What one very long text costs: seconds to the first commit, memory, and that a run that was killed goes on.

    python benchmarks/bench_long_text.py [--megabytes 100] [--model NAME] [--folder FOLDER] [--output FILE.json]

`longmem memorize` reads the text in a process of its own, which gets SIGKILL when it has committed a quarter of the tokens. The
same command then goes on to the end. Without `--model` a random Llama of two layers with SmolLM2's tokenizer encodes, so that
what is measured is all but the model: a real one adds its weights and its time per token. The text: Python's reference manual,
sentence by sentence in random order.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from longmem import LongMemForCausalLM, MemoryBank
from longmem.memory import has_bank
from longmem.settings.environment import environment

MEGABYTE = 10**6
LOOK_EVERY = 0.2  # seconds
KILLED_AT = 0.25  # of all tokens


def write_text(path: Path, megabytes: float) -> None:
    """Write sentences of Python's manual, drawn at random, up to this size."""
    sentences = [f"{each}. " for topic in topics.values() for each in topic.split(". ")]
    draw, left = random.Random(0), int(megabytes * MEGABYTE)
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            part = "".join(draw.choices(sentences, k=1000))
            file.write(part)
            left -= len(part.encode())


def save_tiny_model(folder: Path) -> Path:
    """Save a model of two layers, with the tokenizer of SmolLM2-135M; return its folder."""
    torch.manual_seed(0)
    tokenizer = LongMemForCausalLM.from_pretrained("smollm2-135m").tokenizer
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=len(tokenizer))
    heads = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8192)
    backbone = folder / "backbone"
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    LongMemForCausalLM.from_backbone(str(backbone)).save_pretrained(folder / "model")
    return folder / "model"


def committed(bank: Path) -> int:
    """Return the tokens that a bank holds on the disk, 0 while there is none."""
    if not has_bank(bank):
        return 0
    with MemoryBank.open(bank, read_only=True) as opened:
        return int(opened.num_tokens)


def most_resident(pid: int) -> int:
    """Return the bytes that a process has held at most so far (VmHWM, which Linux counts); 0 when it has ended."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def run(command: list[str], bank: Path, kill_at: float | None) -> dict[str, Any]:
    """Run `longmem memorize`, up to so many committed tokens or to its end; return seconds, peak memory and tokens."""
    start, at_first, before = time.perf_counter(), None, committed(bank)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak, tokens, looked = 0, before, 0.0
    while process.poll() is None:
        time.sleep(LOOK_EVERY)
        peak = max(peak, most_resident(process.pid))
        if at_first is None or (kill_at is not None and time.perf_counter() - looked > 10 * LOOK_EVERY):
            looked, tokens = time.perf_counter(), committed(bank)
            if at_first is None and tokens > before:
                at_first = looked - start
            if kill_at is not None and tokens >= kill_at:
                process.send_signal(signal.SIGKILL)
                break
    _, errors = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(errors)
    found = {"seconds": time.perf_counter() - start, "to_first_commit": at_first, "peak_bytes": peak}
    return found | {"tokens_before": before, "tokens_after": committed(bank), "exit": process.returncode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--model", help="name or folder; default: the random one")
    parser.add_argument("--folder", type=Path, help="where text and bank are written, on the disk to be measured")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        text, bank = place / "text.txt", place / "bank"
        write_text(text, given.megabytes)
        model = given.model or str(save_tiny_model(place))
        tokenizer = LongMemForCausalLM.from_pretrained(model).tokenizer
        with text.open(encoding="utf-8") as file:
            piece = file.read(100_000)
        total = text.stat().st_size / len(piece.encode()) * len(tokenizer(piece, verbose=False)["input_ids"])
        program = "from longmem.cli.main import main; raise SystemExit(main())"
        command = [sys.executable, "-c", program, "memorize", str(text), "--bank", str(bank), "--model", model]
        runs = {"killed": run(command, bank, KILLED_AT * total), "went on": run(command, bank, None)}
        with MemoryBank.open(bank, read_only=True) as opened:
            opened.folder.verify()
        sizes = {"text_bytes": text.stat().st_size, "bank_bytes": sum(each.stat().st_size for each in bank.rglob("*"))}
    finally:
        shutil.rmtree(place)
    table = Table("run", "seconds", "to the first commit, s", "peak MB", "tokens before", "tokens after")
    for name, row in runs.items():
        first = "-" if row["to_first_commit"] is None else f"{row['to_first_commit']:.1f}"
        cells = (f"{row['seconds']:.0f}", first, f"{row['peak_bytes'] / MEGABYTE:.0f}")
        table.add_row(name, *cells, f"{row['tokens_before']:,}", f"{row['tokens_after']:,}")
    Console(width=120).print(table)
    if given.output:
        about = {"settings": vars(given), "environment": environment(), "cores": os.cpu_count()}
        given.output.write_text(json.dumps(about | sizes | {"runs": runs}, default=str) + "\n")


if __name__ == "__main__":
    main()
