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

from longmem.cli.eval import run_script

if __name__ == "__main__":
    task, *overrides = sys.argv[1:] or ["--help"]
    run_script(task, overrides, __doc__)
