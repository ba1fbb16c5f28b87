"""The figure of index settings."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from os import PathLike

from longmem.memory.index.tuning import Tuned
from longmem.plots.style import new_figure, tidy

INDEX_COLORS = {"auto": "#1f6fb4", "ivf": "#2a9d8f", "hnsw": "#d98c21", "pq": "#b5455f"}


def plot_tuning(path: str | PathLike[str], results: Sequence[Tuned], *, title: str) -> None:
    """Draw the recall of index settings against their latency, a color for each kind: up and to the left is better."""
    figure = new_figure((9, 5.5), textwrap.fill(title, 90))
    axes = figure.add_subplot()
    kinds = dict.fromkeys(result.index.partition(":")[0] for result in results)
    for kind in kinds:
        own = [each for each in results if each.index.partition(":")[0] == kind]
        color = INDEX_COLORS.get(kind, "#767676")
        axes.plot([each.milliseconds for each in own], [each.recall for each in own], "o", color=color, label=kind)
        for each in own:
            note = each.index.partition(":")[2].replace(",", "\n") or "default"
            place = (each.milliseconds, each.recall)
            axes.annotate(note, place, xytext=(6, -3), textcoords="offset points", fontsize=7, va="top", color=color)
    exact = [each.milliseconds * each.speed_ratio for each in results]
    if exact:
        axes.axvline(sum(exact) / len(exact), color="black", linestyle=":", linewidth=1, label="exact search")
    axes.margins(x=0.1, y=0.15)  # room for the notes
    axes.set(xscale="log", xlabel="milliseconds per 1,000 queries", ylabel="recall against exact search")
    axes.legend(fontsize=9, loc="lower right")
    tidy(axes, "both")
    figure.savefig(path, dpi=130)
