"""`longmem report`: finished evaluations on one page."""

from __future__ import annotations

import argparse

from longmem.commands import opening
from longmem.reporting import write_report


def run(arguments: argparse.Namespace) -> None:
    """Write a page over results of evaluations."""
    folder = write_report(arguments.folders, arguments.output, arguments.title)
    files = {name: str(folder / f"report.{ending}") for name, ending in (("markdown", "md"), ("html", "html"))}
    if arguments.json:
        opening.print_json(files)
    else:
        opening.console_for(False).print(f"{files['markdown']} and {files['html']}: {len(arguments.folders)} runs.")
