"""Write the page of a comparison from the cells that were run: first of all where LongMem wins, where it loses and why.

python benchmarks/compare/write_comparison.py docs/results/comparison docs/comparison.md

Of the folder, `why.md` (causes of losses), `dated.md` and `peers.md` go into the page where they are there.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.ticker import LogLocator, NullFormatter
from systems import SYSTEMS
from work import WORK

from longmem.evaluation.folder import CONFIG, PREDICTIONS, read_lines
from longmem.evaluation.intervals import clustered_mean
from longmem.evaluation.tables import markdown_table, with_interval
from longmem.files import make_folder, read_json, write_file
from longmem.plots.style import new_figure, panels_of, save_figure, tidy

FEWEST = 10  # questions below which nothing is decided
TEXTS = 5  # texts from which on they, and not questions, are resampled for intervals
MINE = "longmem"
FORMS = ("untrained", "released", "off", MINE)  # LongMem itself in other forms, no peers
FIXED = ("size", "work", "task", "settings", "data")  # what all cells of a kind of work must have in common
DISTANCES = ("recall", "recall-16k", "recall-65k")
BRIEF = ("recall-16k", "told", "longeval")  # in the picture for those who read no further
Cells = Mapping[str, "Cell"]


class Cell(NamedTuple):
    """What a system did on a kind of work: its mean with the ends of its interval, and what it cost.

    `seconds` of answering a question, `feeding` seconds for 1,000 tokens fed and `fed` tokens of a text, `kept` bytes, `peak`
    bytes above the start, `encoded` tokens run for 1,000 tokens fed, `run` for a question.
    """

    records: Sequence[Mapping[str, Any]]
    value: float
    interval: tuple[float, float]
    seconds: float
    feeding: float
    fed: float
    kept: float
    peak: float
    encoded: float
    run: float


def read_cells(folder: Path) -> tuple[dict[str, dict[str, Cell]], list[str]]:
    """Return the cells of a folder by work and system, each with the questions that all systems of its work were asked.

    A cell with too few questions is left out where another has enough, and named in the second value. Raises ValueError where
    cells of a kind of work were asked other things.
    """
    found, left_out = dict[str, dict[str, Cell]](), []
    for work in WORK:
        files = {name: folder / work / name / PREDICTIONS for name in SYSTEMS}
        records = {
            name: {each["id"].rpartition("/")[0]: each for each in read_lines(file, {"id": str})}
            for name, file in files.items()
            if file.exists()
        }
        needed = min(FEWEST, max(map(len, records.values()), default=0))
        left_out += [f"{WORK[work].title}, {SYSTEMS[name].title}" for name, own in records.items() if len(own) < needed]
        records = {name: own for name, own in records.items() if own and len(own) >= needed}
        asked = {name: {key: read_json(files[name].with_name(CONFIG))[key] for key in FIXED} for name in records}
        for name, own in asked.items():
            if own != next(iter(asked.values())):
                raise ValueError(
                    f"`cells` of a kind of work must be asked the same, but {folder / work / name} has other settings or data "
                    f"than {folder / work / next(iter(asked))}; delete one of them and run it again."
                )
        common = set.intersection(*(set(own) for own in records.values())) if records else set()
        if common:
            found[work] = {name: cell_of(work, [own[key] for key in sorted(common)]) for name, own in records.items()}
    return found, left_out


def mean_of(values: Sequence[float], records: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Return a mean with its 95 % interval, over texts where there are enough of them, else over questions."""
    texts = [record["group"] for record in records]
    return clustered_mean(values, texts if len(set(texts)) >= TEXTS else list(map(str, range(len(texts)))))


def cell_of(work: str, records: Sequence[Mapping[str, Any]]) -> Cell:
    """Return the figures of some records."""
    value, *ends = mean_of([scale_of(work) * record[WORK[work].measure] for record in records], records)
    mean = statistics.fmean
    return Cell(
        records=records,
        value=value,
        interval=(ends[0], ends[1]),
        seconds=mean(record["seconds"] for record in records),
        feeding=1000 * mean(record["feeding_seconds"] / max(1, record["fed_tokens"]) for record in records),
        fed=mean(record["fed_tokens"] for record in records),
        kept=mean(record["kept_bytes"] for record in records),
        peak=max(record["peak_bytes"] for record in records),
        encoded=1000 * mean(record["fed_run"] / max(1, record["fed_tokens"]) for record in records),
        run=mean(record["tokens_run"] for record in records),
    )


