"""Colors and lines of the systems, and what figures share."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from longmem.files import new_file

COLORS = {
    "backbone": "#767676",
    "bm25": "#7a5aa6",
    "hidden": "#a98fd1",
    "off": "#d98c21",
    "on": "#1f6fb4",
    "wrong": "#b5455f",
}
CONTEXT_COLOR = "#5a8f4e"  # the backbone with a longer window
STYLES = {"backbone": ":", "off": "--", "on": "-", "wrong": "-."}


def require_matplotlib() -> None:
    """Raise ImportError, with the way out, where there is no matplotlib: before long work and not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("figures need matplotlib, which is not installed; run `pip install matplotlib`.") from error


def new_figure(size: tuple[float, float], title: str = "") -> Any:
    """Return a figure without pyplot: no display and no global state."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def save_figure(figure: Any, path: str | PathLike[str]) -> None:
    """Write a figure to a file, whole or not at all; its ending says what kind."""
    with new_file(path) as draft:
        figure.savefig(draft, dpi=130)


def panels_of(figure: Any, count: int, columns: int, **options: Any) -> list[Any]:
    """Return the axes of so many panels in rows of `columns`; what is left of the last row stays empty."""
    grid = figure.subplots(-(-count // columns), columns, squeeze=False, **options)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return list(grid.flat[:count])


def tidy(axes: Any, lines: str) -> None:
    """Leave out the frame above and at the right, and draw faint lines at the ticks of "x", "y" or "both"."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=lines, alpha=0.3)


def color_of(system: str) -> str:
    """Return the color of a system."""
    return COLORS.get(system, CONTEXT_COLOR)


def draw_estimates(
    axes: Any, places: Sequence[float], estimates: Sequence[Mapping[str, Any]], system: str, title: str
) -> None:
    """Draw the means of a system as a line along an axis, each with its interval."""
    values = [each["value"] for each in estimates]
    ends = [[abs(each["value"] - each["interval"][end]) for each in estimates] for end in (0, 1)]
    look = {"linestyle": STYLES.get(system, "--"), "color": color_of(system), "marker": "o", "capsize": 3}
    axes.errorbar(places, values, ends, label=title, **look)


def draw_interval(axes: Any, place: float, value: float, ends: list[float], color: str, text: str) -> None:
    """Draw a mean with its interval on the line `place`, and its value above it."""
    axes.plot(ends, [place, place], "-", color=color, linewidth=3, solid_capstyle="butt")
    axes.plot([value], [place], "o", color=color, markersize=7)
    axes.annotate(text, (value, place), xytext=(0, 6), textcoords="offset points", fontsize=8, ha="center", va="bottom")


def short_count(value: float) -> str:
    """Return a number of tokens as people write it.

    >>> [short_count(value) for value in (0, 500, 20_000, 1_500_000)]
    ['0', '500', '20k', '1.5M']
    """
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
