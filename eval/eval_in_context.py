"""Evaluate in-context learning: labels of texts (in-context) or answers about passages (squad), after demonstrations.

    python eval/eval_in_context.py in-context data=icl/original output=results/in-context
    python eval/eval_in_context.py in-context data=icl/original output=results/sst-2 "sets=[sst-2]" "seeds=[1]" limit=100
    python eval/eval_in_context.py squad data=dev-v1.1.json output=results/squad limit=100

Some demonstrations stand in the window, the others are in memory (LongMem), searched for the most alike (bm25, hidden) or
left out (backbone). A stopped run goes on with the same command.
"""

import sys

from longmem.cli.eval import run_script

if __name__ == "__main__":
    task, *overrides = sys.argv[1:] or ["--help"]
    run_script(task, overrides, __doc__)
