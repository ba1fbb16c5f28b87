"""What every evaluation needs to run: settings, a folder that a stopped run goes on with, tables."""

from longmem.evaluation.runs.accuracy import accuracy_rows, compare_accuracies
from longmem.evaluation.runs.folder import RunFolder, describe, digest, groups_of, spread
from longmem.evaluation.runs.settings import EvaluationSettings, load_evaluation, open_evaluated, read_arguments

__all__ = [
    "EvaluationSettings",
    "RunFolder",
    "accuracy_rows",
    "compare_accuracies",
    "describe",
    "digest",
    "groups_of",
    "load_evaluation",
    "open_evaluated",
    "read_arguments",
    "spread",
]
