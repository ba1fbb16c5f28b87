"""Evaluate memory on books: the first tokens of each are memorized, the windows that follow are scored by four systems.

    python eval/eval_perplexity.py emma.txt middlemarch.txt --memory-tokens 8192 --windows 8 --output results/books
    python eval/eval_perplexity.py *.txt --model my-longmem --stride 128 --grow --output results/strided
    python eval/eval_perplexity.py *.txt --output results/chunks chunk_size=8 num_retrieved_tokens=128

The wrong memory of a book is the next book's; that of a single book, Python's manual. Intervals of a book are over its
windows, those of the total over books. With a stride windows overlap, and memory starts where the first of them does.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from longmem import LongMemForCausalLM, MemoryBank
from longmem.commands.opening import console_for, open_model, parse_settings, read_text
from longmem.console import plain_table, token_progress
from longmem.evaluation.perplexity import compare_systems, pooled
from longmem.evaluation.results import TITLES, summarize, table_rows, write_results
from longmem.plots import plot_scores
from longmem.sample_texts import first_tokens, python_manual


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", nargs="+", help="text files, and settings of LongMemConfig as key=value")
    parser.add_argument("--model", default="smollm2-135m", help="backbone, or folder of a saved LongMem model")
    parser.add_argument("--memory-tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512, help="tokens the model sees at once")
    parser.add_argument("--stride", type=int, help="score the last so many tokens of each window")
    parser.add_argument("--grow", action="store_true", help="what leaves the window goes into the right memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder for config, losses, metrics, table, figures")
    return parser.parse_intermixed_args()


def memorize(model: LongMemForCausalLM, name: str, past: Tensor, room: int) -> MemoryBank:
    capacity = -(-(len(past) + room) // model.config.chunk_size) * model.config.chunk_size
    bank = MemoryBank.for_model(model, capacity_tokens=capacity)
    model.memorize(bank, past, name)
    return bank


def main() -> None:
    arguments = parse_arguments()
    console = console_for(as_json=False)
    torch.manual_seed(arguments.seed)
    files = [Path(name) for name in arguments.books if "=" not in name]
    settings = parse_settings([name for name in arguments.books if "=" in name])
    model = open_model(arguments.model, **settings)
    stride = arguments.stride or arguments.window
    scored = (arguments.windows - 1) * stride + arguments.window
    texts = {file.stem: read_text(file) for file in files}
    split = {
        name: first_tokens(model.tokenizer, text, name, arguments.memory_tokens, scored) for name, text in texts.items()
    }
    others = split
    if len(split) == 1:
        others = {"manual": first_tokens(model.tokenizer, python_manual(), "manual", arguments.memory_tokens, 0)}
    scores = {}
    bank = memorize(model, files[0].stem, split[files[0].stem][0], scored)
    for number, (name, (past, rest)) in enumerate(split.items(), start=1):
        wrong_name = list(others)[number % len(others)]
        wrong = memorize(model, wrong_name, others[wrong_name][0], scored)
        with token_progress(name, console) as report:
            scores[name] = compare_systems(
                model,
                rest,
                memory=bank,
                wrong_memory=wrong,
                window=arguments.window,
                stride=arguments.stride,
                grow=name if arguments.grow else None,
                progress=lambda system, done, total: report(list(TITLES).index(system) * total + done, 4 * total),
            )
        console.print(plain_table(table_rows(summarize(scores[name], arguments.seed)), emphasized=TITLES["on"]))
        arguments.output.mkdir(parents=True, exist_ok=True)
        plot_scores(
            arguments.output / f"{name}.png",
            scores[name],
            title=f"{arguments.model} reading {name}, {len(past):,} tokens in memory",
            first_token=len(past),
            window=arguments.window,
            stride=arguments.stride,
            reading_layers=bank.memory_layers,
        )
        bank = wrong
    total = summarize(pooled(list(scores.values())), arguments.seed)
    console.print(f"\n[bold]{len(scores)} books, intervals over books[/]")
    console.print(plain_table(table_rows(total), emphasized=TITLES["on"]))
    metrics = {"total": total, "books": {name: summarize(group, arguments.seed) for name, group in scores.items()}}
    config = {"run": vars(arguments), "model": model.config.to_dict()}
    write_results(arguments.output, config=config, scores=scores, metrics=metrics, summary=total, seed=arguments.seed)


if __name__ == "__main__":
    main()
