"""`python -m longmem.official compare RECORDING.safetensors`: how far this package is from the released code's numbers."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from longmem.console import SafeConsole
from longmem.errors import printable
from longmem.official.comparison import compare, print_comparison
from longmem.official.recording import Recording


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if this package agrees with the recording, 1 if it does not, 2 if it can't be read."""
    parser = argparse.ArgumentParser(prog="python -m longmem.official", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("compare", help="replay a recording and print the differences")
    command.add_argument("recording", type=Path, metavar="RECORDING", help="safetensors file; settings are beside it")
    arguments = parser.parse_args(argv)
    try:
        result = compare(Recording(arguments.recording))
    except (ValueError, OSError) as error:
        print(f"longmem.official: {printable(str(error))}", file=sys.stderr)
        return 2
    print_comparison(result, SafeConsole(highlight=False, soft_wrap=True))
    return 0 if result.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
