"""Figures of a bank: what in it is stale, and what index settings are worth on its keys."""

import textwrap
from collections.abc import Sequence
from os import PathLike

from longmem.memory.index.tuning import Tuned
from longmem.memory.refresh import StalenessReport, VersionStaleness
from longmem.plots.style import COLORS, new_figure, save_figure, short_count, tidy

FRESH, UNKNOWN = COLORS["on"], COLORS["backbone"]
# From one change of the encoder behind to five or more.
BEHIND = ("#f2c14e", "#e59a3c", "#d46a35", "#b5455f", "#6d2e46")
MOST_DOCUMENTS = 40
INDEX_COLORS = {"auto": "#1f6fb4", "ivf": "#2a9d8f", "hnsw": "#d98c21", "pq": "#b5455f"}


def plot_staleness(path: str | PathLike[str], report: StalenessReport, *, title: str) -> None:
    """Draw a bar of tokens for each document, colored by how far the encoder that wrote them is behind.

    Of more than 40 documents those with the most stale tokens are drawn, and how many there are is said.
    """
    documents = sorted(report.documents, key=lambda each: -each.stale_share * each.tokens)[:MOST_DOCUMENTS]
    figure = new_figure((10, 1.9 + 0.3 * max(4, len(documents))), textwrap.fill(title, 90))
    axes = figure.add_subplot()
    lefts = [0] * len(documents)
    places = range(len(documents))
    for version in sorted(report.versions, key=lambda each: (not each.is_fresh, each.lag is None, each.lag)):
        widths = [document.tokens_of.get(version.version, 0) for document in documents]
        color = color_of_version(version)
        # Versions of one color are told apart by their edges.
        axes.barh(places, widths, 0.7, lefts, color=color, edgecolor="white", linewidth=0.6, label=label(version))
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    names = [textwrap.shorten(document.document_id, 40, placeholder=" ...") for document in documents]
    axes.set_yticks(list(places), names, fontsize=8)
    axes.set_ylim(len(documents) - 0.4, -0.6)
    axes.set_xlabel("tokens in memory, by the encoder that wrote them")
    if len(documents) < len(report.documents):
        shown = f"{len(documents)} of {len(report.documents)} documents"
        axes.set_title(f"{shown}: those with the most stale tokens", fontsize=10)
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    tidy(axes, "x")
    if report.versions:
        figure.legend(loc="outside lower center", fontsize=8, ncols=2, frameon=False)
    save_figure(figure, path)


def color_of_version(version: VersionStaleness) -> str:
    """Return blue for fresh, grey for unknown, and the darker a color the further an encoder is behind."""
    if version.lag is None:
        return UNKNOWN
    return BEHIND[min(version.lag, len(BEHIND)) - 1] if version.lag else FRESH


def label(version: VersionStaleness) -> str:
    """Return what the legend says of an encoder.

    >>> label(VersionStaleness(0, "1f" * 16, 64, 2, 0.00123, None, ("weights",)))
    '1f1f1f1f: 2 changes behind, gap 0.00123'
    """
    if version.lag is None:
        return "nobody knows which encoder"
    if not version.lag:
        return f"{short_digest(version)}: fresh"
    gap = "not known" if version.gap is None else f"{version.gap:.3g}"
    return f"{short_digest(version)}: {version.lag} change{'s' * (version.lag > 1)} behind, gap {gap}"


def short_digest(version: VersionStaleness) -> str:
    """Return the start of a fingerprint, enough to tell encoders apart."""
    return (version.digest or "unknown")[:8]


def plot_tuning(path: str | PathLike[str], results: Sequence[Tuned], *, title: str) -> None:
    """Draw the recall of index settings against their latency, a color for each kind: up and to the left is better."""
    figure = new_figure((9, 5.5), textwrap.fill(title, 90))
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
    tidy(axes, "both")
    save_figure(figure, path)
