"""The figure of what systems get right."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from os import PathLike
from typing import Any

from longmem.plots.style import color_of, draw_interval, require_matplotlib


def plot_accuracies(
    path: str | PathLike[str],
    panels: Mapping[str, Mapping[str, Any]],
    *,
    title: str,
    measure: str = "accuracy",
    chance: float | None = None,
) -> None:
    """Draw the accuracy of every system with its interval, a panel for each comparison.

    Args:
        path: PNG to write.
        panels: by name, what `compare_accuracies` returns.
        title: of the figure.
        measure: what is on the axis, in percent.
        chance: of guessing, in percent; None draws no line.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    most = max(len(panel["systems"]) for panel in panels.values())
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 + 4 * columns, 1.2 + rows * (1 + 0.5 * most)), layout="constrained")
    figure.suptitle(textwrap.fill(title, 40 + 40 * columns), fontsize=12)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    titles = [[values["title"] for values in panel["systems"].values()] for panel in panels.values()]
    same_titles = all(own == titles[0] for own in titles)
    for number, axes in enumerate(grid.flat):
        if number >= len(panels):
            axes.set_visible(False)
            continue
        name, panel = list(panels.items())[number]
        draw_systems(axes, panel["systems"], chance)
        axes.set_title(name, fontsize=10)
        if number % columns and same_titles:
            axes.tick_params(labelleft=False)
        if number + columns >= len(panels):  # nothing below it
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(f"{measure}, %: mean and 95 % interval")
    figure.savefig(path, dpi=130)


def plot_summaries(path: str | PathLike[str], summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the means and intervals of several runs, a panel for each with an axis of its own.

    Args:
        path: PNG to write.
        summaries: by title of the run, `measure`, perhaps `chance`, and `systems` with `title`, `value` and `interval`.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    columns = min(2, len(summaries))
    rows = -(-len(summaries) // columns)
    most = max(len(summary["systems"]) for summary in summaries.values())
    figure = Figure(figsize=(1 + 6 * columns, rows * (1.4 + 0.42 * most)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(summaries) :]:
        axes.set_visible(False)
    for axes, (title, summary) in zip(grid.flat, summaries.items(), strict=False):
        draw_systems(axes, summary["systems"], summary.get("chance"))
        axes.set_title(textwrap.fill(title, 50), fontsize=10)
        axes.set_xlabel(summary["measure"], fontsize=9)
    figure.savefig(path, dpi=130)


def draw_systems(axes: Any, systems: Mapping[str, Any], chance: float | None) -> None:
    """Draw a line for each system: its mean with the interval, and where guessing would be."""
    for place, (system, values) in enumerate(systems.items()):
        draw_interval(axes, place, values["value"], values["interval"], color_of(system), f"{values['value']:.1f}")
    if chance is not None:
        axes.axvline(chance, color="black", linestyle=":", linewidth=1, label="chance")
        axes.legend(fontsize=8, loc="lower right")
    axes.set_yticks(range(len(systems)), [values["title"] for values in systems.values()], fontsize=9)
    axes.set_ylim(len(systems) - 0.5, -0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
