"""Recall at a distance: one fact far back in a long memory, asked for at its end."""

from longmem.evaluation.distance.running import Evaluated, evaluate_distance
from longmem.evaluation.distance.settings import DistanceSettings
from longmem.evaluation.distance.tables import markdown, sections, summarize_distance

__all__ = ["DistanceSettings", "Evaluated", "evaluate_distance", "markdown", "sections", "summarize_distance"]
