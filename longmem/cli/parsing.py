"""What the parsers of `longmem` share: commands and groups of commands whose help teaches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


class TeachingFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and keep the lines of examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # None, False and an empty list say nothing as a default.
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def add_command(
    to: Any, name: str, does: str, summary: str, epilog: str, *parents: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """Return the parser of a new command; `does` names the function of `longmem.cli` that does it."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output, for a program")
    common.add_argument("--debug", action="store_true", help="show where an error came from")
    command = to.add_parser(
        name,
        help=summary,
        description=sentence(summary),
        epilog=epilog,
        parents=[common, *parents],
        formatter_class=TeachingFormatter,
    )
    command.set_defaults(does=does)
    return command


def add_group(to: Any, name: str, summary: str, epilog: str) -> Any:
    """Return what commands of a new group are added to."""
    group = to.add_parser(
        name, help=summary, description=sentence(summary), epilog=epilog, formatter_class=TeachingFormatter
    )
    return group.add_subparsers(dest="action", required=True, metavar="ACTION")


def bank_folder() -> argparse.ArgumentParser:
    """Return the argument of all commands that use a bank."""
    bank = argparse.ArgumentParser(add_help=False)
    bank.add_argument("--bank", required=True, type=Path, metavar="DIR", help="folder of the bank")
    return bank


def sentence(summary: str) -> str:
    """Return a summary as a sentence."""
    return summary[0].upper() + summary[1:] + "."
