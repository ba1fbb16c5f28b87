"""The normal form in which results of evaluations are recorded: what is written, and when two results are the same.

A result is a dictionary of plain values that says nothing of files, classes or settings' names:

- `settings`: what is evaluated (`recorded_inputs.SETTINGS`).
- `cases`: what was asked or read, with what is right about it.
- `records`: one for each answer or reading: the case, the system, its losses, likelihoods, choices, texts.
- `metrics`: by measure, system and axis (a length, a size, "all") the `mean`, with `low` and `high` where there is an interval.
- `tables`: heading and rows of each table for people, without columns of seconds.
- `figures`: by name what is drawn: titles, labels, lines, bars, error bars, maps, texts.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

FOLDER = Path(__file__).parent / "recorded"
RELATIVE, ABSOLUTE = 1e-4, 1e-5  # float32 on another processor
# Sharp attention over keys and values in float16, whose last bit another processor may round the other way.
RELATIVE_OF = {"staleness-policies": 1e-3}
ABSOLUTE_METRICS = 5e-4  # percents of differences between such numbers, which are on record with more digits
FOR_PEOPLE = ("tables", "figures")  # their texts hold rounded numbers
NUMBER = re.compile(r"-?\d+\.\d+")  # counts are exact

Result = dict[str, Any]


# Plain values ------------------------------------------------------------------------------------------------------


def plain(content: Any) -> Any:
    """Return what JSON holds of some content: floats with six decimals, None for NaN, keys as text."""
    if isinstance(content, Mapping):
        return {str(name): plain(each) for name, each in content.items()}
    if hasattr(content, "tolist"):  # a tensor or an array
        return plain(content.tolist())
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [plain(each) for each in content]
    if isinstance(content, float):
        return None if math.isnan(content) else round(content, 6) + 0.0  # + 0.0: no "-0.0"
    return content


def pretty(content: Any, indent: int = 0) -> str:
    """Return JSON in which whatever fits a line stands on one."""
    line = json.dumps(content)
    if len(line) + indent <= 118 or not isinstance(content, (dict, list)) or not content:
        return line
    inside = " " * (indent + 1)
    if isinstance(content, dict):
        parts = [f"{json.dumps(name)}: {pretty(each, indent + 1)}" for name, each in content.items()]
    elif all(isinstance(each, (int, float)) for each in content):
        return line  # a row of numbers, however long
    else:
        parts = [pretty(each, indent + 1) for each in content]
    start, end = "{}" if isinstance(content, dict) else "[]"
    return f"{start}\n{inside}" + f",\n{inside}".join(parts) + f"\n{' ' * indent}{end}"


def file_of(kind: str) -> Path:
    """Return the file of a kind of evaluation."""
    return FOLDER / f"{kind}.json"


def read(kind: str) -> Result:
    """Return the recorded result of a kind of evaluation."""
    return json.loads(file_of(kind).read_text(encoding="utf-8"))


def write(kind: str, result: Result) -> None:
    """Record a result."""
    FOLDER.mkdir(exist_ok=True)
    file_of(kind).write_text(pretty(result) + "\n", encoding="utf-8")


# The same or not -----------------------------------------------------------------------------------------------------


def differences(
    found: Any, expected: Any, place: str = "", part: str = "", relative: float = RELATIVE
) -> Iterator[str]:
    """Yield a line for each value that differs: floats beyond what processors differ by, anything else at all.

    In texts of tables and figures, numbers with decimals may differ by one of the last.

    Args:
        found: a result in normal form, or something in it.
        expected: the same, as recorded.
        place: of these two in the result.
        part: of the result that they are in: `records`, `metrics` and so on.
        relative: share of a float by which it may differ.
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in dict.fromkeys([*expected, *found]):
            if name not in found or name not in expected:
                yield f"{place}/{name}: {'missing' if name in expected else 'new'}"
            else:
                yield from differences(found[name], expected[name], f"{place}/{name}", part or name, relative)
    elif isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            yield f"{place}: {len(found)} values instead of {len(expected)}"
        for number, (one, other) in enumerate(zip(found, expected, strict=False)):
            yield from differences(one, other, f"{place}/{number}", part, relative)
    elif not same(found, expected, part, relative):
        yield f"{place}: {found!r} instead of {expected!r}"


def same(found: Any, expected: Any, part: str, relative: float) -> bool:
    """Return whether two values of a part of a result are the same."""
    if isinstance(found, float) or isinstance(expected, float):
        numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (found, expected))
        absolute = ABSOLUTE if part in ("cases", "records") else ABSOLUTE_METRICS
        return numbers and math.isclose(found, expected, rel_tol=relative, abs_tol=absolute)
    if part in FOR_PEOPLE and isinstance(found, str) and isinstance(expected, str):
        return same_text(found, expected)
    return type(found) is type(expected) and found == expected


