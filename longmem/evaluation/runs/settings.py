"""Forwards to `longmem.evaluation.settings`, for evaluations that have not moved yet."""

from longmem.evaluation.settings import (
    Count,
    EvaluationSettings,
    Number,
    load_evaluation,
    open_evaluated,
    read_arguments,
)

__all__ = ["Count", "EvaluationSettings", "Number", "load_evaluation", "open_evaluated", "read_arguments"]
