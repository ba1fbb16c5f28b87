"""Evaluate with EleutherAI's lm-evaluation-harness: the backbone as its model `hf`, LongMem with memory off and on.

    python experiments/harness_data/make_harness_data.py quality LEval-data/quality.jsonl --output data/harness
    python eval/eval_harness.py data=data/harness output=results/harness limit=40
    python eval/eval_harness.py "tasks=[hellaswag, wikitext]" output=results/short

A context that fits the window is scored as lm-eval scores it. Of a longer one `backbone` and `off` see the end, `on` reads
the rest in a memory that holds nothing else. lm-eval's own command line has the model as well:
`python -m longmem.evaluation.harness run --model longmem --model_args pretrained=smollm2-135m,memory=on --tasks ...`.
"""

import sys

from longmem.cli.eval import run_script

if __name__ == "__main__":
    run_script("harness", sys.argv[1:], __doc__)
