"""`longmem bank find`: the passages of a bank that have to do with a text, by a model's heads and by words."""

import argparse
from typing import TYPE_CHECKING, Any

from longmem.cli import common
from longmem.cli.common import add_command, bank_folder, model_option, option

if TYPE_CHECKING:
    from longmem.memory.finding import FoundPassage

EXAMPLES = """\
  longmem bank find "What is my locker code?" --bank memory
  longmem bank find "locker code" --bank memory --by words          no model is opened; texts alone are searched
  longmem bank find "the white whale" --bank memory --tag novel --count 3 --json

By heads: what the model would read for this text, by how much it stands out. By words: BM25.
"""


def add(actions: Any) -> None:
    """Add the action `find`."""
    by_tag = option("--tag", action="append", default=[], help="only documents with one of these tags")
    parents, summary = (bank_folder(), by_tag, model_option()), "find the passages that a text has to do with"
    command = add_command(actions, "find", run, summary, EXAMPLES, *parents)
    command.add_argument("text", help="a question, or any text")
    command.add_argument("--by", choices=("both", "heads", "words"), default="both", help="who finds")
    command.add_argument("--count", type=int, default=5, help="passages")


def run(arguments: argparse.Namespace) -> None:
    """Print the passages, the best first."""
    if arguments.by == "words" and arguments.model is not None:
        raise ValueError(f"`--model` must be left out with `--by words`, which opens none, got {arguments.model!r}.")
    with common.open_bank(arguments.bank) as bank:
        memory = bank.select(tags=arguments.tag) if arguments.tag else bank
        # Words are asked first: what is wrong with the text is told before a model is opened.
        found = {} if arguments.by == "heads" else {"words": memory.find(arguments.text, k=arguments.count)}
    if arguments.by != "words":
        _, model = common.open_model_of(arguments)
        with common.open_bank(arguments.bank, model) as bank:
            memory = bank.select(tags=arguments.tag) if arguments.tag else bank
            found = {"heads": memory.find(arguments.text, model, arguments.count)} | found
    if arguments.json:
        common.print_json({name: [passage._asdict() for passage in passages] for name, passages in found.items()})
        return
    console = common.console_for(False)
    for name, passages in found.items():
        console.print(f"by {name}:" if passages else f"by {name}: nothing")
        for passage in passages:
            console.print(f"  {passage.score:8.3g}  {_line(passage)}")


def _line(passage: "FoundPassage") -> str:
    text = passage.text.replace("\n", "\\n")
    return f"{passage.document_id}, tokens {passage.start:,} to {passage.stop:,}: …{text}…"
