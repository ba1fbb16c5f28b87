"""Evaluate recall of one fact far back in a long memory (recall), or in LongEval's records of lines and topics (longeval).

    python eval/eval_recall.py recall output=results/recall
    python eval/eval_recall.py recall output=results/far haystack=my-books storage_dtype=int8 \\
        "sizes=[65536, 262144, 1048576]" bank_folder=results/far-bank "systems=[backbone, off, on, wrong]"
    python eval/eval_recall.py longeval data=LongEval output=results/longeval limit=40

All are asked the same: the backbone with the question alone, or with the end of the text in a longer window; with passages by
BM25; LongMem with memory off, on, and wrong (the text without any fact, another record). A stopped run goes on with the same
command.
"""

import sys

from longmem.evaluation import run_task
from longmem.plots import plot_finished, require_matplotlib

if __name__ == "__main__":
    require_matplotlib()
    name, *overrides = sys.argv[1:] or ["--help"]
    try:
        finished = run_task(name, overrides)
    except ValueError as error:
        raise SystemExit(f"{error}\n{__doc__}") from error
    plot_finished(finished)
