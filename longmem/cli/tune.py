"""`longmem bank tune`: which index setting fits a bank and what its model asks of it."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longmem.cli import common
from longmem.cli.common import add_command, bank_folder, model_option
from longmem.cli.texts import read_text
from longmem.files import make_folder, write_file

if TYPE_CHECKING:
    from longmem.memory.index.tuning import Tuned

TUNE_EXAMPLES = """\
  longmem bank tune --bank memory --queries new.txt                      a table, and the setting to use
  longmem bank tune --bank memory --queries new.txt --output tuning      also as Markdown, JSON and figure
  longmem bank tune --bank memory --queries new.txt --recall 0.9 --apply

The keys are the bank's, the queries what its model asks while it reads the text. One setting serves all layers: the
first memory layer is measured unless you name another.
"""


def add(actions: Any) -> None:
    """Add `bank tune`."""
    parents = (bank_folder(on_cluster=False), model_option())
    tune = add_command(actions, "tune", run, "measure recall and speed of index settings", TUNE_EXAMPLES, *parents)
    tune.add_argument("--queries", type=Path, metavar="FILE", help="text to read; default: the bank's longest document")
    tune.add_argument("--layer", type=int, help="memory layer to measure; default: the first")
    tune.add_argument("--num-queries", type=int, default=1024, help="for each key-value head")
    tune.add_argument("--recall", type=float, default=0.95, help="share of the exact best that has to be found")
    tune.add_argument("--output", type=Path, metavar="DIR", help="folder for tuning.md, tuning.json and tuning.png")
    tune.add_argument("--apply", action="store_true", help="let the bank use the recommended setting")


def run(arguments: argparse.Namespace) -> None:
    """Measure index settings, recommend one and, if asked, put it into the bank."""
    from longmem.console import PlainTable
    from longmem.memory.index.tuning import recommended_index, tune
    from longmem.memory.memorize import to_token_ids
    from longmem.model.index_queries import recorded_queries
    from longmem.plots import require_matplotlib

    if arguments.num_queries < 1:
        raise ValueError(f"`--num-queries` must be at least 1, got {arguments.num_queries}.")
    if not 0 < arguments.recall <= 1:
        raise ValueError(f"`--recall` must be above 0 and at most 1, got {arguments.recall}.")
    if arguments.output is not None:  # before long work
        require_matplotlib()
    text = None if arguments.queries is None else read_text(arguments.queries)
    with common.open_bank(arguments.bank) as bank:  # says what is wrong with it before a model is opened
        # By default the first one, whose queries depend on nothing that was read before.
        layer = bank.memory_layers[0] if arguments.layer is None else arguments.layer
        if layer not in bank.memory_layers:
            raise ValueError(f"`--layer` must be a memory layer of the bank, one of {bank.memory_layers}, got {layer}.")
        if bank.is_empty:
            raise ValueError(f"`tune` needs a bank that holds chunks, {arguments.bank} holds none; memorize something.")
        own = None
        if text is None:  # the document of which most is resident, among those whose token ids are known
            known = [info for info in bank.documents() if bank.token_ids(info.document_id) is not None]
            if not known:
                raise ValueError("the bank knows no token ids of its documents; give a text with `--queries FILE`.")
            own = max(known, key=lambda info: info.num_chunks).document_id
    console = common.console_for(arguments.json, quiet=arguments.quiet)
    model_name, model = common.open_model_of(arguments)
    with common.open_bank(arguments.bank, model) as bank:
        asking = text if own is None else bank.token_ids(own)
        assert asking is not None
        token_ids = to_token_ids(model, asking)
        queries = recorded_queries(model, bank, token_ids, layer, num_queries=arguments.num_queries)
        num_chunks = model.config.num_retrieved_tokens // model.config.chunk_size
        source = str(arguments.queries) if own is None else own
        console.print(
            f"{bank.num_chunks:,} chunks of layer {layer}, {queries.shape[1]:,} queries for each of {queries.shape[0]} "
            f"heads, recall of the {num_chunks} best, milliseconds for 1,000 queries. The queries are what {model_name} asks "
            f"as it reads {source}."
        )
        size = bank.chunk_size if bank.by_token else None
        results = tune(bank.search_keys(layer), queries, num_chunks=num_chunks, chunk_size=size)
    if own is not None:
        print(
            "longmem: queries from stored text find themselves, so recall looks better than for new text; give a text "
            "that the bank does not hold with `--queries FILE`.",
            file=sys.stderr,
        )
    recommended = recommended_index(results, arguments.recall)
    console.print(PlainTable(rows := table_rows(results), emphasized=recommended))
    measured = {
        "layer": layer,
        "queries": source,
        "num_chunks": num_chunks,
        "results": [dataclasses.asdict(each) for each in results],
        "recommended": recommended,
    }
    if arguments.output is not None:
        write_files(arguments.output, measured, rows, results)
    if arguments.apply:
        with common.open_bank(arguments.bank, write=True) as bank:
            bank.use_index(recommended)
    if arguments.json:
        common.print_json({**measured, "applied": arguments.apply})
        return
    exact = not any(each.num_bytes for each in results)
    reason = "the bank is so small that all search exactly" if exact else f"recall of at least {arguments.recall:g}"
    end = "; the bank uses it now" if arguments.apply else ", or `--apply` for this bank"
    console.print(f'Recommended: index="{recommended}" ({reason}){end}.')


def table_rows(results: "list[Tuned]") -> list[list[str]]:
    """Return the rows of the table for people, its head first."""
    rows = [["index", "recall", "ms/1,000", "times exact", "build s", "MB"]]
    for each in results:
        numbers = (f"{each.recall:.3f}", f"{each.milliseconds:.2f}", f"{each.speed_ratio:.2f}")
        rows.append([each.index, *numbers, f"{each.build_seconds:.2f}", f"{each.num_bytes / 1e6:.1f}"])
    return rows


def write_files(folder: Path, measured: dict[str, object], rows: list[list[str]], results: "list[Tuned]") -> None:
    """Write table, numbers with the machine that they are from, and figure."""
    from longmem.evaluation.tables import markdown_table
    from longmem.plots import plot_tuning
    from longmem.settings.environment import environment

    make_folder(folder)
    write_file(folder / "tuning.md", markdown_table(rows) + "\n")
    content = json.dumps({**measured, "environment": environment()}, indent=2) + "\n"
    write_file(folder / "tuning.json", content)
    source = Path(str(measured["queries"])).name
    title = f"Index settings on the bank's keys of layer {measured['layer']}, queries from {source}"
    plot_tuning(folder / "tuning.png", results, title=title)
