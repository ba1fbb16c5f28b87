"""The figures of an evaluation: what systems get right, as bars or, along an axis of numbers, as lines.

Each `path` is the PNG to write, and each `title` stands above its figure.
"""

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from longmem.evaluation.runner import Finished
from longmem.plots.perplexity import plot_perplexity
from longmem.plots.style import (
    color_of,
    draw_estimates,
    draw_interval,
    new_figure,
    panels_of,
    save_figure,
    tidy,
)

BASELINE_COLOR, BASELINE_STYLES = "#9a9a9a", (":", "--", "-.")


def plot_finished(finished: Finished) -> None:
    """Draw what an evaluation has found into its folder."""
    if "parts" in finished.metrics:  # of perplexities; what is right or wrong has measures
        plot_perplexity(finished.folder, finished.metrics, title=finished.title)
    else:
        plot_evaluation(finished.folder / "accuracy.png", finished.metrics, title=finished.title)


def plot_evaluation(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str) -> None:
    """Draw the main figures of any evaluation with their intervals, a panel for each panel of its tables.

    Where results have an axis of numbers there is a line for each system, otherwise a bar for what is counted in percent; where
    nothing is, no figure. Where they have details, a second figure, whose name ends with "-map", shows them for the system
    `on` (`plot_maps`). `metrics` are those of `metrics.json`.
    """
    measures = list(metrics["measures"].values())
    axes = {axis["kind"]: axis for axis in metrics["axes"]}
    panels, values = _values_of(axes, "panel"), axes["column"]["values"] if "column" in axes else []
    if "detail" in axes and "on" in metrics["systems"]:
        plot_maps(Path(path).with_stem(f"{Path(path).stem}-map"), metrics, title=title)
    if values and all(isinstance(value, int | float) for value in values):
        plot_runs(path, [metrics], title=title)
        return
    measures = [each for each in measures if each["unit"] == "%"]
    if "column" in axes or "panel" in axes:
        keys = [(panel, value) for panel in panels for value in ["", *values]]
        found = {" ".join(map(str, key)).strip() or "all": _cell_of(measures, _key(*key) or "all") for key in keys}
        found = {name: cell for name, cell in found.items() if cell}
    else:
        found = {each["title"]: each["cells"]["all"] for each in measures}
    if not found:
        return
    names = {panel.get("measure", measures[0]["title"]) for panel in found.values()}
    if len(names) > 1:
        found = {f"{name}: {panel['measure']}": panel for name, panel in found.items()}
    chances = {panel.get("chance") for panel in found.values()}
    measure, chance = names.pop() if len(names) == 1 else "score", chances.pop() if len(chances) == 1 else None
    plot_accuracies(path, found, title=title, measure=measure, chance=chance)


def plot_runs(path: str | PathLike[str], runs: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draw several runs of one evaluation along its axis of numbers, such as tokens in memory, as one figure.

    `runs`: `metrics.json` of each, of different places on the axis, perhaps of different systems.
    """
    panels: dict[str, dict[float, Any]] = {}
    for metrics in runs:
        axes = {axis["kind"]: axis for axis in metrics["axes"]}
        for panel in _values_of(axes, "panel"):
            for value in axes["column"]["values"]:
                if cell := _cell_of(list(metrics["measures"].values()), _key(panel, value)):
                    panels.setdefault(panel, {})[value] = cell
    sorted_panels = {name: dict(sorted(cells.items())) for name, cells in panels.items()}
    plot_lines(path, sorted_panels, runs[0]["baselines"], title=title, xlabel=axes["column"]["title"])


def _values_of(axes: Mapping[str, Any], kind: str) -> list[str]:
    """Return the values of the axis of a kind; one without a name where there is none."""
    return [str(value) for value in axes[kind]["values"]] if kind in axes else [""]


def _key(*values: Any) -> str:
    """Return the name of a cell: values of axes, those that there are."""
    return ", ".join(filter(None, map(str, values)))


def _cell_of(measures: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Return the cell of the first measure that has it, with `unit` and `measure`; empty where none has."""
    found = (each for each in measures if key in each["cells"])
    return next(({"unit": each["unit"], "measure": each["title"], **each["cells"][key]} for each in found), {})


def plot_maps(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str, system: str = "on") -> None:
    """Draw one system's main measure, in percent, as a map for each panel: the column axis to the right, details upwards."""
    axes = {axis["kind"]: axis for axis in metrics["axes"]}
    measure = next(iter(metrics["measures"].values()))
    cells, details = measure["cells"], _values_of(axes, "detail")
    columns = {
        panel: [place for value in axes["column"]["values"] if (place := _key(panel, value)) in cells]
        for panel in _values_of(axes, "panel")
    }
    width = 2 + sum(1 + 1.1 * len(own) for own in columns.values())
    head = textwrap.fill(f"{title}: {metrics['systems'][system]}", int(9 * width))
    figure = new_figure((width, 2.4 + 0.5 * len(details)), head)
    grid = panels_of(figure, len(columns), len(columns), width_ratios=list(map(len, columns.values())))
    for own, (panel, places) in zip(grid, columns.items(), strict=True):
        found = [[cells.get(_key(place, detail)) for place in places] for detail in details]
        values = [[None if cell is None else cell["systems"][system]["value"] for cell in row] for row in found]
        image = draw_map(own, values, [place.removeprefix(f"{panel}, ") for place in places], details)
        own.set_title(panel, fontsize=10)
        own.set_xlabel(axes["column"]["title"], fontsize=9)
    grid[0].set_ylabel(axes["detail"]["title"], fontsize=9)
    bar = figure.colorbar(image, ax=grid, shrink=0.8)
    bar.set_label(f"{measure['title']}, {measure['unit']}", fontsize=9)
    if "chance" in metrics["summary"]:
        bar.ax.axhline(metrics["summary"]["chance"], color="black", linestyle=":")
    save_figure(figure, path)


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
    """Draw a line with its intervals for each system, and a level one for each of `baselines`, which need no model.

    `panels`: by name, and by place on the axis, comparisons with `measure` and `unit`.
    """
    figure = new_figure((3.7 + 4.2 * len(panels), 4.5), textwrap.fill(title, 60 * len(panels)))
    handles: dict[str, Any] = {}
    for axes, (name, cells) in zip(panels_of(figure, len(panels), len(panels)), panels.items(), strict=True):
        draw_lines(axes, cells, baselines)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(xlabel)
        unit = next(iter(cells.values()))
        axes.set_ylabel(f"{unit['measure']}, {unit['unit']}: mean and 95 % interval")
        own, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, own, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    save_figure(figure, path)


def draw_lines(axes: Any, cells: Mapping[float, Any], baselines: Sequence[str]) -> None:
    """Draw comparisons along an axis."""
    last = cells[max(cells)]["systems"]
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["systems"] if name not in baselines))
    for number, name in enumerate(names):
        own = {place: cell["systems"][name] for place, cell in cells.items() if name in cell["systems"]}
        shift = 1.02 ** (number - (len(names) - 1) / 2)  # side by side: no interval hides another
        found = list(own.values())
        draw_estimates(axes, [place * shift for place in own], found, name, found[0]["title"])
    for name, style in zip(baselines, BASELINE_STYLES, strict=False):
        if name in last:
            look = {"color": BASELINE_COLOR, "linestyle": style, "linewidth": 1.2}
            axes.axhline(last[name]["value"], label=last[name]["title"], **look)
    if "chance" in cells[max(cells)]:
        axes.axhline(cells[max(cells)]["chance"], color="black", linestyle=":", linewidth=1, label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(cells), [f"{place:,.7g}" for place in cells])
    axes.minorticks_off()
    tidy(axes, "y")


