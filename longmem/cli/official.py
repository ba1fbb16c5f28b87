"""`longmem official`: checkpoints of the released code, and recordings of its runs."""

import argparse
from pathlib import Path
from typing import Any

from longmem.cli import common
from longmem.cli.common import add_command, add_group

EXAMPLES = """\
  longmem official convert checkpoint.pt newgpt.pt longmem-released   then: LongMemForCausalLM.from_pretrained
  longmem official compare recording.safetensors                      exit code 1 if a float32 run is off

The released code is github.com/Victorwz/LongMem; docs/paper-differences.md says how this package differs from it.
"""


def add(commands: Any) -> None:
    """Add the group `official`."""
    uses = add_group(commands, "official", "use what the released code of the paper wrote", EXAMPLES)
    convert = add_command(uses, "convert", convert_checkpoints, "write its checkpoints as a model of this package", "")
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="of the side network (.pt)")
    convert.add_argument("backbone", type=Path, metavar="BACKBONE_CHECKPOINT", help="of its NewGPT backbone (.pt)")
    convert.add_argument("folder", type=Path, metavar="OUT", help="folder to write")
    compare = add_command(uses, "compare", compare_with_recording, "replay a recording, print the differences", "")
    compare.add_argument("recording", type=Path, metavar="RECORDING", help="safetensors file; settings are beside it")


def convert_checkpoints(arguments: argparse.Namespace) -> None:
    """Write two checkpoints of the released code as a model of this package."""
    from longmem.official.checkpoint import convert

    memory_size = convert(arguments.checkpoint, arguments.backbone, arguments.folder)
    common.tell(
        arguments,
        {"model": str(arguments.folder), "memory_size": memory_size},
        f"{arguments.folder}: LongMemForCausalLM.from_pretrained opens it. It was trained with a memory of "
        f"{memory_size:,} tokens; the tokenizer is not converted.",
    )


def compare_with_recording(arguments: argparse.Namespace) -> int:
    """Replay a recording; return 1 if this package is off."""
    from longmem.official.comparison import compare, print_comparison
    from longmem.official.recording import Recording

    result = compare(Recording(arguments.recording))
    if arguments.json:
        common.print_json(result.to_dict())
    else:
        print_comparison(result, common.console_for(False))
    return 0 if result.agrees else 1