def scale_of(work: str) -> int:
    """Return what scores are multiplied by: 100 of shares."""
    return 100 if WORK[work].unit == "%" else 1


def form_of(work: str, sign: str = "") -> str:
    """Return how values of a kind of work are written."""
    return sign + (".1f" if WORK[work].unit == "%" else ".3f")


def above(cells: Cells, name: str, other: str, work: str) -> tuple[float, float, float]:
    """Return by how much a system is above another on the same questions, and the interval."""
    pairs = list(zip(cells[name].records, cells[other].records, strict=True))
    values = [scale_of(work) * (one[WORK[work].measure] - two[WORK[work].measure]) for one, two in pairs]
    return mean_of(values, [one for one, _ in pairs])


def on_the_line(cells: Cells, cost: str) -> list[str]:
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


def verdict(cells: Cells, work: str) -> str:
    """Return whether LongMem wins against every peer, loses against any, or neither is decided by the intervals.

    Fewer than ten questions decide nothing.
    """
    peers = [name for name in cells if name not in FORMS]
    if len(cells[MINE].records) < FEWEST or not peers:
        return "undecided"
    if any(above(cells, name, MINE, work)[1] > 0 for name in peers):
        return "loses"
    return "wins" if all(above(cells, MINE, name, work)[1] > 0 for name in peers) else "undecided"


def overview(cells: Mapping[str, Cells]) -> list[str]:
    """Return the first table: LongMem beside the best peer of each kind of work; and which peers it loses and wins against."""
    rows = [["", "n", "LongMem", "best other system", "LongMem above it (95 %)", "", "on the line of time", "of bytes"]]
    lost, won = [], []
    for work, own in cells.items():
        peers = [name for name in own if name not in FORMS]
        if MINE not in own or not peers:
            continue
        best = max(peers, key=lambda name: own[name].value)
        value, *ends = above(own, MINE, best, work)
        unit = "" if WORK[work].unit == "%" else ", nats"
        rows.append(
            [
                f"{WORK[work].title}{unit}",
                str(len(own[MINE].records)),
                format(own[MINE].value, form_of(work)),
                f"{SYSTEMS[best].title}: {own[best].value:{form_of(work)}}",
                with_interval(value, ends, form_of(work, "+")),
                verdict(own, work),
                *("yes" if MINE in on_the_line(own, cost) else "no" for cost in ("seconds", "kept")),
            ]
        )
        for found, pair in ((lost, lambda name: (name, MINE)), (won, lambda name: (MINE, name))):
            sure = [name for name in peers if len(own[MINE].records) >= FEWEST and above(own, *pair(name), work)[1] > 0]
            if sure:
                found.append(f"{WORK[work].title} ({', '.join(SYSTEMS[name].title for name in sure)})")
    return [
        markdown_table(rows),
        "",
        f"- **LongMem loses**, and the interval says so: {'; '.join(lost) or 'nowhere'}.",
        f"- **LongMem wins**, and the interval says so: {'; '.join(won) or 'nowhere'}.",
        *cheaper(cells),
    ]


def cheaper(cells: Mapping[str, Cells]) -> list[str]:
    """Return a line for each way in which some peer is cheaper: as good with less, and feeding against answering."""
    found = []
    for work, own in cells.items():
        if MINE not in own:
            continue
        mine = own[MINE]
        names = [
            SYSTEMS[name].title
            for name, each in own.items()
            if name not in FORMS
            and each.value >= mine.value
            and each.kept <= mine.kept
            and each.feeding <= mine.feeding
            and each.seconds <= mine.seconds
        ]
        if names:
            found.append(f"{WORK[work].title} ({', '.join(names)})")
    lines = [f"- **As good or better, and cheaper in all** (feeding, answering, bytes): {'; '.join(found) or 'none'}."]
    own = next(
        (cells[work] for work in DISTANCES[::-1] if work in cells and {MINE, "bm25"} <= cells[work].keys()), None
    )
    if own:
        fed = own[MINE].fed / 1000 * (own[MINE].feeding - own["bm25"].feeding)
        saved = own["bm25"].seconds - own[MINE].seconds
        many = f"after {fed / saved:,.0f} questions about it" if saved > 0 else "never"
        lines.append(
            f"- **Reading costs**: a text of {own[MINE].fed:,.0f} tokens takes {fed:,.0f} s more to read than for passages by "
            f"BM25; what a question takes less has made up for that {many}."
        )
    return lines


