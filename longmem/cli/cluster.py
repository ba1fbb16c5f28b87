"""`longmem cluster`: start, stop and look at banks whose shards are on the nodes of a Ray cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longmem.cli import common
from longmem.cli.common import DEFAULT_MODEL, POLICIES, add_command, add_group, option

EXAMPLES = """\
  ray start --head                                                   on the first machine; it prints what the others run
  longmem cluster start notes --folder /shared/notes --shards 3      three shards, spread over the nodes
  longmem memorize corpus --bank ray://notes                         encoded by workers on all nodes
  longmem generate --bank ray://notes --prompt "The white whale"
  longmem cluster stop notes                                         the folders stay

Each node must see the folders under the same path, so that a shard can be started again on another one. Whoever can reach the
ports of a Ray cluster can run programs on it: docs/scaling.md says how to close it.
"""


def add(commands: Any) -> None:
    """Add the group `cluster` and its actions."""
    actions = add_group(commands, "cluster", "banks on several machines, through Ray", EXAMPLES)
    name = argparse.ArgumentParser(add_help=False)
    name.add_argument("name", metavar="NAME", help="of the bank: others open it as ray://NAME")
    model = option("--model", help=f"that writes the bank, if it is new; default: {DEFAULT_MODEL}")
    started = add_command(actions, "start", start, "start the shards of a bank", EXAMPLES, name, model)
    started.add_argument(
        "--folder", required=True, type=common.folder_alone, metavar="DIR", help="that holds, or will hold, the shards"
    )
    started.add_argument("--shards", type=int, metavar="N", help="of a new bank; placement depends on it, so it stays")
    started.add_argument("--cpus", type=float, default=1, metavar="N", help="that a shard takes of its node")
    started.add_argument("--refresh", metavar="POLICY", help=f"of a new bank: {POLICIES}; default: frozen")
    started.add_argument("--storage-dtype", metavar="DTYPE", help="of a new bank: float16, bfloat16, float32 or int8")
    add_command(actions, "stop", stop, "end the shards of a bank; what they hold stays in their folders", "", name)


def start(arguments: argparse.Namespace) -> None:
    """Start a bank, after it was made if need be."""
    from longmem.cluster import ClusterBank
    from longmem.cluster.engine import join

    of_new = [name for name in ("model", "refresh", "storage_dtype") if vars(arguments)[name] is not None]
    if of_new and arguments.shards is None:
        raise ValueError(
            f"`--{of_new[0].replace('_', '-')}` must come with `--shards`, for it is of a new bank; leave it out."
        )
    join()
    if arguments.shards is not None:
        options = {name: vars(arguments)[name] for name in ("refresh", "storage_dtype") if vars(arguments)[name]}
        name = arguments.model or DEFAULT_MODEL
        arguments.device = "cpu"
        for folder in ClusterBank.create(
            arguments.folder, arguments.shards, common.open_named(name, arguments), **options
        ):
            common.remember_model(Path(folder), name)
    bank = ClusterBank.start(arguments.name, arguments.folder, actor_options={"num_cpus": arguments.cpus})
    told = {
        "bank": f"ray://{arguments.name}",
        "shards": [each["folder"] for each in bank._told],
        "tokens": bank.num_tokens,
    }
    sentence = f"ray://{arguments.name}: {len(bank.shards)} shards, {bank.num_tokens:,} tokens."
    common.tell(arguments, told, sentence)


def stop(arguments: argparse.Namespace) -> None:
    """End the shards of a bank."""
    from longmem.cluster import engine

    engine.stop(engine.name_of(arguments.name))
    common.tell(arguments, {"stopped": arguments.name}, f"ray://{arguments.name}: stopped.")
