"""Make the data of the tasks in longmem/evaluation/configs/harness_tasks from files of the published sets.

    make="python experiments/harness_data/make_harness_data.py --output data/harness"
    $make quality LEval-data/quality.jsonl
    $make babi qa1_single-supporting-fact_test.txt
    $make babi qa1_single-supporting-fact_test.txt --filler book.txt --filler-words 3000
    $make babilong_qa1 qa1_single-supporting-fact_test.txt --filler book.txt --filler-words 3000

QuALITY as in L-Eval (github.com/OpenLMLab/LEval), bAbI as in Facebook's tasks_1-20_v1-2/en. A filler is spread between the
sentences of each story, so that it no longer fits the window. `babilong_qa1` to `babilong_qa20` are
lm-eval's tasks of that name, asked about such stories and not about BABILong's own.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, which is not installed

from experiments.harness_data.data import BABILONG, as_babilong, babi_items, quality_items, write_items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("quality", "babi", *BABILONG))
    parser.add_argument("source", type=Path, help="file of the published set")
    parser.add_argument("--filler", type=Path, help="text to spread between the sentences of bAbI")
    parser.add_argument("--filler-words", type=int, default=0, help="words of it for each question")
    parser.add_argument("--output", type=Path, required=True, help="folder for TASK.jsonl")
    arguments = parser.parse_args()
    filler = "" if arguments.filler is None else arguments.filler.read_text(encoding="utf-8")
    if arguments.task == "quality":
        items = quality_items(arguments.source)
    else:
        items = babi_items(arguments.source, filler, arguments.filler_words)
        items = map(as_babilong, items) if arguments.task in BABILONG else items
    path = arguments.output / f"{arguments.task}.jsonl"
    print(f"{path}: {write_items(path, items):,} items")


if __name__ == "__main__":
    main()
