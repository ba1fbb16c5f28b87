"""Train a side network and its backbone together, as Memorizing Transformers does, to see what LongMem avoids.

    python experiments/coupled_writer/train.py longmem/training/configs/python-manual.yaml output=runs/coupled
    python experiments/coupled_writer/train.py longmem/training/configs/python-manual.yaml output=runs/averaged \\
        writer.average=0.999

The file is one for `train/train_longmem.py`, which this script goes on from; `writer.NAME=VALUE` says how the backbone is
trained (`WriterSettings` in training.py).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, which is not installed

from experiments.coupled_writer.training import CoupledSettings, Coupling
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
        settings = load_settings(arguments.config, arguments.overrides, CoupledSettings)
        trainer = Trainer(settings, console_for(as_json=False), [Coupling()])
    except ValueError as error:  # settings, texts or an earlier run do not fit
        parser.exit(2, f"train.py: {error}\n")
    trainer.run()


if __name__ == "__main__":
    main()
