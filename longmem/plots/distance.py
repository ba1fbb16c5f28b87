"""The heat map of recall: size of the memory against distance of the fact."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from longmem.plots.style import require_matplotlib


def plot_distance(
    path: str | PathLike[str],
    task: Mapping[str, Any],
    *,
    title: str,
    system: str = "on",
    xlabel: str = "tokens in memory",
) -> None:
    """Draw the accuracy of one system for every size and depth, and below it a line for each of the others.

    Args:
        path: PNG to write.
        task: one of `tasks` of `summarize_distance`.
        title: of the figure.
        system: that has the map; if it was left out, there are lines alone.
        xlabel: what the columns are.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    grid, systems = task["grid"], task["all"]["choice"]["systems"]
    columns = list(task["parts"])
    depths = sorted({depth for part in next(iter(grid.values())).values() for depth in part}, key=depth_in_numbers)
    maps = {name: [[grid[name][part].get(depth) for part in columns] for depth in depths] for name in grid}
    means = [[task["parts"][part]["choice"]["systems"][name]["value"] for part in columns] for name in systems]
    heights = [len(depths), len(systems)] if system in maps else [0.01, len(systems)]
    figure = Figure(figsize=(3.5 + 1.1 * len(columns), 2.4 + 0.5 * sum(heights)), layout="constrained")
    figure.suptitle(textwrap.fill(title, 34 + 10 * len(columns)), fontsize=11)
    above, below = figure.subplots(2, 1, height_ratios=heights)
    if system in maps:
        draw_map(above, maps[system], columns, depths)
        in_tokens = any(depth.endswith("tokens") for depth in depths)
        above.set_ylabel("distance" if in_tokens else "distance, share of memory", fontsize=9)
        above.set_title(systems[system]["title"], fontsize=10)
    else:
        above.set_visible(False)
    image = draw_map(below, means[::-1], columns, [values["title"] for values in systems.values()][::-1])
    below.set_title("all distances", fontsize=10)
    below.set_xlabel(xlabel, fontsize=9)
    bar = figure.colorbar(image, ax=[above, below] if system in maps else below, shrink=0.7)
    bar.set_label("accuracy, %", fontsize=9)
    bar.ax.axhline(task["chance"], color="black", linestyle=":")
    bar.ax.text(-0.15, task["chance"], "chance ", fontsize=8, ha="right", va="center")
    figure.savefig(path, dpi=130)


def draw_map(axes: Any, values: Sequence[Sequence[float | None]], columns: Sequence[str], rows: Sequence[str]) -> Any:
    """Draw percentages as colors with their numbers, the first row at the bottom, and return the image."""
    numbers = [[float("nan") if value is None else value for value in row] for row in values]
    image = axes.imshow(numbers, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=100)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                color = "white" if value < 60 else "black"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    return image


def depth_in_numbers(depth: str) -> float:
    """Return what to sort depths by.

    >>> sorted(["1", "0.25", "0"], key=depth_in_numbers), depth_in_numbers("4096 tokens")
    (['0', '0.25', '1'], 4096.0)
    """
    return float(depth.partition(" ")[0])
