"""Figures of an evaluation on books."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from longmem.evaluation.book_tables import same_windows
from longmem.evaluation.perplexity import WindowScores
from longmem.evaluation.results import TITLES, title_of_system
from longmem.plots.style import COLORS, STYLES, color_of, draw_interval, require_matplotlib


def plot_scores(
    path: str | PathLike[str],
    scores: Mapping[str, WindowScores],
    *,
    title: str,
    first_token: int,
    window: int,
    stride: int | None = None,
    reading_layers: Sequence[int] = (),
) -> None:
    """Draw the loss along a document, what memory saves there, and how much each layer and head attends to memory.

    Args:
        path: PNG to write.
        scores: by system; "off" is what the others are compared with.
        title: of the figure.
        first_token: where the scored text starts in its document.
        window: tokens of a window.
        stride: tokens from one window to the next; default `window`.
        reading_layers: their backbone layers, in order.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    stride = window if stride is None else stride
    shares = scores["on"].memory_share if "on" in scores else None
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.add_gridspec(2, 2 if shares is not None else 1, width_ratios=(2, 1) if shares is not None else None)
    count = len(scores["off"].losses)
    middles = (first_token + torch.arange(count) * stride + window - stride / 2).tolist()

    losses = figure.add_subplot(grid[0, :])
    for system, result in scores.items():
        label = f"{TITLES[system]}: {result.loss:.3f}"
        means = result.losses.mean(dim=1).tolist()
        losses.plot(middles, means, STYLES[system], color=COLORS[system], marker=".", label=label)
    losses.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)")
    losses.set_title("Loss along the document, one point per window", fontsize=10)
    losses.legend(fontsize=9, title="mean loss", title_fontsize=9)

    gains = figure.add_subplot(grid[1, 0])
    width = 0.4 * stride
    for side, system in ((-0.5, "wrong"), (0.5, "on")):
        if system in scores:
            saved = (scores["off"].losses - scores[system].losses).mean(dim=1).tolist()
            places = [middle + side * width for middle in middles]
            gains.bar(places, saved, width, color=COLORS[system], label=TITLES[system].removeprefix("LongMem, "))
    gains.axhline(0, color="black", linewidth=0.8)
    gains.set(xlabel="position in the document (tokens)", ylabel="loss saved (nats per token)")
    gains.set_title("What memory saves against memory off; higher is better", fontsize=10)
    gains.legend(fontsize=9)
    for axes in (losses, gains):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="y", alpha=0.3)
    if shares is not None:
        _draw_shares(figure, figure.add_subplot(grid[1, 1]), shares, reading_layers)
    figure.savefig(path, dpi=130)


def plot_books(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str) -> None:
    """Draw each system's perplexity in those of the backbone, for every cut: the mean with its interval, and all books.

    Args:
        path: PNG to write.
        metrics: of `summarize_books`.
        title: of the figure.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    rows = [key for key in ("all_windows", "context_windows") if all(key in cut for cut in metrics["cuts"].values())]
    if all(same_windows(cut) for cut in metrics["cuts"].values()):
        rows.remove("all_windows")
    counts = [len(next(iter(metrics["cuts"].values()))[key]["systems"]) for key in rows]
    figure = Figure(figsize=(1 + 5 * len(metrics["cuts"]), 2 + 0.5 * sum(counts)), layout="constrained")
    figure.suptitle(textwrap.fill(title, 60 * len(metrics["cuts"])), fontsize=12)
    grid = figure.subplots(
        len(rows), len(metrics["cuts"]), sharex="col", sharey="row", squeeze=False, height_ratios=counts
    )
    for row, key in enumerate(rows):
        for column, (cut, values) in enumerate(metrics["cuts"].items()):
            axes, part = grid[row, column], values[key]
            _draw_ratios(axes, part["systems"])
            window, stride = cut.split("/")
            axes.set_title(f"windows of {window}, stride {stride}; {part['windows']} of each book", fontsize=10)
            if row == len(rows) - 1:
                axes.set_xlabel("perplexity / backbone's; left is better\nlarge: mean and 95 % interval, small: books")
    figure.savefig(path, dpi=130)


def _draw_ratios(axes: Any, systems: Mapping[str, Any]) -> None:
    others = [system for system in systems if system != "backbone"]
    for place, system in enumerate(others):
        values = systems[system]
        value, *ends = (
            1 - each / 100 for each in (values["reduction_percent"]["value"], *values["reduction_percent"]["interval"])
        )
        books = [values["books"][name] / systems["backbone"]["books"][name] for name in values["books"]]
        heights = [place + 0.22 + 0.1 * (number % 2) for number in range(len(books))]  # two rows, so that few overlap
        color = color_of(system)
        axes.plot(books, heights, "o", color=color, alpha=0.35, markersize=4, markeredgewidth=0)
        draw_interval(axes, place, value, ends, color, f"{value:.3f}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(others)), [title_of_system(system) for system in others])
    axes.set_ylim(len(others) - 0.5, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)


def _draw_shares(figure: Any, axes: Any, shares: torch.Tensor, reading_layers: Sequence[int]) -> None:
    image = axes.imshow(shares.float().numpy() * 100, aspect="auto", cmap="Blues", vmin=0)
    figure.colorbar(image, ax=axes, label="attention to memory (%)")
    names = list(reading_layers) or list(range(len(shares)))
    axes.set_yticks(range(len(names)), [str(name) for name in names])
    axes.set(xlabel="head", ylabel="reading layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("Memory gates, mean over tokens", fontsize=10)
