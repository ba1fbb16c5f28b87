"""What memory costs, by how much is stored: time of a token and of a prompt, and bytes."""

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from longmem.plots.style import COLORS, CONTEXT_COLOR, new_figure, panels_of, save_figure, tidy

INDEX_STYLES = {"auto": ("-", "o"), "flat": ("--", "^")}


def plot_cost(path: str | PathLike[str], runs: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draw what memory costs beside a window that holds the same text, in multiples of the backbone with its own window.

    `path`: of the PNG. `runs`: what `bench_cost.py --output` wrote of one model, each with another number of stored tokens.
    """
    runs = sorted(runs, key=lambda run: run["setup"]["stored"])
    stored = [run["setup"]["stored"] for run in runs]
    figure = new_figure((13, 4.4), textwrap.fill(title, 120))
    token, prompt, size = panels_of(figure, 3, 3)
    for kind, (style, marker) in INDEX_STYLES.items():
        name = f"LongMem, {'exact' if kind == 'flat' else 'approximate'} search"
        look: dict[str, Any] = {"color": COLORS["on"], "linestyle": style, "marker": marker, "label": name}
        off, extra = "memory off / backbone, forward", "(memory on"
        token.plot(stored, [1 / _speed(run, "with the window of", kind) for run in runs], **look)
        prompt.plot(stored, [_ratio(run, off) + _ratio(run, extra, f"; {kind} index") for run in runs], **look)
    far = [_speed(run, "with all in", "flat") / _speed(run, "with the window of", "flat") for run in runs]
    longer = {"color": CONTEXT_COLOR, "linestyle": ":", "marker": "s"}
    token.plot(stored, far, label="backbone, all in its window", **longer)
    for key, look in (
        ("bytes stored per token", {"color": COLORS["on"], "marker": "o", "label": "LongMem, memory bank"}),
        ("bytes per token in the backbone's cache", longer | {"label": "backbone, cache of its window"}),
    ):
        size.plot(stored, [run["sizes"][key] * run["setup"]["stored"] / 1e6 for run in runs], **look)
    heads = (
        "time of a generated token",
        f"time of a prompt of {runs[0]['setup']['segment']:,} tokens",
        "kept for the text, MB",
    )
    for axes, head in zip((token, prompt, size), heads, strict=True):
        axes.set_title(head, fontsize=10)
        axes.set_xlabel("tokens in memory")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(stored, [f"{each:,}" for each in stored])
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.margins(y=0.3)
        axes.legend(fontsize=8, frameon=False)
        tidy(axes, "y")
    for axes in (token, prompt):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel("times the backbone with its own window")
    save_figure(figure, path)


def _speed(run: Mapping[str, Any], window: str, index: str) -> float:
    return _ratio(run, f"speed of generating / backbone's {window}", f"; {index} index")


def _ratio(run: Mapping[str, Any], start: str, end: str = "") -> float:
    """Return the median of the one ratio whose name begins and ends so."""
    (found,) = (each for name, each in run["result"].items() if name.startswith(start) and name.endswith(end))
    return float(found["median"])
