"""Figures of an evaluation and of a training run."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longmem.evaluation.book_tables import same_windows, title_of
from longmem.evaluation.perplexity import WindowScores
from longmem.evaluation.results import TITLES
from longmem.memory.index.tuning import Tuned

if TYPE_CHECKING:
    from longmem.training.records import StepRecord, ValidationRecord

COLORS = {"backbone": "#767676", "off": "#d98c21", "on": "#1f6fb4", "wrong": "#b5455f"}
INDEX_COLORS = {"auto": "#1f6fb4", "ivf": "#2a9d8f", "hnsw": "#d98c21", "pq": "#b5455f"}
CONTEXT_COLOR = "#5a8f4e"  # the backbone with a longer window
STYLES = {"backbone": ":", "off": "--", "on": "-", "wrong": "-."}


def require_matplotlib() -> None:
    """Raise ImportError, with the way out, where there is no matplotlib: before long work and not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("figures need matplotlib, which is not installed; run `pip install matplotlib`.") from error


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
        color = COLORS.get(system, CONTEXT_COLOR)
        axes.plot(books, heights, "o", color=color, alpha=0.35, markersize=4, markeredgewidth=0)
        axes.plot(ends, [place, place], "-", color=color, linewidth=3, solid_capstyle="butt")
        axes.plot([value], [place], "o", color=color, markersize=7)
        axes.annotate(
            f"{value:.3f}",
            (value, place),
            xytext=(0, 6),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            va="bottom",
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(others)), [title_of(system) for system in others])
    axes.set_ylim(len(others) - 0.5, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)


def plot_tuning(path: str | PathLike[str], results: Sequence[Tuned], *, title: str) -> None:
    """Draw the recall of index settings against their latency: what is up and to the left is better.

    Args:
        path: PNG to write.
        results: of `tune`; each kind gets a color, and each of its settings a point.
        title: of the figure.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    figure.suptitle(textwrap.fill(title, 90), fontsize=12)
    axes = figure.add_subplot()
    kinds = dict.fromkeys(result.index.partition(":")[0] for result in results)
    for kind in kinds:
        own = [each for each in results if each.index.partition(":")[0] == kind]
        color = INDEX_COLORS.get(kind, "#767676")
        axes.plot([each.milliseconds for each in own], [each.recall for each in own], "o", color=color, label=kind)
        for each in own:
            note = each.index.partition(":")[2].replace(",", "\n") or "default"
            place = (each.milliseconds, each.recall)
            axes.annotate(note, place, xytext=(6, -3), textcoords="offset points", fontsize=7, va="top", color=color)
    exact = [each.milliseconds * each.speed_ratio for each in results]
    if exact:
        axes.axvline(sum(exact) / len(exact), color="black", linestyle=":", linewidth=1, label="exact search")
    axes.margins(x=0.1, y=0.15)  # room for the notes
    axes.set(xscale="log", xlabel="milliseconds per 1,000 queries", ylabel="recall against exact search")
    axes.legend(fontsize=9, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def plot_training(
    path: str | PathLike[str],
    records: Sequence[StepRecord],
    validations: Sequence[ValidationRecord] = (),
    *,
    title: str = "Training of the side network",
) -> None:
    """Draw the losses of a training run, what it saves against the backbone alone, and how much memory is read.

    Lines are means over a tenth of the records or 50 of them, whichever is less; single steps are faint behind them.

    Args:
        path: PNG to write.
        records: of its optimizer steps, in order, at least one; what none of them has gets no line or panel.
        validations: of the same run; their losses are marked where they were measured.
        title: of the figure.

    Raises:
        ValueError: there are no records.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    if not records:
        raise ValueError("`records` must hold at least one step, got none; draw after the first line of the log.")
    read = _tokens_read(records)
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.add_gridspec(2, 2)
    losses = figure.add_subplot(grid[0, 0] if validations else grid[0, :])
    has_gains = any(each.gain is not None for each in records)
    shares = figure.add_subplot(grid[1, 1] if has_gains else grid[1, :])
    panels = [losses, shares]

    _draw_smooth(losses, read, [each.backbone_loss for each in records], COLORS["backbone"], "backbone alone")
    _draw_smooth(losses, read, [each.loss for each in records], COLORS["on"], "side network")
    losses.set(ylabel="loss (nats per token)")
    losses.set_title("Training loss, both on the same tokens", fontsize=10)
    _legend_below(losses)
    if validations:
        panels.append(figure.add_subplot(grid[0, 1], sharex=losses))
        steps = [0, *(each.step for each in records)]
        places = np.interp([each.step for each in validations], steps, [0, *read]).tolist()
        _draw_validations(panels[-1], places, validations)

    if has_gains:
        gains = figure.add_subplot(grid[1, 0])
        panels.append(gains)
        _draw_smooth(gains, read, [each.gain for each in records], COLORS["on"], "gain")
        gains.axhline(0, color="black", linewidth=0.8)
        gains.set(ylabel="loss saved (nats per token)")
        gains.set_title("Backbone alone minus side network; higher is better", fontsize=10)

    percent = [None if each.memory_share is None else 100 * each.memory_share for each in records]
    _draw_smooth(shares, read, percent, COLORS["on"], "attention to memory")
    shares.set_ylabel("attention to memory (%)", color=COLORS["on"])
    shares.set_ylim(bottom=0)
    shares.set_title("Use of memory, mean over reading layers", fontsize=10)
    biases = shares.twinx()
    biases.plot(read, [each.bias_mean for each in records], "--", color=COLORS["off"], label="memory bias")
    biases.set_ylabel("memory bias (dashed)", color=COLORS["off"])
    biases.spines["top"].set_visible(False)
    for axes in panels:
        axes.set_xlabel("tokens read")
        axes.set_xlim(0, read[-1] * 1.02)
        axes.xaxis.set_major_formatter(lambda value, _: _short_count(value))
        axes.spines["top"].set_visible(False)
        axes.spines["right"].set_visible(axes is shares)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=130)


