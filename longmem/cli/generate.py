"""`longmem generate`: continue a prompt with a bank as memory."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longmem.cli import common
from longmem.cli.common import add_command, bank_folder
from longmem.cli.texts import read_text
from longmem.errors import printable

if TYPE_CHECKING:
    from longmem.memory import MemoryBank
    from longmem.model.modeling import LongMemForCausalLM

EXAMPLES = """\
  longmem generate --bank memory --prompt "The white whale"
  longmem generate --bank memory --prompt-file question.txt --show-reads
  longmem generate --bank memory --prompt "Call me" --json | jq -r .text

The text is printed as it is written. --show-reads adds which passages were read most.
"""


def add(commands: Any) -> None:
    """Add the command `generate`."""
    generate = add_command(commands, "generate", run, "continue a prompt with a memory", EXAMPLES, bank_folder())
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="file with the text to continue")
    generate.add_argument("--model", help="default: the model that wrote the bank")
    generate.add_argument("--max-new-tokens", type=int, default=100, help="tokens to write")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    generate.add_argument("--seed", type=int, default=0, help="for a temperature above 0")
    generate.add_argument("--show-reads", action="store_true", help="list the passages that were read most")


def run(arguments: argparse.Namespace) -> None:
    """Write the continuation as it comes, then, if asked, the passages that were read most."""
    prompt = arguments.prompt if arguments.prompt_file is None else read_text(arguments.prompt_file)
    if not prompt.strip():
        raise ValueError("the prompt must hold some text, got an empty one.")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"`--max-new-tokens` must be at least 1, got {arguments.max_new_tokens}.")
    if arguments.temperature < 0:
        raise ValueError(f"`--temperature` must be 0 or more, got {arguments.temperature}.")
    common.open_bank(arguments.bank).close()  # says what is wrong with it before a model is opened
    model_name, model = common.open_model_of(arguments.bank, arguments.model)
    with common.open_bank(arguments.bank, model) as bank:
        answer(prompt, model_name, model, bank, arguments)


def answer(
    prompt: str, model_name: str, model: LongMemForCausalLM, bank: MemoryBank, arguments: argparse.Namespace
) -> None:
    """Print the continuation, and what was read."""
    import torch
    from transformers import TextStreamer

    from longmem.model.reads import read_passages

    class SafeStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    inputs = model.tokenizer(prompt, return_tensors="pt").to(model.input_device)
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
    if options["do_sample"]:
        torch.manual_seed(arguments.seed)
        options["temperature"] = arguments.temperature
    if not arguments.json:
        options["streamer"] = SafeStreamer(model.tokenizer, skip_special_tokens=True)
    names = ("input_ids", "attention_mask")
    began = time.perf_counter()
    ids = model.generate(**{name: inputs[name] for name in names}, memory=bank, **options)[0].cpu()
    seconds = time.perf_counter() - began
    new = ids[inputs["input_ids"].shape[1] :]
    window = ids[-model.config.segment_length :]
    reads = []
    if arguments.show_reads and len(window) > 1:
        (reads,) = read_passages(model, bank, window, [slice(1, len(window))], count=5)
    if arguments.json:
        result: dict[str, Any] = {
            "prompt": prompt,
            "text": model.tokenizer.decode(new, skip_special_tokens=True),
            "new_tokens": len(new),
            "tokens_per_second": round(len(new) / seconds, 2),
            "model": model_name,
        }
        if arguments.show_reads:
            result["reads"] = [dataclasses.asdict(read) for read in reads]
        common.print_json(result)
        return
    console = common.console_for(False)
    console.print(f"{len(new)} tokens, {len(new) / seconds:.1f} tokens/s", style="dim")
    if arguments.show_reads:
        console.print("\nRead most, with the share of attention:")
    for read in reads:
        text = f"{read.before}[{read.chunk}]{read.after}".replace("\n", "\\n")
        console.print(f"  {read.share:6.2%}  {read.document_id}, tokens {read.start:,} to {read.stop:,}: …{text}…")
