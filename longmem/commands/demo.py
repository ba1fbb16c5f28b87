"""`longmem demo`: the demonstration."""

from __future__ import annotations

import argparse
import dataclasses

from longmem.commands import opening
from longmem.demo import DemoSettings, run_demo


def run(arguments: argparse.Namespace) -> None:
    """Run the demonstration with the settings of the command line."""
    names = {field.name for field in dataclasses.fields(DemoSettings)}
    settings = DemoSettings(**{name: value for name, value in vars(arguments).items() if name in names})
    metrics = run_demo(settings, opening.console_for(arguments.json, markup=True))
    if arguments.json:
        opening.print_json(metrics)
