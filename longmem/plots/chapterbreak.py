"""The figure of accuracy against the length of the context."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from os import PathLike
from typing import Any

from longmem.evaluation.chapterbreak import BASELINES
from longmem.plots.style import STYLES, color_of, require_matplotlib

BASELINE_STYLES = dict(zip(BASELINES, (":", "--", "-."), strict=True))
BASELINE_COLOR = "#9a9a9a"


def plot_chapterbreak(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str) -> None:
    """Draw what every system gets right at each length of context, a line with its interval for each.

    Args:
        path: PNG to write.
        metrics: what `summarize_chapterbreak` returns.
        title: of the figure.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    comparisons = {int(length): each[metrics["scoring"]]["systems"] for length, each in metrics["contexts"].items()}
    longest = comparisons[max(comparisons)]
    names = [name for name in longest if name not in BASELINES]  # all systems are asked at the longest
    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        own = {length: systems[name] for length, systems in comparisons.items() if name in systems}
        # Side by side, so that no interval hides another.
        places = [length * 1.02 ** (number - (len(names) - 1) / 2) for length in own]
        values = [each["value"] for each in own.values()]
        beyond = [[abs(each["value"] - each["interval"][end]) for each in own.values()] for end in (0, 1)]
        axes.errorbar(
            places,
            values,
            yerr=beyond,
            fmt="o",
            linestyle=STYLES.get(name, "-"),
            color=color_of(name),
            markersize=5,
            capsize=3,
            linewidth=1.6,
            elinewidth=1,
            label=next(iter(own.values()))["title"],
        )
    for name, style in BASELINE_STYLES.items():
        axes.axhline(
            longest[name]["value"], color=BASELINE_COLOR, linestyle=style, linewidth=1.2, label=longest[name]["title"]
        )
    axes.axhline(metrics["chance"], color="black", linestyle=":", linewidth=1, label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(comparisons), [f"{length:,}" for length in comparisons])
    axes.minorticks_off()
    axes.set_xlabel("tokens of context before the chapter break")
    axes.set_ylabel("accuracy, %: mean and 95 % interval")
    axes.set_title(textwrap.fill(title, 80), fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
