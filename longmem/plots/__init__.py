"""Figures of evaluations and of training runs."""

from longmem.plots.accuracy import plot_accuracies, plot_summaries
from longmem.plots.books import plot_books, plot_scores
from longmem.plots.distance import plot_distance
from longmem.plots.documents import plot_distances, plot_documents
from longmem.plots.policies import plot_experiment
from longmem.plots.stale_texts import plot_stale_texts
from longmem.plots.staleness import plot_staleness
from longmem.plots.style import require_matplotlib
from longmem.plots.tuning import plot_tuning

__all__ = [
    "plot_accuracies",
    "plot_books",
    "plot_distance",
    "plot_distances",
    "plot_documents",
    "plot_experiment",
    "plot_scores",
    "plot_stale_texts",
    "plot_staleness",
    "plot_summaries",
    "plot_tuning",
    "require_matplotlib",
]
