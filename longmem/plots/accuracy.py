"""The figure of an evaluation: what systems get right, as bars or, along an axis of numbers, as lines."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from longmem.plots.style import STYLES, color_of, draw_interval, require_matplotlib, short_count

BASELINE_COLOR, BASELINE_STYLES = "#9a9a9a", (":", "--", "-.")


def plot_evaluation(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str) -> None:
    """Draw the main figures of any evaluation with their intervals, a panel for each panel of its tables.

    Where results have an axis of numbers there is a line for each system, otherwise a bar for what is counted in percent; where
    nothing is, no figure. Where they have details, a second
    figure, whose name ends with "-map", shows them for the system `on` (`plot_maps`).

    Args:
        path: PNG to write.
        metrics: of `metrics.json`.
        title: of the figure.
    """
    measures = list(metrics["measures"].values())
    axes = {axis["kind"]: axis for axis in metrics["axes"]}
    panels = [str(value) for value in axes["panel"]["values"]] if "panel" in axes else [""]
    column = axes.get("column")
    if "detail" in axes and "on" in metrics["systems"]:
        plot_maps(Path(path).with_stem(f"{Path(path).stem}-map"), metrics, title=title)
    if column is not None and all(isinstance(value, int | float) for value in column["values"]):
        own = {panel: _cells_along(measures, panel, column["values"]) for panel in panels}
        plot_lines(path, own, metrics["baselines"], title=title, xlabel=column["title"])
        return
    measures = [each for each in measures if each["unit"] == "%"]
    found: dict[str, Mapping[str, Any]] = {}
    if column is not None or "panel" in axes:
        for panel in panels:
            for value in ["", *(str(value) for value in (column or {"values": ()})["values"])]:
                _, measure, cell = _cell_of(measures, _key(panel, value) or "all")
                if cell is not None:
                    found[f"{panel} {value}".strip() or "all"] = {**cell, "measure": measure}
    else:
        found = {each["title"]: each["cells"]["all"] for each in measures}
    if not found:
        return
    names = {panel.get("measure", measures[0]["title"]) for panel in found.values()}
    if len(names) > 1:
        found = {f"{name}: {panel['measure']}": panel for name, panel in found.items()}
    chances = {panel.get("chance") for panel in found.values()}
    plot_accuracies(
        path,
        found,
        title=title,
        measure=names.pop() if len(names) == 1 else "score",
        chance=chances.pop() if len(chances) == 1 else None,
    )


def _cell_of(measures: Sequence[Mapping[str, Any]], key: str) -> tuple[str, str, Mapping[str, Any] | None]:
    """Return unit, title and cell of the first measure that has it."""
    for measure in measures:
        if key in measure["cells"]:
            return measure["unit"], measure["title"], measure["cells"][key]
    return "", "", None


def _cells_along(measures: Sequence[Mapping[str, Any]], panel: str, values: Sequence[float]) -> dict[float, Any]:
    """Return the cells of a panel by their place on the axis."""
    found = {value: _cell_of(measures, _key(panel, value)) for value in values}
    return {value: {"unit": unit, "measure": title, **cell} for value, (unit, title, cell) in found.items() if cell}


def plot_maps(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str, system: str = "on") -> None:
    """Draw one system's main measure as a map for each panel: the column axis to the right, details upwards.

    Args:
        path: PNG to write.
        metrics: of `metrics.json`, in percent.
        title: of the figure.
        system: whose map it is.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    axes = {axis["kind"]: axis for axis in metrics["axes"]}
    measure = next(iter(metrics["measures"].values()))
    cells, details = measure["cells"], [str(value) for value in axes["detail"]["values"]]
    panels = [str(value) for value in axes["panel"]["values"]] if "panel" in axes else [""]
    columns = {
        panel: [place for value in axes["column"]["values"] if (place := _key(panel, value)) in cells]
        for panel in panels
    }
    width = 2 + sum(1 + 1.1 * len(own) for own in columns.values())
    figure = Figure(figsize=(width, 2.4 + 0.5 * len(details)), layout="constrained")
    figure.suptitle(textwrap.fill(f"{title}: {metrics['systems'][system]}", int(9 * width)), fontsize=11)
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=list(map(len, columns.values())))[0]
    for own, (panel, places) in zip(grid, columns.items(), strict=True):
        found = [[cells.get(_key(place, detail)) for place in places] for detail in details]
        values = [[None if cell is None else cell["systems"][system]["value"] for cell in row] for row in found]
        image = draw_map(own, values, [place.removeprefix(f"{panel}, ") for place in places], details)
        own.set_title(panel, fontsize=10)
        own.set_xlabel(axes["column"]["title"], fontsize=9)
    grid[0].set_ylabel(axes["detail"]["title"], fontsize=9)
    bar = figure.colorbar(image, ax=list(grid), shrink=0.8)
    bar.set_label(f"{measure['title']}, {measure['unit']}", fontsize=9)
    if "chance" in metrics["summary"]:
        bar.ax.axhline(metrics["summary"]["chance"], color="black", linestyle=":")
    figure.savefig(path, dpi=130)


def _key(*values: Any) -> str:
    """Return the name of a cell: values of axes, those that there are."""
    return ", ".join(filter(None, map(str, values)))


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


def plot_lines(
    path: str | PathLike[str],
    panels: Mapping[str, Mapping[float, Any]],
    baselines: Sequence[str],
    *,
    title: str,
    xlabel: str,
) -> None:
    """Draw a line with its intervals for each system, and a level one for each baseline, which needs no model.

    Args:
        path: PNG to write.
        panels: by name, and by place on the axis, comparisons with `measure` and `unit`.
        baselines: systems that are level lines.
        title: of the figure.
        xlabel: what is on the axis.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.7 + 5.8 * len(panels), 4.8), layout="constrained")
    figure.suptitle(textwrap.fill(title, 60 * len(panels)), fontsize=11)
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (name, cells) in zip(grid.flat, panels.items(), strict=True):
        draw_lines(axes, cells, baselines)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(xlabel)
        unit = next(iter(cells.values()))
        axes.set_ylabel(f"{unit['measure']}, {unit['unit']}: mean and 95 % interval")
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def draw_lines(axes: Any, cells: Mapping[float, Any], baselines: Sequence[str]) -> None:
    """Draw comparisons along an axis."""
    last = cells[max(cells)]
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["systems"] if name not in baselines))
    for number, name in enumerate(names):
        own = {place: cell["systems"][name] for place, cell in cells.items() if name in cell["systems"]}
        values = [each["value"] for each in own.values()]
        axes.errorbar(
            [
                place * 1.02 ** (number - (len(names) - 1) / 2) for place in own
            ],  # side by side: no interval hides another
            values,
            yerr=[[abs(each["value"] - each["interval"][end]) for each in own.values()] for end in (0, 1)],
            fmt="o",
            linestyle=STYLES.get(name, "-"),
            color=color_of(name),
            markersize=5,
            capsize=3,
            linewidth=1.6,
            elinewidth=1,
            label=next(iter(own.values()))["title"],
        )
    for name, style in zip(baselines, BASELINE_STYLES, strict=False):
        if name in last["systems"]:
            level = last["systems"][name]
            axes.axhline(level["value"], color=BASELINE_COLOR, linestyle=style, linewidth=1.2, label=level["title"])
    if "chance" in last:
        axes.axhline(last["chance"], color="black", linestyle=":", linewidth=1, label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(cells), [short_count(place) if place >= 1e4 else f"{place:g}" for place in cells])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


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
