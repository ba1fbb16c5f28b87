"""The figure of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from longmem.evaluation.systems.names import TITLES
from longmem.plots.style import COLORS, STYLES, new_figure, short_count
from longmem.training.records import StepRecord, ValidationRecord


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
    if not records:
        raise ValueError("`records` must hold at least one step, got none; draw after the first line of the log.")
    read = _tokens_read(records)
    figure = new_figure((10, 7), title)
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
        axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
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
