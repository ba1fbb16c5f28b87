"""Train a side network: a YAML file says how, and settings on the command line change it.

    python train/train_longmem.py configs/train/python-manual.yaml
    python train/train_longmem.py configs/train/books.yaml data.train=my-books data.validation=my-other-books
    python train/train_longmem.py configs/train/python-manual.yaml output=runs/mine optimization.steps=200

The run's folder gets settings, log, curve, checkpoints and the side network. The same command goes on with a run that was
stopped. docs/training.md says what a run does, also in several processes (accelerate launch).
"""

import argparse

from longmem.cli.common import console_for
from longmem.training import Trainer, load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file with settings")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file"
    )
    arguments = parser.parse_args()
    try:
        trainer = Trainer(load_settings(arguments.config, arguments.overrides), console_for(as_json=False))
    except ValueError as error:  # settings, texts or an earlier run do not fit
        parser.exit(2, f"train_longmem.py: {error}\n")
    trainer.run()


if __name__ == "__main__":
    main()
