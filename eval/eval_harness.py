"""Evaluate with EleutherAI's lm-evaluation-harness: the backbone as its model `hf`, LongMem with memory off and on.

    python experiments/harness_data/make_harness_data.py quality LEval-data/quality.jsonl --output data/harness
    python eval/eval_harness.py data=data/harness output=results/harness limit=40
    python eval/eval_harness.py "tasks=[hellaswag, wikitext]" output=results/short

A context that fits the window is scored as lm-eval scores it. Of a longer one `backbone` and `off` see the end, `on` reads
the rest in a memory that holds nothing else. lm-eval's own command line has the model as well:
`python -m longmem.evaluation.harness run --model longmem --model_args pretrained=smollm2-135m,memory=on --tasks ...`.
"""

import sys

from longmem.evaluation import run_task
from longmem.plots import plot_finished, require_matplotlib

if __name__ == "__main__":
    require_matplotlib()
    try:
        finished = run_task("harness", sys.argv[1:])
    except ValueError as error:
        raise SystemExit(f"{error}\n{__doc__}") from error
    plot_finished(finished)
