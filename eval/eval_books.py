"""Evaluate memory on books: the first tokens of each are memorized, the windows that follow are scored by all systems.

    python eval/eval_books.py emma.txt middlemarch.txt --memory-tokens 8192 --windows 8 --output results/books
    python eval/eval_books.py *.txt --model my-longmem --cut 512/512 1024/512 --grow \\
        --context 2048 4096 8192 --context-windows 4 --dtype bfloat16 --output results/both-cuts
    python eval/eval_books.py chunk_size=8 --books-from books/manifest.json --split test --output results/chunks

Systems, all on the same tokens: the backbone; LongMem with memory off, on, and wrong (the next book's; that of a single
book, Python's manual); and with --context the backbone with so many tokens in its window. Intervals are over books.

A finished book is kept in OUTPUT/books. Started again with the same options, a stopped run goes on with the others; with
other options, model or texts the folder is refused.
"""

import argparse
from pathlib import Path

from longmem.cli.common import console_for, parse_settings
from longmem.console import plain_table
from longmem.evaluation.book_plan import BookPlan, Cut, files_of_split, read_books, wrong_books
from longmem.evaluation.book_tables import markdown, sections, summarize_books
from longmem.evaluation.books import evaluate_books
from longmem.evaluation.perplexity import SYSTEMS
from longmem.evaluation.results import TITLES, write_metrics
from longmem.model.opening import open_model
from longmem.plots import plot_books, plot_scores, require_matplotlib


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", nargs="*", help="text files, and settings of LongMemConfig as key=value")
    parser.add_argument("--books-from", type=Path, help='JSON list of {"file": ..., "split": ...}; files lie beside it')
    parser.add_argument("--split", default="test", help="which files of --books-from")
    parser.add_argument("--model", default="smollm2-135m", help="backbone, or folder of a saved LongMem model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of backbone and side network")
    parser.add_argument("--memory-tokens", type=int, default=8192, help="tokens in memory at least")
    parser.add_argument("--windows", type=int, default=8, help="windows of each book and cut")
    parser.add_argument("--cut", nargs="+", default=["512/512"], help="window/stride; the last `stride` are scored")
    parser.add_argument("--context", type=int, nargs="+", default=[], help="tokens in the backbone's longer windows")
    parser.add_argument("--context-windows", type=int, help="score these on the first so many windows of each book")
    parser.add_argument("--grow", action="store_true", help="what leaves the window goes into the right memory")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals")
    parser.add_argument("--output", type=Path, required=True, help="folder for config, losses, metrics, table, figures")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    require_matplotlib()
    console = console_for(as_json=False, markup=True)
    files = [Path(name) for name in arguments.books if "=" not in name]
    if arguments.books_from is not None:
        files += files_of_split(arguments.books_from, arguments.split)
    plan = BookPlan(
        cuts=tuple(Cut.parse(cut) for cut in arguments.cut),
        memory_tokens=arguments.memory_tokens,
        windows=arguments.windows,
        contexts=tuple(arguments.context),
        context_windows=arguments.context_windows,
        grow=arguments.grow,
    )
    settings = parse_settings([name for name in arguments.books if "=" in name])
    model = open_model(arguments.model, dtype=arguments.dtype, **settings)
    books = read_books(model.tokenizer, files, plan)
    wrong = wrong_books(model.tokenizer, books, plan)
    scores = {}
    for name, found in evaluate_books(model, books, wrong, plan, arguments.output, console):
        scores[name] = found
        for cut in plan.cuts:
            plot_scores(
                arguments.output / "books" / f"{name}-{cut.window}-{cut.stride}.png",
                {system: found.cuts[str(cut)][system] for system in SYSTEMS},
                title=f"{arguments.model} reading {name}, {plan.memorized(cut):,} tokens in memory",
                first_token=plan.memorized(cut),
                window=cut.window,
                stride=cut.stride,
                reading_layers=model.config.memory_layers,
            )
    metrics = summarize_books(scores, plan, arguments.seed)
    for heading, systems, comparisons in sections(metrics):
        console.print(
            f"\n[bold]{heading}[/]\n", plain_table(systems, emphasized=TITLES["on"]), plain_table(comparisons)
        )
    write_metrics(arguments.output, metrics=metrics, table=markdown(metrics), seed=arguments.seed)
    plot_books(
        arguments.output / "perplexity.png", metrics, title=f"{arguments.model}: perplexity on {len(books)} books"
    )


if __name__ == "__main__":
    main()
