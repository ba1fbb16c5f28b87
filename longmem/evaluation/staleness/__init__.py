"""Experiments on staleness: what happens to a memory, and to what reads it, when the writer moves."""

from longmem.evaluation.staleness.policy_tables import markdown, sections, summarize_policies
from longmem.evaluation.staleness.running import evaluate_staleness
from longmem.evaluation.staleness.settings import StalenessSettings

__all__ = ["StalenessSettings", "evaluate_staleness", "markdown", "sections", "summarize_policies"]
