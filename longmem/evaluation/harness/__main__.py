"""lm-eval's own command line, with the model `longmem` in it: `python -m longmem.evaluation.harness run --model longmem`."""

from longmem.evaluation.harness import LongMemLM  # noqa: F401  registers the model

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
