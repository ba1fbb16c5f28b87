"""`longmem generate`: continue a prompt with a bank as memory."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longmem.cli import common
from longmem.cli.common import add_command, bank_folder, model_option
from longmem.cli.texts import read_text, readable_name
from longmem.errors import printable

if TYPE_CHECKING:
    from longmem.memory import MemoryBank
    from longmem.memory.finding import FindableMemory
    from longmem.model.modeling import LongMemForCausalLM

EXAMPLES = """\
  longmem generate --bank memory --prompt "The white whale"
  longmem generate --bank memory --prompt-file question.txt --show-reads
  longmem generate --bank memory --prompt "Call me" --json | jq -r .text
  longmem generate --bank memory --tag notes --chat --prompt "When is the meeting?" --stop "."

  longmem generate --bank memory --prompt "Call me" --explain explain.html

The text is printed as it is written, behind the prompt; with --chat, the answer alone. --show-reads adds
which passages were read most, --explain shows it word by word.
"""


def add(commands: Any) -> None:
    """Add the command `generate`."""
    parents = (bank_folder(), model_option())
    generate = add_command(commands, "generate", run, "continue a prompt with a memory", EXAMPLES, *parents)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="file with the text to continue, or - to read it"
    )
    generate.add_argument("--encoding", metavar="NAME", help="of the file with the prompt; default: UTF-8")
    generate.add_argument(
        "--id", action="append", default=[], metavar="NAME", help="read this document alone; repeatable"
    )
    generate.add_argument("--tag", action="append", default=[], help="read documents with this tag alone; repeatable")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end behind this text; repeatable"
    )
    generate.add_argument(
        "--chat", action="store_true", help='the prompt is a message, in the model\'s chat format or "User: ..."'
    )
    common.add_writing(generate, max_new_tokens=100)
    generate.add_argument("--show-reads", action="store_true", help="list the passages that were read most")
    generate.add_argument(
        "--explain", type=common.new_file, metavar="HTML", help="write a page that shows which word read which passage"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the continuation as it comes, then, if asked, the passages that were read most."""
    if arguments.encoding is not None and arguments.prompt_file is None:
        raise ValueError(
            f"`--encoding` must come with `--prompt-file`, got {arguments.encoding!r} without one; leave it out."
        )
    prompt = arguments.prompt if arguments.prompt_file is None else read_text(arguments.prompt_file, arguments.encoding)
    if not prompt.strip():
        raise ValueError("the prompt must hold some text, got an empty one.")
    for name, text in (("the prompt", prompt), *(("`--stop`", each) for each in arguments.stop)):
        if readable_name(text) != text:
            raise ValueError(
                f"{name} must be text in the encoding of this terminal, got other bytes; use `--prompt-file`, or name it in "
                "ASCII."
            )
    if "" in arguments.stop:
        raise ValueError("`--stop` must be some text, got an empty one; leave it out.")
    common.drawing(arguments)
    with common.open_bank(arguments.bank) as bank:  # says what is wrong with it before a model is opened
        chosen(bank, arguments)
    model_name, model = common.open_model_of(arguments)
    with common.open_bank(arguments.bank, model) as bank:
        answer(prompt, model_name, model, bank, arguments)


def chosen(bank: MemoryBank, arguments: argparse.Namespace) -> FindableMemory:
    """Return what is to be read of a bank. Raises ValueError for a document or a tag that it does not have."""
    return bank.select(arguments.id, tags=arguments.tag) if arguments.id or arguments.tag else bank


def answer(
    prompt: str, model_name: str, model: LongMemForCausalLM, bank: MemoryBank, arguments: argparse.Namespace
) -> None:
    """Print the continuation, and what was read."""
    import torch
    from transformers import TextStreamer

    from longmem.serving.engine import prompt_ids
    from longmem.tracing import explain, read_passages

    class SafeStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    said = prompt_ids(model.tokenizer, [{"role": "user", "content": prompt}] if arguments.chat else prompt)
    start = torch.tensor([said], device=model.input_device, dtype=torch.int64)
    memory = chosen(bank, arguments)
    options: dict[str, Any] = {
        "memory": memory,
        "max_new_tokens": arguments.max_new_tokens,
        **common.drawing(arguments),
    }
    torch.manual_seed(arguments.seed)
    if arguments.stop:
        options |= {"stop_strings": arguments.stop, "tokenizer": model.tokenizer}
    if not arguments.json:
        options["streamer"] = SafeStreamer(model.tokenizer, skip_prompt=arguments.chat, skip_special_tokens=True)
    began = time.perf_counter()
    ids = model.generate(start, attention_mask=torch.ones_like(start), **options)[0].cpu()
    seconds = time.perf_counter() - began
    new = ids[len(said) :]
    window = ids[-model.config.segment_length :].tolist()
    begin = model.config.missing_start(window)
    if arguments.explain is not None:
        explain(model, said, memory=memory, answer=new).to_html(arguments.explain)
    reads = []
    if arguments.show_reads and len(window) > 1:
        whole = torch.tensor([*begin, *window])
        (reads,) = read_passages(model, bank, whole, [slice(len(begin) + 1, len(whole))], count=5, memory=memory)
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
    common.console_for(False, quiet=arguments.quiet).print(
        f"{len(new)} tokens, {len(new) / seconds:.1f} tokens/s", style="dim"
    )
    console = common.console_for(False)
    if arguments.show_reads:
        console.print("\nRead most, with the share of attention:")
    for read in reads:
        text = f"{read.before}[{read.chunk}]{read.after}".replace("\n", "\\n")
        console.print(f"  {read.share:6.2%}  {read.document_id}, tokens {read.start:,} to {read.stop:,}: …{text}…")
