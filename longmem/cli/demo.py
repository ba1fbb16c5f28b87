"""`longmem demo`: what it can be told. The recipe that it follows is `longmem.cli.demonstration`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from longmem.cli import common
from longmem.cli.common import DEFAULT_MODEL, add_command

EXAMPLES = """\
  longmem demo
  longmem demo --file book.txt --output book-demo
  longmem demo --windows 4                          quicker, rougher
  longmem demo --model runs/books/side-network      a side network of your own

Opens a small model and its trained side network, memorizes the first part of a long text, scores the rest with four
systems on the same tokens, shows what was read, continues a prompt, saves, reopens and compares. All numbers are computed
in the run. Two cores need a few minutes.
"""


def add(commands: Any) -> None:
    """Add the command `demo`."""
    demo = add_command(commands, "demo", run, "measure what memory does, on this machine, in minutes", EXAMPLES)
    demo.add_argument("--file", type=Path, help="text to read (default: Python's reference manual)")
    demo.add_argument("--output", type=Path, default=Path("longmem-demo"), metavar="DIR", help="folder for all results")
    demo.add_argument("--model", type="name", default=DEFAULT_MODEL, help="name or folder; see `longmem --help`")
    common.add_device(demo)
    demo.add_argument("--memory-tokens", type=int, default=12_288, help="tokens of the text to memorize")
    demo.add_argument("--windows", type=int, default=12, help="windows of the rest to score")
    demo.add_argument("--window", type=int, default=512, help="tokens the model sees at once")
    demo.add_argument("--seed", type=int, default=0, help="seed of torch and of the intervals")


def run(arguments: argparse.Namespace) -> None:
    """Run the demonstration with the settings of the command line."""
    common.use_device(arguments.device)

    from longmem.cli.demonstration import DemoSettings, run_demo

    names = {field.name for field in dataclasses.fields(DemoSettings)}
    settings = DemoSettings(**{name: value for name, value in vars(arguments).items() if name in names})
    metrics = run_demo(settings, common.console_for(arguments.json, markup=True, quiet=arguments.quiet))
    if arguments.json:
        common.print_json(metrics)
