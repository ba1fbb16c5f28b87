"""Figures of the experiments on staleness: recovered against cost, accuracy over training, bars, what memory gains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from longmem.plots.style import draw_interval, require_matplotlib

LOWEST = -0.5  # what loses more than this is drawn at the bottom, with its number
# Color and marker of each kind of policy, by how the names of its systems begin.
FAMILIES = {
    "never": ("#767676", "s"),
    "eager": ("#1f6fb4", "*"),
    "bounded": ("#1f6fb4", "s"),
    "lazy": ("#5a8f4e", "o"),
    "sweep": ("#d98c21", "D"),
    "swept": ("#d98c21", "d"),
    "affine": ("#7a5aa6", "^"),
    "procrustes": ("#b5455f", "v"),
    "mask": ("#333333", "X"),
    "stale-weight": ("#333333", "P"),
    "fresh": ("#1f6fb4", "x"),
}
GAIN_COLORS = {"oracle": "#1f6fb4", "never": "#d98c21"}
POLICY_COLOR = "#5a8f4e"


def plot_experiment(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str) -> None:
    """Draw the metrics of an experiment (`summarize_staleness`), each kind in its own way.

    Args:
        path: PNG to write.
        metrics: with `tables` (policies), with curves in their `summary` (learning), or with shares alone (content).
        title: of the figure.
    """
    if "tables" in metrics:
        plot_policies(path, metrics, title=title)
    elif all("curve" in values for values in metrics["summary"]["systems"].values()):
        plot_curves(path, metrics["summary"], title=title)
    else:
        plot_bars(path, metrics["summary"], title=title)


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
    for level in (0, 1):
        axes.axhline(level, color="#cccccc", linewidth=0.8, zorder=0)
    places: dict[tuple[float, float], list[str]] = {}  # systems that stand at one place have one label
    for number, (name, values) in enumerate(systems.items(), start=1):
        color, marker = family(name)
        label = f"{number} {values['title']}"
        if values["recovered"] is None or values["cost"] is None:
            axes.plot([], [], marker, color=color, label=label)
            continue
        (recovered, *ends), (cost, *costs) = values["recovered"], values["cost"]
        shown = max(recovered, LOWEST)
        axes.plot(costs, [shown, shown], "-", color=color, linewidth=1)
        axes.plot([cost, cost], [max(end, LOWEST) for end in ends], "-", color=color, linewidth=1)
        axes.plot([cost], [shown], marker, color=color, markersize=7, label=label)
        text = f"{number}" if recovered >= LOWEST else f"{number}: {recovered:.1f}"
        places.setdefault(nearby(places, cost, shown), []).append(text)
    for place, texts in places.items():
        width = 2 if place[0] > 0.3 else 4  # numbers in a line: on the right there is little room
        lines = [", ".join(texts[start : start + width]) for start in range(0, len(texts), width)]
        side: dict[str, Any] = (
            {"xytext": (4, -5), "va": "top"} if place[0] > 0.9 else {"xytext": (4, 4), "va": "bottom"}
        )
        axes.annotate("\n".join(lines), place, textcoords="offset points", fontsize=7, **side)
    axes.set_xscale("symlog", linthresh=0.04)  # from 0 on: what costs nothing has its place
    axes.set_xlim(-0.008, 2.4)
    axes.set_xticks([0, 0.05, 0.1, 0.2, 0.5, 1], ["0", "0.05", "0.1", "0.2", "0.5", "1"], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_ylim(LOWEST - 0.1, 1.3)


def nearby(places: Iterable[tuple[float, float]], cost: float, recovered: float) -> tuple[float, float]:
    """Return the first of the places that a label here would cover, or this place itself.

    >>> nearby([(0.0, 0.0), (0.5, 1.0)], 0.52, 0.99), nearby([(0.5, 1.0)], 0.9, 1.0)
    ((0.5, 1.0), (0.9, 1.0))
    """
    for place in places:
        if abs(place[1] - recovered) < 0.05 and abs(place[0] - cost) <= 0.2 * max(place[0], cost):
            return place
    return cost, recovered


def family(name: str) -> tuple[str, str]:
    """Return color and marker of a system, of the longest name of a kind that its own begins with.

    >>> family("lazy-sweep") == FAMILIES["lazy"]
    True
    """
    return FAMILIES[max((kind for kind in FAMILIES if name.startswith(kind)), key=len)]


def plot_curves(path: str | PathLike[str], summary: Mapping[str, Any], *, title: str) -> None:
    """Draw the share of right answers in each step of training, a line for each system, running means of ten steps."""
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for number, values in enumerate(summary["systems"].values()):
        curve = values["curve"]
        means = [100 * sum(curve[max(0, end - 10) : end]) / min(end, 10) for end in range(1, len(curve) + 1)]
        axes.plot(
            range(1, len(curve) + 1), means, label=values["title"], color=colors[number % len(colors)], linewidth=1.4
        )
    axes.set_title(title, fontsize=12)
    axes.set_xlabel("step of training", fontsize=9)
    axes.set_ylabel("right answers, %", fontsize=9)
    axes.set_ylim(-2, 102)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def plot_bars(path: str | PathLike[str], summary: Mapping[str, Any], *, title: str) -> None:
    """Draw a bar for each system, its share with the interval."""
    require_matplotlib()
    from matplotlib.figure import Figure

    systems = list(summary["systems"].values())
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(systems)), layout="constrained")
    axes = figure.subplots()
    for place, values in enumerate(systems):
        low, high = values["interval"]
        axes.barh(place, values["value"], height=0.6, color="#1f6fb4", alpha=0.75)
        axes.plot([low, high], [place, place], "-", color="black", linewidth=1.5)
        axes.annotate(f" {values['value']:.1f}", (max(high, values["value"]), place), fontsize=8, va="center")
    axes.set_yticks(range(len(systems)), [values["title"] for values in systems], fontsize=9)
    axes.set_ylim(len(systems) - 0.4, -0.6)
    axes.set_xlim(0, 112)
    axes.set_xlabel(f"{summary['measure']}: mean and 95 % interval over seeds", fontsize=9)
    axes.set_title(title, fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def plot_stale_texts(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str) -> None:
    """Draw, for each change of the encoder, the gain of every system over memory off, with its interval.

    Args:
        path: PNG to write.
        metrics: of `summarize_stale_texts`.
        title: of the figure.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    changes = metrics["changes"]
    names = [name for name in next(iter(changes.values()))["systems"] if name != "off"]
    figure = Figure(figsize=(4.6 + 3.2 * len(changes), 1.6 + 0.5 * len(names)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, len(changes), sharey=True, squeeze=False)[0]
    for axes, (rate, change) in zip(panels, changes.items(), strict=True):
        for place, name in enumerate(reversed(names)):
            values = change["systems"][name]
            gain, *ends = values["gain"]
            draw_interval(axes, place, gain, ends, GAIN_COLORS.get(name, POLICY_COLOR), f"{gain:+.3f}")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), [change["systems"][name]["title"] for name in reversed(names)], fontsize=8)
        axes.set_ylim(-0.6, len(names) - 0.3)
        axes.set_title(f"tuned at {rate}, gap {change['gap']:.4f}", fontsize=9)
        axes.set_xlabel("nats a token below memory off", fontsize=9)
    figure.savefig(path, dpi=130)