def _draw_validations(axes: Any, places: Sequence[float], validations: Sequence[ValidationRecord]) -> None:
    for system in ("wrong", "backbone", "off", "on"):  # what should be lowest is drawn on top
        points = [(place, getattr(each, system)) for place, each in zip(places, validations, strict=True)]
        points = [(place, loss) for place, loss in points if loss is not None]
        if points:
            label = f"{TITLES[system].removeprefix('LongMem, ').partition(',')[0]}: {points[-1][1]:.3f}"
            axes.plot(*zip(*points, strict=True), STYLES[system], color=COLORS[system], marker="o", label=label)
    axes.set(ylabel="loss (nats per token)")
    axes.margins(y=0.15)
    axes.set_title("Validation loss, all on the same tokens", fontsize=10)
    _legend_below(axes)


def _legend_below(axes: Any) -> None:
    """Put the legend where no line can be."""
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)


def _tokens_read(records: Sequence[StepRecord]) -> list[float]:
    """Return the tokens read up to each record; steps between two records, which are not in the log, read as many."""
    read, total, last = [], 0.0, 0
    for record in records:
        total += record.tokens * (record.step - last)
        last = record.step
        read.append(total)
    return read


def _draw_smooth(axes: Any, places: Sequence[float], values: Sequence[float | None], color: str, label: str) -> None:
    """Draw a running mean over faint single values; nothing where there are none."""
    known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
    if not known:
        return
    xs, ys = (np.array(column, dtype=np.float64) for column in zip(*known, strict=True))
    means = _running_mean(ys, max(1, min(50, len(ys) // 10)))
    axes.plot(xs, ys, color=color, alpha=0.2, linewidth=0.8)
    marker = "o" if len(ys) == 1 else None  # one point makes no line
    axes.plot(xs, means, color=color, linewidth=1.8, label=label, marker=marker)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of each value and those up to `width - 1` before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _short_count(value: float) -> str:
    """Return a number of tokens as people write it.

    >>> [_short_count(value) for value in (0, 500, 20_000, 1_500_000)]
    ['0', '500', '20k', '1.5M']
    """
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _draw_shares(figure: Any, axes: Any, shares: torch.Tensor, reading_layers: Sequence[int]) -> None:
    image = axes.imshow(shares.float().numpy() * 100, aspect="auto", cmap="Blues", vmin=0)
    figure.colorbar(image, ax=axes, label="attention to memory (%)")
    names = list(reading_layers) or list(range(len(shares)))
    axes.set_yticks(range(len(names)), [str(name) for name in names])
    axes.set(xlabel="head", ylabel="reading layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("Memory gates, mean over tokens", fontsize=10)
