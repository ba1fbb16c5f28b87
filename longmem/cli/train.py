"""`longmem train`: train a side network; a YAML file says how, and settings on the command line change it."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from longmem.cli import common
from longmem.cli.common import add_command
from longmem.settings.files import settings_file, shipped_settings

CONFIGS = Path(__file__).parents[1] / "training" / "configs"

EXAMPLES = """\
  longmem train python-manual                                       a first run: minutes on two cores
  longmem train python-manual output=runs/mine optimization.steps=200
  longmem train books data.train=my-books data.validation=my-other-books
  longmem train my-settings.yaml                                    a file of your own

The folder of the run gets settings, log, curve, checkpoints and the side network. The same command goes on with a run that
was stopped. In several processes: `accelerate launch -m longmem.cli.main train CONFIG`.
The files that come with the package are in {folder}.
"""


def add(commands: Any) -> None:
    """Add the command `train`."""
    examples = EXAMPLES.format(folder=CONFIGS)
    train = add_command(commands, "train", run, "train a side network that reads memory", examples)
    common.add_device(train)
    names = ", ".join(shipped_settings(CONFIGS))
    train.add_argument(
        "config", type="name", metavar="CONFIG", help=f"file of settings (.yaml) or, of the package: {names}"
    )
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings instead of the file's")


def run(arguments: argparse.Namespace) -> None:
    """Train, or go on with a run that was stopped, and say where it is."""
    settings = settings_file(CONFIGS, arguments.config)  # a wrong name is told before anything slow is imported

    common.use_device(arguments.device)

    from longmem.training import Trainer, load_settings

    console = common.console_for(arguments.json, quiet=arguments.quiet)
    trainer = Trainer(load_settings(settings, arguments.overrides), console)
    records = trainer.run()
    if arguments.json and trainer.accelerator.is_main_process:
        common.print_json(
            {
                "output": str(trainer.folder),
                "side_network": str(trainer.folder / "side-network"),
                "step": trainer.step,
                "steps": trainer.steps,
                "last_record": dataclasses.asdict(records[-1]) if records else None,
            }
        )
