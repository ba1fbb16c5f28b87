"""The model `longmem` for EleutherAI's lm-evaluation-harness (`lm_eval`); importing this package registers it.

    lm_eval.simple_evaluate("longmem", "pretrained=smollm2-135m,memory=on", tasks=["hellaswag"])

On the command line it is `lm_eval run --model longmem ...`, from the release of lm-eval on that reads entry points of others.
Before, as nothing else would import it, it is `python -m longmem.evaluation.harness run --model longmem ...`.
"""

try:
    import lm_eval  # noqa: F401
except ImportError as error:
    raise ImportError("the harness needs lm-eval, which is not installed; run `pip install lm-eval`.") from error

from longmem.evaluation.harness.model import LongMemLM

__all__ = ["LongMemLM"]
