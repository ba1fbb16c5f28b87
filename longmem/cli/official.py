"""`longmem official`: checkpoints of the released code, and recordings of its runs."""

from __future__ import annotations

import argparse

from longmem.cli import common
from longmem.official.checkpoint import convert
from longmem.official.comparison import compare
from longmem.official.recording import Recording
from longmem.official.report import print_comparison


def convert_checkpoints(arguments: argparse.Namespace) -> None:
    """Write two checkpoints of the released code as a model of this package."""
    memory_size = convert(arguments.checkpoint, arguments.backbone, arguments.folder)
    if arguments.json:
        common.print_json({"model": str(arguments.folder), "memory_size": memory_size})
    else:
        common.console_for(False).print(
            f"{arguments.folder}: LongMemForCausalLM.from_pretrained opens it. It was trained with a memory of "
            f"{memory_size:,} tokens; the tokenizer is not converted."
        )


def compare_with_recording(arguments: argparse.Namespace) -> int:
    """Replay a recording; return 1 if this package is off."""
    result = compare(Recording(arguments.recording))
    if arguments.json:
        common.print_json(result.to_dict())
    else:
        print_comparison(result, common.console_for(False))
    return 0 if result.agrees else 1
