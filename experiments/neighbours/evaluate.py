"""An evaluation of `longmem eval` with one more system, "neighbours"; arguments are that command's."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, which is not installed

from experiments.neighbours.neighbours import NeighbourSystem
from longmem.cli.main import main
from longmem.plugins import register

if __name__ == "__main__":
    register("system", "neighbours")(NeighbourSystem)
    sys.exit(main(["eval", *sys.argv[1:]]))
