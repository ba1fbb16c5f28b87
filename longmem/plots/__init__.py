"""Figures of evaluations, of training runs and of costs."""

from longmem.plots.accuracy import plot_accuracies, plot_evaluation, plot_finished, plot_runs, plot_summaries
from longmem.plots.banks import plot_staleness, plot_tuning
from longmem.plots.cost import plot_cost
from longmem.plots.perplexity import plot_distances, plot_perplexity, plot_ratios, plot_scores
from longmem.plots.style import require_matplotlib

__all__ = [
    "plot_accuracies",
    "plot_cost",
    "plot_distances",
    "plot_evaluation",
    "plot_finished",
    "plot_perplexity",
    "plot_ratios",
    "plot_runs",
    "plot_scores",
    "plot_staleness",
    "plot_summaries",
    "plot_tuning",
    "require_matplotlib",
]
