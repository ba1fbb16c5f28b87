"""`longmem heads`: which heads of a model look back far, or matter in a trained one, and a model that reads by them."""

import argparse
from pathlib import Path
from typing import Any

from longmem.cli import common
from longmem.cli.common import add_command

EXAMPLES = """\
  longmem heads smollm2-135m --texts my-books --output runs/heads
  longmem heads smollm2-135m steps=72 answer_weight=0.2 dtype=bfloat16 --texts my-books --output runs/heads
  longmem eval recall model=runs/heads output=runs/heads-recall
  longmem heads runs/trained/side-network --keep 10 --texts my-books --output runs/ten-heads

Texts are named as for `longmem train`: a folder of .txt files, a .jsonl file, a dataset. The output opens like any model, and
`longmem train CONFIG model.backbone=runs/heads` trains it further. Settings behind MODEL are those of `HeadSettings`; with
--keep, MODEL is a trained one, and they are `memory_tokens`, `num_texts` and `recall_share` of `head_costs`.
"""


def add(commands: Any) -> None:
    """Add the command `heads`."""
    heads = add_command(commands, "heads", run, "find the heads that look back far, and let them alone read", EXAMPLES)
    heads.add_argument("model", type="name", metavar="MODEL", help="name of a model, of which the backbone is taken")
    common.add_device(heads)
    heads.add_argument("--texts", type="name", required=True, help="what to look at while reading: a source of texts")
    heads.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the model that is made")
    heads.add_argument(
        "--keep", type=int, metavar="N", help="leave a trained model the N heads without which it loses most"
    )
    heads.add_argument("settings", nargs="*", metavar="key=value", help="how to look, such as steps=120")


def run(arguments: argparse.Namespace) -> None:
    """Choose heads, save the model that reads by them, and say which they are.

    Raises:
        ValueError: a setting, the texts or the model do not fit, or the folder is there.
    """
    if arguments.output.exists():
        raise ValueError(f"`--output` must be a new folder, got {arguments.output}, which is there.")
    common.use_device(arguments.device)

    from longmem.settings import read_settings
    from longmem.training.fewer_heads import CostSettings, keep_heads
    from longmem.training.heads import HeadSettings, calibrate_heads

    console = common.console_for(arguments.json, quiet=arguments.quiet)
    if arguments.keep is None:
        settings = read_settings(HeadSettings, None, arguments.settings)
        model = calibrate_heads(arguments.model, arguments.texts, settings=settings, console=console)
    else:
        weighing = read_settings(CostSettings, None, arguments.settings)
        trained = common.open_named(arguments.model, arguments)
        model = keep_heads(trained, arguments.keep, arguments.texts, weighing, console)
    model.save_pretrained(arguments.output)
    layers, heads = model.config.memory_layers or [], model.config.memory_heads or []
    chosen = dict(zip(map(str, layers), heads, strict=True))
    named = ", ".join(f"{layer}.{head}" for layer, own in chosen.items() for head in own)
    sentence = f"{arguments.output}: {sum(map(len, heads))} key-value heads read, as layer.head: {named}."
    common.tell(arguments, {"output": str(arguments.output), "memory_heads": chosen}, sentence)
