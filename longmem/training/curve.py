"""The figure of a training run."""

import itertools
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from longmem.evaluation.systems.making import TITLES
from longmem.plots.style import COLORS, STYLES, new_figure, save_figure, short_count, tidy
from longmem.training.records import StepRecord, ValidationRecord


def plot_training(
    path: str | PathLike[str],
    records: Sequence[StepRecord],
    validations: Sequence[ValidationRecord] = (),
    *,
    title: str = "Training of the side network",
) -> None:
    """Draw the losses of a training run, what it saves against the backbone alone, and how much memory is read.

    Lines are means over a tenth of the records or 50 of them, whichever is less; single steps are faint behind them, and
    losses of `validations` are marked where they were measured. What no record has gets no line or panel.

    Raises ValueError if there are no records.
    """
    if not records:
        raise ValueError("`records` must hold at least one step, got none; draw after the first line of the log.")
    steps = [0, *(each.step for each in records)]
    # Steps between two records, which are not in the log, read as many tokens.
    tokens = (each.tokens * (each.step - last) for each, last in zip(records, steps, strict=False))
    read = [float(total) for total in itertools.accumulate(tokens)]
    figure = new_figure((10, 7), title)
    grid = figure.add_gridspec(2, 2)
    has_gains = any(each.gain is not None for each in records)
    place = grid[0, 0] if validations else grid[0, :]
    losses = _panel(figure, place, "Training loss, both on the same tokens", "loss (nats per token)")
    _draw_smooth(losses, read, [each.backbone_loss for each in records], COLORS["backbone"], "backbone alone")
    _draw_smooth(losses, read, [each.loss for each in records], COLORS["on"], "side network")
    _legend_below(losses)
    if validations:
        scored = _panel(figure, grid[0, 1], "Validation loss, all on the same tokens", "loss (nats per token)")
        places = np.interp([each.step for each in validations], steps, [0, *read]).tolist()
        _draw_validations(scored, places, validations)

    if has_gains:
        head = "Backbone alone minus side network; higher is better"
        gains = _panel(figure, grid[1, 0], head, "loss saved (nats per token)")
        _draw_smooth(gains, read, [each.gain for each in records], COLORS["on"], "gain")
        gains.axhline(0, color="black", linewidth=0.8)

    place = grid[1, 1] if has_gains else grid[1, :]
    shares = _panel(figure, place, "Use of memory, mean over reading layers", "attention to memory (%)")
    panels = list(figure.axes)
    percent = [None if each.memory_share is None else 100 * each.memory_share for each in records]
    _draw_smooth(shares, read, percent, COLORS["on"], "attention to memory")
    shares.yaxis.label.set_color(COLORS["on"])
    shares.set_ylim(bottom=0)
    biases = shares.twinx()
    biases.plot(read, [each.bias_mean for each in records], "--", color=COLORS["off"], label="memory bias")
    biases.set_ylabel("memory bias (dashed)", color=COLORS["off"])
    biases.spines["top"].set_visible(False)
    for axes in panels:
        axes.set_xlim(0, read[-1] * 1.02)
        axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
        tidy(axes, "y")
    shares.spines["right"].set_visible(True)
    save_figure(figure, path)


def _panel(figure: Any, place: Any, title: str, ylabel: str) -> Any:
    """Return axes with a title, over tokens read."""
    axes = figure.add_subplot(place)
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="tokens read", ylabel=ylabel)
    return axes


def _draw_validations(axes: Any, places: Sequence[float], validations: Sequence[ValidationRecord]) -> None:
    for system in ("wrong", "backbone", "off", "on"):  # what should be lowest is drawn on top
        points = [(place, getattr(each, system)) for place, each in zip(places, validations, strict=True)]
        points = [(place, loss) for place, loss in points if loss is not None]
        if points:
            label = f"{TITLES[system].removeprefix('LongMem, ').partition(',')[0]}: {points[-1][1]:.3f}"
            axes.plot(*zip(*points, strict=True), STYLES[system], color=COLORS[system], marker="o", label=label)
    axes.margins(y=0.15)
    _legend_below(axes)


def _legend_below(axes: Any) -> None:
    """Put the legend where no line can be."""
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)


def _draw_smooth(axes: Any, places: Sequence[float], values: Sequence[float | None], color: str, label: str) -> None:
    """Draw a running mean over faint single values; nothing where there are none."""
    known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
    if not known:
        return
    xs, ys = (np.array(column, dtype=np.float64) for column in zip(*known, strict=True))
    means = running_mean(ys, max(1, min(50, len(ys) // 10)))
    axes.plot(xs, ys, color=color, alpha=0.2, linewidth=0.8)
    marker = "o" if len(ys) == 1 else None  # one point makes no line
    axes.plot(xs, means, color=color, linewidth=1.8, label=label, marker=marker)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of each value and those up to `width - 1` before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
