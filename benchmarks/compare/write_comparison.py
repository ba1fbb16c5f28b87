"""Write the page of a comparison from the cells that were run: tables, pictures, and first of all where LongMem loses.

python benchmarks/compare/write_comparison.py docs/results/comparison docs/comparison.md
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from systems import SYSTEMS
from work import WORK

from longmem.evaluation.folder import CONFIG, PREDICTIONS, read_lines
from longmem.evaluation.intervals import clustered_mean
from longmem.evaluation.tables import markdown_table, with_interval
from longmem.files import make_folder, read_json, write_file
from longmem.plots.style import new_figure, panels_of, save_figure, tidy

FEWEST = 10  # questions below which nothing is decided
MINE = "longmem"


class Cell(NamedTuple):
    """What a system did on a kind of work: its mean with the ends of its interval, and what it cost.

    `seconds` of answering a question, `feeding` seconds for 1,000 tokens fed, `kept` bytes, `peak` bytes above the start,
    `run` tokens run through the backbone for a question, of feeding and of answering.
    """

    records: Sequence[Mapping[str, Any]]
    value: float
    interval: tuple[float, float]
    seconds: float
    feeding: float
    kept: float
    peak: float
    run: float


def read_cells(folder: Path) -> dict[str, dict[str, Cell]]:
    """Return the cells of a folder by work and system, each with the questions that all systems of its work were asked."""
    found: dict[str, dict[str, Cell]] = {}
    for work in WORK:
        files = {name: folder / work / name / PREDICTIONS for name in SYSTEMS}
        records = {
            name: {each["id"].rpartition("/")[0]: each for each in read_lines(file)}
            for name, file in files.items()
            if file.exists()
        }
        records = {name: own for name, own in records.items() if own}
        if records:
            common = set.intersection(*(set(own) for own in records.values()))
            found[work] = {
                name: cell_of(work, [own[key] for key in sorted(common)]) for name, own in records.items() if common
            }
    return {work: cells for work, cells in found.items() if cells}


def cell_of(work: str, records: Sequence[Mapping[str, Any]]) -> Cell:
    """Return the figures of some records."""
    scale = 100 if WORK[work].unit == "%" else 1
    values = [scale * record[WORK[work].measure] for record in records]
    value, *ends = clustered_mean(values, [record["group"] for record in records])
    mean = statistics.fmean
    return Cell(
        records=records,
        value=value,
        interval=(ends[0], ends[1]),
        seconds=mean(record["seconds"] for record in records),
        feeding=1000 * mean(record["feeding_seconds"] / max(1, record["fed_tokens"]) for record in records),
        kept=mean(record["kept_bytes"] for record in records),
        peak=max(record["peak_bytes"] for record in records),
        run=mean(record["tokens_run"] / record["asked_together"] for record in records),
    )


def above(cells: Mapping[str, Cell], name: str, other: str, work: str) -> tuple[float, float, float]:
    """Return by how much a system is above another on the same questions, and the interval."""
    scale = 100 if WORK[work].unit == "%" else 1
    pairs = list(zip(cells[name].records, cells[other].records, strict=True))
    values = [scale * (one[WORK[work].measure] - two[WORK[work].measure]) for one, two in pairs]
    return clustered_mean(values, [one["group"] for one, _ in pairs])


def on_the_line(cells: Mapping[str, Cell], cost: str) -> list[str]:
    """Return the systems than which none is better and costs no more, nor as good and cheaper."""
    found = []
    for name, own in cells.items():
        price = getattr(own, cost)
        others = [(each.value, getattr(each, cost)) for key, each in cells.items() if key != name]
        beaten = any(
            value >= own.value and other <= price and (value, other) != (own.value, price) for value, other in others
        )
        found += [] if beaten else [name]
    return found


def losses(cells: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """Return a line for each kind of work on which some system is better than LongMem, and by how much."""
    found = []
    for work, own in cells.items():
        if MINE not in own:
            continue
        unit, count = WORK[work].unit, len(own[MINE].records)
        better = sorted((name for name in own if own[name].value > own[MINE].value), key=lambda name: -own[name].value)
        if better:
            value, *ends = above(own, better[0], MINE, work)
            sure = "" if ends[0] > 0 and count >= FEWEST else ", which may be chance"
            form = "+.1f" if unit == "%" else "+.3f"
            names = ", ".join(SYSTEMS[name].title for name in better)
            found.append(
                f"- **{WORK[work].title}** ({count} questions): {names}; the best of them by "
                f"{with_interval(value, ends if count > 1 else (), form)} {unit}{sure}."
            )
        mine = own[MINE]
        cheap = [
            SYSTEMS[name].title
            for name, each in own.items()
            if each.value >= mine.value and each.kept < mine.kept and each.feeding < mine.feeding
        ]
        if cheap:
            found.append(
                f"- **{WORK[work].title}**: as good or better, quicker to feed, fewer bytes: {', '.join(cheap)}."
            )
    return found or ["Nowhere in what was measured, which may be chance."]


def table_of(work: str, cells: Mapping[str, Cell]) -> str:
    """Return the table of a kind of work, its systems in order, with what each cost."""
    unit, form = WORK[work].unit, ".1f" if WORK[work].unit == "%" else ".3f"
    lines = {cost: on_the_line(cells, cost) for cost in ("seconds", "kept")}
    rows = [
        [
            "",
            f"{unit} (95 %)",
            "s per question",
            "s per 1,000 tokens fed",
            "tokens run per question",
            "bytes kept",
            "peak",
        ]
    ]
    for name in (name for name in SYSTEMS if name in cells):
        own, stars = (
            cells[name],
            "".join(mark for cost, mark in (("seconds", "†"), ("kept", "‡")) if name in lines[cost]),
        )
        rows.append(
            [
                f"{SYSTEMS[name].title}{stars}",
                with_interval(own.value, own.interval if len(own.records) > 1 else (), form),
                f"{own.seconds:.2f}",
                f"{own.feeding:.2f}",
                f"{own.run:,.0f}",
                spelled_bytes(own.kept),
                spelled_bytes(own.peak),
            ]
        )
    return markdown_table(rows)


def spelled_bytes(count: float) -> str:
    """Return a number of bytes for people.

    >>> spelled_bytes(900), spelled_bytes(2_500_000)
    ('900 B', '2.5 MB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def draw(path: Path, cells: Mapping[str, Mapping[str, Cell]], cost: str, label: str) -> None:
    """Draw quality against a cost, a panel for each kind of work, with the line of those that none beats in both."""
    figure = new_figure((13, 4.2 * math.ceil(len(cells) / 3)))
    for axes, (work, own) in zip(panels_of(figure, len(cells), 3), cells.items(), strict=True):
        line = sorted((getattr(own[name], cost), own[name].value) for name in on_the_line(own, cost))
        axes.step(*zip(*line, strict=True), where="post", color="#bbbbbb", linewidth=1)
        for name, cell in own.items():
            color = "#1f6fb4" if name == MINE else "#767676"
            axes.plot([getattr(cell, cost)], [cell.value], "o", color=color)
            axes.annotate(
                SYSTEMS[name].title,
                (getattr(cell, cost), cell.value),
                fontsize=6,
                xytext=(3, 3),
                textcoords="offset points",
            )
        axes.set_xscale("log")
        axes.set_title(f"{WORK[work].title} ({len(next(iter(own.values())).records)} questions)", fontsize=10)
        axes.set_xlabel(label, fontsize=9)
        axes.set_ylabel(WORK[work].unit, fontsize=9)
        tidy(axes, "both")
    save_figure(figure, path)


def page_of(
    cells: Mapping[str, Mapping[str, Cell]], folder: Path, settings: Mapping[str, Any], peers: Sequence[str]
) -> str:
    """Return the page."""
    counts = {len(cell.records) for own in cells.values() for cell in own.values()}
    spelled = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    small = (
        f" **Fewer than {FEWEST} questions in some cells decide nothing about quality**; costs need fewer."
        if min(counts) < FEWEST
        else ""
    )
    lines = [
        "# Comparison",
        "",
        f"{len({name for own in cells.values() for name in own})} systems on {len(cells)} kinds of work; questions in each "
        f"cell: {spelled}, "
        f"the same for all systems of a kind; backbone {settings['model']} in {settings['dtype']}, a window of "
        f"{settings['window']} tokens, texts of about {settings['size']:,} tokens where the work leaves that open. Seconds "
        f"are those of one processor. What LongMem and the systems written as its configurations run for recall and notes "
        f"includes text without the fact, or before an update, that other questions share.{small}",
        "",
        "**Where LongMem loses.** On each kind of work, the systems with a better mean, the best first:",
        "",
        *losses(cells),
        "",
        "† No system is better and answers as fast, ‡ none is better and keeps as few bytes (the Pareto line).",
        "",
        "![Quality against seconds for a question](pictures/comparison-time.png)",
        "",
        "![Quality against bytes kept](pictures/comparison-bytes.png)",
        "",
    ]
    for work, own in cells.items():
        lines += [
            f"## {WORK[work].title}",
            "",
            f"Questions: {len(next(iter(own.values())).records)}.",
            "",
            table_of(work, own),
            "",
        ]
    lines += ["## Systems", "", *(f"- **{each.title}**: {each.note}." for each in SYSTEMS.values()), ""]
    lines += ["## Peers apart", "", *peers, ""] if peers else []
    lines += [
        "## Again",
        "",
        "Each cell is a folder with settings, versions and a record for every question, without texts. The same command goes "
        "on with more `--trials`:",
        "",
        f"    python benchmarks/compare/run_compare.py {folder} --trials 10 --size {settings['size']} --window "
        f"{settings['window']} --data WORK=PATH",
        f"    python benchmarks/compare/write_comparison.py {folder} docs/comparison.md",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, help="folder that `run_compare.py` has written")
    parser.add_argument("page", type=Path, help="Markdown file to write; pictures go into `pictures` beside it")
    arguments = parser.parse_args()
    cells = read_cells(arguments.cells)
    if not cells:
        parser.error(f"`cells` must hold what `run_compare.py` has written, got {str(arguments.cells)!r} without any.")
    config = read_json(next(arguments.cells.glob(f"*/*/{CONFIG}")))
    settings = {**config["settings"], "size": config["size"]}
    notes = arguments.cells / "peers.md"
    peers = notes.read_text(encoding="utf-8").strip().splitlines() if notes.exists() else []
    make_folder(arguments.page.parent / "pictures")
    for cost, name, label in (("seconds", "time", "seconds for a question"), ("kept", "bytes", "bytes kept")):
        draw(arguments.page.parent / "pictures" / f"comparison-{name}.png", cells, cost, label)
    write_file(arguments.page, page_of(cells, arguments.cells, settings, peers))


if __name__ == "__main__":
    main()
