"""An evaluation of `longmem eval` with two more systems, "neighbours" and "near-neighbours"; arguments are that command's."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, which is not installed

from experiments.neighbours.neighbours import MIXINGS, NeighbourSystem
from longmem.cli.main import main
from longmem.plugins import register

if __name__ == "__main__":
    for name in MIXINGS:
        register("system", name)(NeighbourSystem)
    sys.exit(main(["eval", *sys.argv[1:]]))