def plot_accuracies(
    path: str | PathLike[str],
    panels: Mapping[str, Mapping[str, Any]],
    *,
    title: str,
    measure: str = "accuracy",
    chance: float | None = None,
) -> None:
    """Draw the accuracy of every system with its interval, a panel for each comparison (`summary.compare`), by name.

    `measure` is on the axis, in percent, as is `chance`, of guessing; None draws no line.
    """
    columns, most = min(3, len(panels)), max(len(panel["systems"]) for panel in panels.values())
    rows = -(-len(panels) // columns)
    figure = new_figure((3 + 4 * columns, 1.2 + rows * (1 + 0.5 * most)), textwrap.fill(title, 40 + 40 * columns))
    titles = [[values["title"] for values in panel["systems"].values()] for panel in panels.values()]
    drawn = panels_of(figure, len(panels), columns, sharex=True)
    for number, (axes, (name, panel)) in enumerate(zip(drawn, panels.items(), strict=True)):
        draw_systems(axes, panel["systems"], chance)
        axes.set_title(name, fontsize=10)
        if number % columns and all(own == titles[0] for own in titles):
            axes.tick_params(labelleft=False)
        if number + columns >= len(panels):  # nothing below it
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(f"{measure}, %: mean and 95 % interval")
    save_figure(figure, path)


def plot_summaries(path: str | PathLike[str], summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the means and intervals of several runs, a panel for each with an axis of its own.

    `summaries`: by title of the run, `measure`, perhaps `chance`, and `systems` with `title`, `value` and `interval`.
    """
    columns, most = min(2, len(summaries)), max(len(summary["systems"]) for summary in summaries.values())
    figure = new_figure((1 + 6 * columns, -(-len(summaries) // columns) * (1.4 + 0.42 * most)))
    for axes, (title, summary) in zip(panels_of(figure, len(summaries), columns), summaries.items(), strict=True):
        draw_systems(axes, summary["systems"], summary.get("chance"))
        axes.set_title(textwrap.fill(title, 50), fontsize=10)
        axes.set_xlabel(summary["measure"], fontsize=9)
    save_figure(figure, path)


def draw_systems(axes: Any, systems: Mapping[str, Any], chance: float | None) -> None:
    """Draw a line for each system: its mean with the interval, and where guessing would be."""
    for place, (system, values) in enumerate(systems.items()):
        draw_interval(axes, place, values["value"], values["interval"], color_of(system), f"{values['value']:.1f}")
    if chance is not None:
        axes.axvline(chance, color="black", linestyle=":", linewidth=1, label="chance")
        axes.legend(fontsize=8, loc="lower right")
    axes.set_yticks(range(len(systems)), [values["title"] for values in systems.values()], fontsize=9)
    axes.set_ylim(len(systems) - 0.5, -0.7)
    tidy(axes, "x")
