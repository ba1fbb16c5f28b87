"""Figures of an evaluation on documents."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from os import PathLike
from typing import Any

from longmem.evaluation.results import title_of_system
from longmem.plots.style import STYLES, color_of, draw_interval, require_matplotlib


def plot_documents(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str) -> None:
    """Draw each system's perplexity in that of the baseline, a panel for each group of lengths and one for all documents.

    Args:
        path: PNG to write.
        metrics: of `summarize_documents`, with a system beside the baseline.
        title: of the figure.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    baseline, parts = metrics["baseline"], list(metrics["lengths"].items())
    if len(parts) == 2:  # one group is all documents
        parts = parts[:1]
    others = [system for system in parts[0][1]["systems"] if system != baseline]
    columns = min(3, len(parts))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(3 + 3.5 * columns, 1.5 + rows * (1 + 0.5 * len(others))), layout="constrained")
    figure.suptitle(textwrap.fill(title, 30 + 40 * columns), fontsize=12)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for number, axes in enumerate(grid.flat):
        if number >= len(parts):
            axes.set_visible(False)
            continue
        name, part = parts[number]
        for place, system in enumerate(others):
            values = part["systems"][system]["reduction_percent"]
            ratio, *ends = (1 - each / 100 for each in (values["value"], *values["interval"]))
            own, base = (part["systems"][each]["documents"] for each in (system, baseline))
            dots = [own[each] / base[each] for each in own] if len(own) > 1 else []
            heights = [place + 0.22 + 0.1 * (dot % 2) for dot in range(len(dots))]  # two rows, so that few overlap
            axes.plot(dots, heights, "o", color=color_of(system), alpha=0.35, markersize=4, markeredgewidth=0)
            draw_interval(axes, place, ratio, ends, color_of(system), f"{ratio:.3f}")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(others)), [title_of_system(system) for system in others], fontsize=9)
        axes.set_ylim(len(others) - 0.5, -0.7)
        axes.set_title(f"{name}: {part['documents']} document{'s' * (part['documents'] > 1)}", fontsize=10)
        axes.set_xlabel(f"perplexity / {title_of_system(baseline)}", fontsize=9)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("left is better; large: mean and 95 % interval, small: documents", fontsize=9)
    figure.savefig(path, dpi=130)


def plot_distances(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str) -> None:
    """Draw what each system saves by how far back stands what a token repeats, with intervals.

    Args:
        path: PNG to write.
        metrics: of `summarize_documents`, whose `distances` are not None.
        title: of the figure.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    found = metrics["distances"]
    groups = {name: group for name, group in found["groups"].items() if group["systems"]}
    systems = list(next(iter(groups.values()))["systems"])
    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    figure.suptitle(textwrap.fill(title, 90), fontsize=12)
    axes = figure.add_subplot()
    for number, system in enumerate(systems):
        shift = 0.5 * ((number + 0.5) / len(systems) - 0.5)  # side by side, so that intervals can be told apart
        places = [place + shift for place in range(len(groups))]
        gains = [group["systems"][system] for group in groups.values()]
        values = [gain["value"] for gain in gains]
        below, above = ([abs(gain["interval"][end] - gain["value"]) for gain in gains] for end in (0, 1))
        style = STYLES.get(system, "--")
        label = title_of_system(system)
        axes.errorbar(
            places, values, (below, above), linestyle=style, color=color_of(system), marker="o", capsize=3, label=label
        )
    axes.axhline(0, color="black", linewidth=0.8)
    ticks = [f"{name}\n{group['tokens']:,}" for name, group in groups.items()]
    axes.set_xticks(range(len(groups)), ticks, fontsize=9)
    axes.set_xlabel(f"tokens back to where the same {found['ngram']} tokens last ended, and how many were scored")
    axes.set_ylabel(f"nats per token saved against\n{title_of_system(found['against'])} (mean, 95 %)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
