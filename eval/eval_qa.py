"""Evaluate memory on questions about long documents (quality, multiple choice) and conversations (locomo, written answers).

    python eval/eval_qa.py quality data=quality.jsonl output=results/quality limit=40
    python eval/eval_qa.py quality data=QuALITY.v1.0.1.htmlstripped.dev style=letter output=results/letters
    python eval/eval_qa.py locomo data=locomo10.json output=results/locomo "systems=[backbone,bm25,on]"

The end of a document stands in the window, the rest is in memory (LongMem), searched for passages (bm25, hidden) or cut
off (backbone). Intervals are over documents. A stopped run goes on with the same command.
For a system of your own see `longmem.evaluation.tasks.reading.answer_documents`.
"""

import sys

from longmem.cli.eval import run_script

if __name__ == "__main__":
    task, *overrides = sys.argv[1:] or ["--help"]
    run_script(task, overrides, __doc__)
