"""`longmem generate`: continue a prompt with a bank as memory."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longmem.cli import common
from longmem.cli.common import add_command, bank_folder
from longmem.cli.texts import read_text, readable_name
from longmem.errors import printable

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from longmem.memory import MemoryBank
    from longmem.memory.finding import FindableMemory
    from longmem.model.modeling import LongMemForCausalLM

EXAMPLES = """\
  longmem generate --bank memory --prompt "The white whale"
  longmem generate --bank memory --prompt-file question.txt --show-reads
  longmem generate --bank memory --prompt "Call me" --json | jq -r .text
  longmem generate --bank memory --tag notes --chat --prompt "When is the meeting?" --stop "."

  longmem generate --bank memory --prompt "Call me" --explain explain.html

The text is printed as it is written. --show-reads adds which passages were read most, --explain shows it word by word.
"""


def add(commands: Any) -> None:
    """Add the command `generate`."""
    generate = add_command(commands, "generate", run, "continue a prompt with a memory", EXAMPLES, bank_folder())
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="file with the text to continue, or - to read it"
    )
    generate.add_argument("--model", help="default: the model that wrote the bank")
    common.add_device(generate)
    generate.add_argument("--encoding", metavar="NAME", help="of the file with the prompt; default: UTF-8")
    generate.add_argument(
        "--id", action="append", default=[], metavar="NAME", help="read this document alone; repeatable"
    )
    generate.add_argument("--tag", action="append", default=[], help="read documents with this tag alone; repeatable")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end behind this text; repeatable"
    )
    generate.add_argument(
        "--chat", action="store_true", help="the prompt is a message to a model that was trained to chat"
    )
    generate.add_argument("--max-new-tokens", type=int, default=100, help="tokens to write")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    generate.add_argument("--seed", type=int, default=0, help="for a temperature above 0")
    generate.add_argument("--show-reads", action="store_true", help="list the passages that were read most")
    generate.add_argument(
        "--explain", type=Path, metavar="HTML", help="write a page that shows which word read which passage"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the continuation as it comes, then, if asked, the passages that were read most."""
    from longmem.memory import checks

    if arguments.encoding is not None and arguments.prompt_file is None:
        raise ValueError(
            f"`--encoding` must come with `--prompt-file`, got {arguments.encoding!r} without one; leave it out."
        )
    prompt = arguments.prompt if arguments.prompt_file is None else read_text(arguments.prompt_file, arguments.encoding)
    if not prompt.strip():
        raise ValueError("the prompt must hold some text, got an empty one.")
    if readable_name(prompt) != prompt:
        raise ValueError(
            "the prompt must be text in the encoding of this terminal, got other bytes; use `--prompt-file`."
        )
    if "" in arguments.stop:
        raise ValueError("`--stop` must be some text, got an empty one; leave it out.")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"`--max-new-tokens` must be at least 1, got {arguments.max_new_tokens}.")
    if not 0 <= arguments.temperature < math.inf:
        raise ValueError(
            f"`--temperature` must be 0 or more, got {arguments.temperature}; 0 takes the likeliest token."
        )
    checks.validate_integer("--seed", arguments.seed)
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

    from longmem.tracing import explain, read_passages

    class SafeStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    inputs = (conversation if arguments.chat else plain)(prompt, model).to(model.input_device)
    memory = chosen(bank, arguments)
    options: dict[str, Any] = {
        "memory": memory,
        "max_new_tokens": arguments.max_new_tokens,
        "do_sample": arguments.temperature > 0,
    }
    if options["do_sample"]:
        torch.manual_seed(arguments.seed)
        options["temperature"] = arguments.temperature
    if arguments.stop:
        options |= {"stop_strings": arguments.stop, "tokenizer": model.tokenizer}
    if not arguments.json:
        options["streamer"] = SafeStreamer(model.tokenizer, skip_special_tokens=True)
    names = ("input_ids", "attention_mask")
    began = time.perf_counter()
    ids = model.generate(**{name: inputs[name] for name in names}, **options)[0].cpu()
    seconds = time.perf_counter() - began
    new = ids[inputs["input_ids"].shape[1] :]
    window = ids[-model.config.segment_length :]
    if arguments.explain is not None:
        explain(model, inputs["input_ids"][0], memory=memory, answer=new).to_html(arguments.explain)
    reads = []
    if arguments.show_reads and len(window) > 1:
        (reads,) = read_passages(model, bank, window, [slice(1, len(window))], count=5, memory=memory)
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


def plain(prompt: str, model: LongMemForCausalLM) -> BatchEncoding:
    """Return the tokens of a text to continue."""
    return model.tokenizer(prompt, return_tensors="pt")


def conversation(prompt: str, model: LongMemForCausalLM) -> BatchEncoding:
    """Return the tokens of a conversation that begins with a message, up to its answer."""
    if not model.tokenizer.chat_template:
        raise ValueError(
            f"`--chat` needs a model that was trained to chat, got {model.config.backbone_name_or_path}, whose tokenizer has "
            "no chat template; leave it out."
        )
    message = [{"role": "user", "content": prompt}]
    form: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return model.tokenizer.apply_chat_template(message, **form)  # type: ignore[return-value]
