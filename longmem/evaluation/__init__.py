"""Evaluation: the same tokens under several systems, and result folders that say where their numbers come from."""

from longmem.evaluation.intervals import bootstrap_interval, perplexity_ratio, ratio_of_means
from longmem.evaluation.perplexity.scoring import WindowScores, loss_difference, score_windows
from longmem.evaluation.perplexity.views import View, make_views
from longmem.evaluation.perplexity.windows import Cut, Window

__all__ = [
    "Cut",
    "View",
    "Window",
    "WindowScores",
    "bootstrap_interval",
    "loss_difference",
    "make_views",
    "perplexity_ratio",
    "ratio_of_means",
    "score_windows",
]