def same_text(found: str, expected: str) -> bool:
    """Return whether two texts are the same but for the last decimal of their numbers.

    >>> same_text("2.34 (1.00 to 3.10)", "2.35 (1.00 to 3.10)"), same_text("2.34", "2.36"), same_text("7 of 8", "6 of 8")
    (True, False, False)
    """
    if NUMBER.sub("#", found.replace("+", "-")) != NUMBER.sub("#", expected.replace("+", "-")):
        return False
    pairs = zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True)
    return all(
        abs(float(one) - float(other)) < 1.5 * 10.0 ** -len(other.partition(".")[2])
        or math.isclose(float(one), float(other), rel_tol=RELATIVE)
        for one, other in pairs
    )


# Metrics -------------------------------------------------------------------------------------------------------------


def note(
    metrics: Result, measure: str, system: str, axis: str, mean: float | None, interval: Sequence[float] = ()
) -> None:
    """Add one number, with its interval if there is one, to metrics in normal form."""
    value = {"mean": mean} | dict(zip(("low", "high"), interval, strict=False))
    metrics.setdefault(measure, {}).setdefault(system, {})[axis] = value


# Tables --------------------------------------------------------------------------------------------------------------


def tables_of(markdown: str, without: Sequence[str]) -> list[Result]:
    """Return the tables of a Markdown text with their headings; columns are left out whose head is among `without`."""
    found: list[Result] = []
    heading, is_inside = "", False
    for line in markdown.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not is_inside:
                found.append({"heading": heading, "rows": []})
                kept = [number for number, head in enumerate(cells) if head not in without]
                heading = ""
            if not set(line) <= set("|-: "):
                found[-1]["rows"].append([cells[number] for number in kept])
        elif line.startswith(("#", "**")):
            heading = line.strip("#* ")
        is_inside = line.startswith("|")
    return found


# Figures -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def drawn() -> Iterator[dict[str, Result]]:
    """Give a dictionary that gets what is drawn inside the block, by file name; no picture is written."""
    figures: dict[str, Result] = {}

    def keep(figure: Any, path: Any, **_: Any) -> None:
        # Figures are drawn into drafts of their files, named `.NAME.WORD.draft`.
        figures[re.sub(r"^\.(\d{5}-)?|\.[^.]+\.draft$", "", Path(path).stem)] = figure_of(figure)

    with patch("matplotlib.figure.Figure.savefig", keep):
        yield figures


def figure_of(figure: Any) -> Result:
    """Return what a figure of matplotlib shows, but for colors and sizes."""
    panels = [panel_of(axes) for axes in figure.axes if axes.get_visible()]
    return {"title": words(figure.get_suptitle()), "panels": panels}


def panel_of(axes: Any) -> Result:
    """Return what a panel shows; what it has none of is left out."""
    bars = [each for each in axes.containers if hasattr(each, "patches")]
    errors = [each for each in axes.containers if hasattr(each, "has_yerr")]
    parts = {part for each in errors for part in (each.lines[0], *each.lines[1])}
    found = {
        "title": words(axes.get_title()),
        "x": words(axes.get_xlabel()),
        "y": words(axes.get_ylabel()),
        "x ticks": ticks_of(axes.xaxis),
        "y ticks": ticks_of(axes.yaxis),
        "lines": [line_of(line, line.get_label()) for line in axes.lines if line not in parts],
        "lines with error bars": [
            line_of(each.lines[0], each.get_label())
            | {"ends": [[end[1] for end in segment] for segment in each.lines[2][0].get_segments()]}
            for each in errors
        ],
        "bars": [
            {"label": each.get_label(), "bars": [[*bar.get_xy(), bar.get_width(), bar.get_height()] for bar in each]}
            for each in bars
        ],
        "maps": [image.get_array().filled(math.nan) for image in axes.images],
        "texts": [words(text.get_text()) for text in axes.texts],
    }
    return {name: values for name, values in plain(found).items() if values}


def line_of(line: Any, label: str) -> Result:
    """Return label and points of a line; a label that matplotlib made up is none."""
    x, y = (list(map(float, values)) for values in (line.get_xdata(), line.get_ydata()))
    return {"label": "" if label.startswith("_") else words(label), "x": x, "y": y}


def ticks_of(axis: Any) -> list[str]:
    """Return the words at an axis; none where matplotlib numbers it."""
    return [words(text) for text in getattr(axis.get_major_formatter(), "seq", ())]


def words(text: str) -> str:
    """Return a text without the line breaks that make it fit."""
    return " ".join(text.split())
