"""Forwards to `longmem.evaluation.folder`, for evaluations that have not moved yet."""

from longmem.evaluation.folder import RunFolder, claim_folder, describe, describe_model, digest, spread, weights_digest
from longmem.evaluation.runs.old import groups_of, timed

__all__ = [
    "RunFolder",
    "claim_folder",
    "describe",
    "describe_model",
    "digest",
    "groups_of",
    "spread",
    "timed",
    "weights_digest",
]
