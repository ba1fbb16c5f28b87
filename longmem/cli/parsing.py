"""What the parsers of `longmem` share: commands and groups of commands whose help teaches, and options of several."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

# With the trained side network that comes with this package, if there is one.
DEFAULT_MODEL = "smollm2-135m"
POLICIES = '"frozen", "eager", "lazy", "bounded:max_lag=4", ...'
Run = Callable[[argparse.Namespace], int | None]


class TeachingFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and keep the lines of examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # None, False and an empty list say nothing as a default.
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def add_command(
    to: Any, name: str, run: Run, summary: str, examples: str, *parents: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """Return the parser of a new command; `run` does its work and returns an exit code, None for 0."""
    common = option("--json", action="store_true", help="print one JSON object on standard output, for a program")
    common.add_argument("--debug", action="store_true", help="show where an error came from")
    command = _add_parser(to, name, summary, examples, parents=[common, *parents])
    command.set_defaults(run=run)
    return command


def add_group(to: Any, name: str, summary: str, examples: str) -> Any:
    """Return what commands of a new group are added to."""
    group = _add_parser(to, name, summary, examples)
    return group.add_subparsers(dest="action", required=True, metavar="ACTION")


def _add_parser(to: Any, name: str, summary: str, examples: str, **options: Any) -> argparse.ArgumentParser:
    description, epilog = summary[0].upper() + summary[1:] + ".", f"examples:\n{examples}" if examples else None
    options |= {"description": description, "epilog": epilog, "formatter_class": TeachingFormatter}
    return to.add_parser(name, help=summary, **options)


def option(*names: str, **settings: Any) -> argparse.ArgumentParser:
    """Return a parser with one option, to be a parent of the commands that have it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(*names, **settings)
    return parser


def bank_folder() -> argparse.ArgumentParser:
    """Return the option of all commands that use a bank."""
    return option("--bank", required=True, type=Path, metavar="DIR", help="folder of the bank")


def labels() -> argparse.ArgumentParser:
    """Return the options that label a document."""
    parser = option("--tag", action="append", default=[], help="tag of the documents; may be given several times")
    parser.add_argument("--pin", action="store_true", help="keep the documents from eviction")
    return parser


def model_option(default: str = "the model that wrote the bank") -> argparse.ArgumentParser:
    """Return the option that names a model."""
    return option("--model", help=f"default: {default}")
