"""Figures of perplexities: along a text, by part of what was scored, and by the distance of what is needed."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from longmem.evaluation.perplexity.scoring import Cut, WindowScores
from longmem.evaluation.perplexity.summary import distance_heading
from longmem.evaluation.perplexity.texts import load_scores
from longmem.evaluation.systems.making import title_of_system
from longmem.plots.style import (
    STYLES,
    color_of,
    draw_estimates,
    draw_interval,
    new_figure,
    panels_of,
    save_figure,
    tidy,
)


def plot_perplexity(folder: Path, metrics: Mapping[str, Any], *, title: str) -> None:
    """Draw all figures of a run into its folder: what there is to compare, and of each book the losses along its windows."""
    if len(metrics["summary"]["systems"]) > 1:
        plot_ratios(folder / "perplexity.png", metrics, title=title)
    if metrics["distances"] is not None:
        plot_distances(folder / "distances.png", metrics, title=distance_heading(metrics))
    if metrics["plan"] != "books" or "off" not in metrics["summary"]["systems"]:
        return
    layers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]["memory_layers"]
    for file in sorted((folder / "documents").glob("*.safetensors")):
        for cut, scores in load_scores(file).items():
            first = scores.windows[0].start
            plot_scores(
                file.with_name(f"{file.stem}-{cut.window}-{cut.stride}.png"),
                {name: own for name, own in scores.systems.items() if not name.startswith("context-")},
                title=f"{title.partition(': ')[0]} reading {scores.name}, {first:,} tokens in memory",
                first_token=first,
                cut=cut,
                reading_layers=layers or (),
            )


def plot_scores(
    path: str | PathLike[str],
    scores: Mapping[str, WindowScores],
    *,
    title: str,
    first_token: int,
    cut: Cut,
    reading_layers: Sequence[int] = (),
) -> None:
    """Draw the loss along a text, what memory saves there, and how much each layer and head attends to memory.

    `scores` are by system, and "off" is what the others are compared with. The first window begins at `first_token` of its
    text, and `cut` says how the others follow. `reading_layers` are numbers of backbone layers, in order.
    """
    figure = new_figure((10, 7), title)
    shares = scores["on"].memory_share if "on" in scores else None
    grid = figure.add_gridspec(2, 2 if shares is not None else 1, width_ratios=(2, 1) if shares is not None else None)
    means = {system: torch.stack([window.mean() for window in own.losses]) for system, own in scores.items()}
    middles = (first_token + torch.arange(len(means["off"])) * cut.stride + cut.window - cut.stride / 2).tolist()

    losses = figure.add_subplot(grid[0, :])
    for system, own in scores.items():
        style, label = STYLES.get(system, "--"), f"{title_of_system(system)}: {own.loss:.3f}"
        losses.plot(middles, means[system].tolist(), style, color=color_of(system), marker=".", label=label)
    losses.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)")
    losses.set_title("Loss along the document, one point per window", fontsize=10)
    losses.legend(fontsize=9, title="mean loss", title_fontsize=9)

    gains = figure.add_subplot(grid[1, 0])
    width = 0.4 * cut.stride
    for side, system in ((-0.5, "wrong"), (0.5, "on")):
        if system in scores:
            saved = (means["off"] - means[system]).tolist()
            places, label = [middle + side * width for middle in middles], title_of_system(system)
            gains.bar(places, saved, width, color=color_of(system), label=label.removeprefix("LongMem, "))
    gains.axhline(0, color="black", linewidth=0.8)
    gains.set(xlabel="position in the document (tokens)", ylabel="loss saved (nats per token)")
    gains.set_title("What memory saves against memory off; higher is better", fontsize=10)
    if gains.containers:
        gains.legend(fontsize=9)
    for axes in (losses, gains):
        tidy(axes, "y")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    if shares is not None:
        axes = figure.add_subplot(grid[1, 1])
        image = axes.imshow(shares.float().numpy() * 100, aspect="auto", cmap="Blues", vmin=0)
        figure.colorbar(image, ax=axes, label="attention to memory (%)")
        names = list(reading_layers) or list(range(len(shares)))
        axes.set_yticks(range(len(names)), [str(name) for name in names])
        axes.set(xlabel="head", ylabel="reading layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title("Memory gates, mean over tokens", fontsize=10)
    save_figure(figure, path)


def plot_ratios(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str) -> None:
    """Draw the perplexities of systems in that of the baseline, a panel for each part: means with intervals, and all texts."""
    baseline, parts, is_books = metrics["baseline"], metrics["parts"], metrics["plan"] == "books"
    shown = list(parts.items())
    if is_books:  # a column for each cut, a row for each number of windows
        shown.sort(key=lambda each: -each[1]["windows"])
        columns = len({part["cut"] for part in parts.values()})
        cuts = [(Cut.parse(part["cut"]), part["windows"]) for _, part in shown]
        heads = [f"windows of {cut.window}, stride {cut.stride}; {count} of each book" for cut, count in cuts]
    else:
        shown = shown[:1] if len(shown) == 2 else shown  # one group is all documents
        columns = min(3, len(shown))
        heads = [f"{name}: {part['documents']} document{'s' * (part['documents'] > 1)}" for name, part in shown]
    panels = [part for _, part in shown]
    rows = -(-len(panels) // columns)
    heights = [max(1, len(panels[row * columns]["systems"]) - 1) for row in range(rows)]
    figure = new_figure((3 + 3.5 * columns, 1.5 + rows + 0.5 * sum(heights)), textwrap.fill(title, 30 + 40 * columns))
    drawn = panels_of(figure, len(panels), columns, sharex=True, sharey="row", height_ratios=heights)
    for number, (axes, head, part) in enumerate(zip(drawn, heads, panels, strict=True)):
        others = [system for system in part["systems"] if system != baseline]
        for place, system in enumerate(others):
            values = part["systems"][system]["reduction_percent"]
            ratio, *ends = (1 - each / 100 for each in (values["value"], *values["interval"]))
            own, base = (part["systems"][each]["documents"] for each in (system, baseline))
            dots = [own[each] / base[each] for each in own] if is_books or len(own) > 1 else []
            low = [place + 0.22 + 0.1 * (dot % 2) for dot in range(len(dots))]  # two rows, so that few overlap
            axes.plot(dots, low, "o", color=color_of(system), alpha=0.35, markersize=4, markeredgewidth=0)
            draw_interval(axes, place, ratio, ends, color_of(system), f"{ratio:.3f}")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(others)), [title_of_system(system) for system in others], fontsize=9)
        axes.set_ylim(len(others) - 0.5, -0.7)
        axes.set_title(head, fontsize=10)
        label = f"perplexity / {title_of_system(baseline)}"
        if is_books:
            label = f"perplexity / {baseline}'s; left is better\nlarge: mean and 95 % interval, small: books"
        axes.set_xlabel(label if number + columns >= len(panels) else "", fontsize=9)
        axes.margins(x=0.12)
        tidy(axes, "x")
    if not is_books:
        figure.supxlabel("left is better; large: mean and 95 % interval, small: documents", fontsize=9)
    save_figure(figure, path)


def plot_distances(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str) -> None:
    """Draw what each system saves by how far back stands what a token repeats; the metrics' `distances` are not None."""
    found = metrics["distances"]
    groups = {name: group for name, group in found["groups"].items() if group["systems"]}
    systems, middles = list(next(iter(groups.values()))["systems"]), range(len(groups))
    axes = (figure := new_figure((9.5, 5.5), textwrap.fill(title, 90))).add_subplot()
    for number, system in enumerate(systems):
        shift = 0.5 * ((number + 0.5) / len(systems) - 0.5)  # side by side, so that intervals can be told apart
        gains = [group["systems"][system] for group in groups.values()]
        draw_estimates(axes, [place + shift for place in middles], gains, system, title_of_system(system))
    axes.axhline(0, color="black", linewidth=0.8)
    ticks = [f"{name}\n{group['tokens']:,}" for name, group in groups.items()]
    axes.set_xticks(middles, ticks, fontsize=9)
    axes.set_xlabel(f"tokens back to where the same {found['ngram']} tokens last ended, and how many were scored")
    axes.set_ylabel(f"nats per token saved against\n{title_of_system(found['against'])} (mean, 95 %)")
    tidy(axes, "y")
    axes.legend(fontsize=9, frameon=False)
    save_figure(figure, path)