def by_distance(cells: Mapping[str, Cells]) -> list[str]:
    """Return the table of recall by distance: what is right, and how many right answers a second of answering gives."""
    works = [work for work in DISTANCES if work in cells]
    if not works:
        return []
    rows = [["", *(each for work in works for each in (f"{WORK[work].title}, %", "right per second"))]]
    for name in (name for name in SYSTEMS if any(name in cells[work] for work in works)):
        row = [SYSTEMS[name].title]
        for work in works:
            cell = cells[work].get(name)
            row += ["", ""] if cell is None else [f"{cell.value:.0f}", f"{cell.value / 100 / cell.seconds:.2f}"]
        rows.append(row)
    return ["## Recall by distance", "", markdown_table(rows), ""]


def table_of(work: str, cells: Cells) -> str:
    """Return the table of a kind of work, its systems in order, with what each cost."""
    lines = {cost: on_the_line(cells, cost) for cost in ("seconds", "kept")}
    heads = ("s per question", "s per 1,000 fed", "tokens run per question", "per 1,000 fed", "bytes kept", "peak")
    rows = [["", f"{WORK[work].unit} (95 %)", *heads]]
    for name in (name for name in SYSTEMS if name in cells):
        own = cells[name]
        stars = "".join(mark for cost, mark in (("seconds", "†"), ("kept", "‡")) if name in lines[cost])
        rows.append(
            [
                f"{SYSTEMS[name].title}{stars}",
                with_interval(own.value, own.interval if len(own.records) > 1 else (), form_of(work)),
                f"{own.seconds:.2f}",
                f"{own.feeding:.2f}",
                f"{own.run:,.0f}",
                f"{own.encoded:,.0f}",
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


def draw(path: Path, cells: Mapping[str, Cells], cost: str, label: str) -> None:
    """Draw quality against a cost, a panel for each kind of work, with the line of those that none beats in both."""
    columns = min(3, len(cells))
    figure = new_figure((4.3 * columns, 3.6 * math.ceil(len(cells) / columns) + 0.9))
    shown: dict[str, Any] = {}
    for axes, (work, own) in zip(panels_of(figure, len(cells), columns), cells.items(), strict=True):
        line = sorted((getattr(own[name], cost), own[name].value) for name in on_the_line(own, cost))
        axes.step(*zip(*line, strict=True), where="post", color="#bbbbbb", linewidth=1)
        for name, cell in own.items():
            marker, color = LOOKS[name]
            size = 11 if name == MINE else 7
            (shown[SYSTEMS[name].title],) = axes.plot(
                [getattr(cell, cost)], [cell.value], marker, color=color, markersize=size
            )
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        if high / low < 30:  # else the ticks of decades are enough
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{WORK[work].title} ({len(next(iter(own.values())).records)} questions)", fontsize=10)
        axes.set_xlabel(label, fontsize=9)
        axes.set_ylabel(WORK[work].unit, fontsize=9)
        tidy(axes, "both")
    titles = [each.title for each in SYSTEMS.values() if each.title in shown]
    options = {"loc": "outside lower center", "ncols": 2 * columns, "fontsize": 8, "frameon": False}
    figure.legend([shown[title] for title in titles], titles, **options)
    save_figure(figure, path)


_MARKERS, _GREYS = "osD^v<>PX*hd", ("#767676", "#7a5aa6", "#5a8f4e", "#b5455f", "#d98c21")
LOOKS = {name: (_MARKERS[n % len(_MARKERS)], _GREYS[n % len(_GREYS)]) for n, name in enumerate(SYSTEMS)}
LOOKS[MINE] = ("o", "#1f6fb4")


def page_of(
    cells: Mapping[str, Cells],
    left_out: Sequence[str],
    folder: Path,
    settings: Mapping[str, Any],
    notes: Mapping[str, str],
) -> str:
    """Return the page."""
    counts = {len(cell.records) for own in cells.values() for cell in own.values()}
    spelled = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    few = f" **Fewer than {FEWEST} questions decide nothing about quality.**" if min(counts) < FEWEST else ""
    lines = [
        "# Comparison",
        "",
        f"{len({name for own in cells.values() for name in own})} systems on {len(cells)} kinds of work with {spelled} "
        f"questions each, the same for all systems; backbone {settings['model']} in {settings['dtype']}, a window of "
        f'{settings["window"]} tokens for all that do not say otherwise.{few} "Wins" and "loses" are said where the 95 % '
        "interval of the difference on the same questions leaves no doubt, against every other system and any other system.",
        "",
        *overview(cells),
        "",
        *([notes["why"], ""] if notes.get("why") else []),
        "![Quality against seconds for a question](pictures/comparison-time.png)",
        "",
        "![Quality against bytes kept](pictures/comparison-bytes.png)",
        "",
        *by_distance(cells),
        "## How it was measured",
        "",
        "A text is fed once, then asked about. Seconds are those of one processor, of a question as if it were the only one, "
        "behind a text that was fed: what stands before it in the window is run for each question. Choices are the likeliest "
        f"value per token. Intervals resample texts where there are {TEXTS} or more, else questions. † No system is better and "
        "answers as fast, ‡ none is better and keeps as few bytes (the Pareto line). Other forms of LongMem are no other "
        "systems in what is won and lost. Nothing was tuned for any system."
        + (f" Left out for too few questions: {'; '.join(left_out)}." if left_out else ""),
        "",
    ]
    for work, own in cells.items():
        chance = "" if WORK[work].chance is None else f" A guess is right in {WORK[work].chance:.0f} %."
        count = len(next(iter(own.values())).records)
        texts = len({record["text"] for record in next(iter(own.values())).records})
        about = f"{WORK[work].note[0].upper()}{WORK[work].note[1:]}. Questions: {count}, texts: {texts}, of "
        fed = f"{next(iter(own.values())).fed:,.0f} tokens.{chance}"
        lines += [f"## {WORK[work].title}", "", about + fed, "", table_of(work, own), ""]
    lines += ["## Systems", "", *(f"- **{each.title}**: {each.note}." for each in SYSTEMS.values()), ""]
    for name, title in (("dated", "Newer than the model"), ("peers", "Peers apart")):
        lines += [f"## {title}", "", notes[name], ""] if notes.get(name) else []
    lines += [
        "## Again",
        "",
        "Each cell is a folder with what it depends on, versions and a record for every question, without texts. The same "
        "command goes on with more `--trials`:",
        "",
        f"    python benchmarks/compare/run_compare.py {folder} --trials 30 --size {settings['size']} --window "
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
    cells, left_out = read_cells(arguments.cells)
    if not cells:
        parser.error(f"`cells` must hold what `run_compare.py` has written, got {str(arguments.cells)!r} without any.")
    config = read_json(next(arguments.cells.glob(f"*/*/{CONFIG}")))
    settings = {**config["settings"], "size": config["size"]}
    files = {name: arguments.cells / f"{name}.md" for name in ("why", "dated", "peers")}
    notes = {name: file.read_text(encoding="utf-8").strip() for name, file in files.items() if file.exists()}
    make_folder(arguments.page.parent / "pictures")
    for cost, name, label in (("seconds", "time", "seconds for a question"), ("kept", "bytes", "bytes kept")):
        draw(arguments.page.parent / "pictures" / f"comparison-{name}.png", cells, cost, label)
    brief = {work: cells[work] for work in BRIEF if work in cells} or cells
    draw(arguments.page.parent / "pictures" / "comparison.png", brief, "seconds", "seconds for a question")
    write_file(arguments.page, page_of(cells, left_out, arguments.cells, settings, notes))


if __name__ == "__main__":
    main()
