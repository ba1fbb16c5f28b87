"""The figure of the policy table: what each refresh policy recovers against what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from longmem.plots.style import require_matplotlib

LOWEST = -0.5  # what loses more than this is drawn at the bottom, with its number
# Color and marker of each kind of policy, by how the names of its systems begin.
FAMILIES = {
    "never": ("#767676", "s"),
    "eager": ("#1f6fb4", "*"),
    "bounded": ("#1f6fb4", "s"),
    "lazy": ("#5a8f4e", "o"),
    "sweep": ("#d98c21", "D"),
    "affine": ("#7a5aa6", "^"),
    "procrustes": ("#b5455f", "v"),
    "mask": ("#333333", "X"),
    "stale-weight": ("#333333", "P"),
    "fresh": ("#1f6fb4", "x"),
}


def plot_policies(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str) -> None:
    """Draw recovered loss against cost, a panel for each regime and way of asking, systems by number.

    Args:
        path: PNG to write.
        metrics: of `summarize_policies`.
        title: of the figure.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    tables = list(metrics["tables"].values())
    columns = min(2, len(tables))
    rows = -(-len(tables) // columns)
    figure = Figure(figsize=(3.2 + 4.2 * columns, 1 + 3.6 * rows), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for number, (axes, table) in enumerate(zip(grid.flat, tables, strict=False)):
        draw_panel(axes, table["systems"])
        axes.set_title(table["title"], fontsize=10)
        if number % columns == 0:
            axes.set_ylabel("recovered: 0 is never, 1 is eager", fontsize=9)
        if number + columns >= len(tables):
            axes.set_xlabel("cost: tokens encoded again, 1 is all", fontsize=9)
    for axes in list(grid.flat)[len(tables) :]:
        axes.set_visible(False)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def draw_panel(axes: Any, systems: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw each system as a point with its intervals over seeds, and its number beside it."""
    axes.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes.axhline(1, color="#cccccc", linewidth=0.8, zorder=0)
    for number, (name, values) in enumerate(systems.items(), start=1):
        color, marker = family(name)
        label = f"{number} {values['title']}"
        if values["recovered"] is None or values["cost"] is None:
            axes.plot([], [], marker, color=color, label=label)
            continue
        recovered, low, high = values["recovered"]
        cost, cheapest, dearest = values["cost"]
        shown = max(recovered, LOWEST)
        axes.plot([cheapest, dearest], [shown, shown], "-", color=color, linewidth=1)
        axes.plot([cost, cost], [max(low, LOWEST), max(high, LOWEST)], "-", color=color, linewidth=1)
        axes.plot([cost], [shown], marker, color=color, markersize=7, label=label)
        text = f"{number}" if recovered >= LOWEST else f"{number}: {recovered:.1f}"
        axes.annotate(text, (cost, shown), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("symlog", linthresh=0.04)  # from 0 on: what costs nothing has its place
    axes.set_xlim(-0.008, 1.6)
    axes.set_xticks([0, 0.05, 0.1, 0.2, 0.5, 1], ["0", "0.05", "0.1", "0.2", "0.5", "1"], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_ylim(LOWEST - 0.1, 1.25)


def family(name: str) -> tuple[str, str]:
    """Return color and marker of a system, of the longest name of a kind that its own begins with.

    >>> family("lazy-sweep") == FAMILIES["lazy"]
    True
    """
    return FAMILIES[max((kind for kind in FAMILIES if name.startswith(kind)), key=len)]
