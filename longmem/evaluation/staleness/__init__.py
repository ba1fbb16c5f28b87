"""Experiments on staleness: what happens to a memory, and to what reads it, when the writer moves."""

from longmem.evaluation.staleness.running import (
    evaluate_staleness,
    markdown,
    sections,
    summarize_staleness,
    title_of,
)
from longmem.evaluation.staleness.settings import StalenessSettings

__all__ = ["StalenessSettings", "evaluate_staleness", "markdown", "sections", "summarize_staleness", "title_of"]
