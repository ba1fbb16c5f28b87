"""The figures of any finished evaluation."""

from __future__ import annotations

from longmem.evaluation.runner import Finished
from longmem.plots.accuracy import plot_evaluation
from longmem.plots.perplexity import plot_perplexity


def plot_finished(finished: Finished) -> None:
    """Draw what an evaluation has found into its folder."""
    if "parts" in finished.metrics:  # of perplexities; what is right or wrong has measures
        plot_perplexity(finished.folder, finished.metrics, title=finished.title)
    else:
        plot_evaluation(finished.folder / "accuracy.png", finished.metrics, title=finished.title)
