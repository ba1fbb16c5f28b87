"""Finished runs as one page: facts, tables and figures, in Markdown and in one HTML file that needs no other."""

import argparse
import base64
import contextlib
import dataclasses
import html
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longmem.cli import common
from longmem.cli.common import add_command
from longmem.errors import printable
from longmem.files import current, damaged, make_folder, open_regular, read_file, write_file

EXAMPLES = """\
  longmem report results/chapterbreak results/recall --output report
  longmem report results/* --title "SmolLM2-135M, trained on novels"

The folders are results of `longmem eval`. report.html holds its figures and can be sent as one file.
"""
NEEDED = ("config.json", "environment.json", "metrics.json", "table.md")
PNG = b"\x89PNG\r\n\x1a\n"
MAX_SYSTEMS = 100  # of a run, in the figure of all
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; display: block; overflow-x: auto; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
code { background: #f4f4f4; padding: 0 0.2rem; }
"""


def add(commands: Any) -> None:
    """Add the command `report`."""
    report = add_command(commands, "report", run, "put finished evaluations on one page", EXAMPLES)
    report.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="results of a finished evaluation")
    report.add_argument("--output", type=Path, default=Path("report"), metavar="DIR", help="folder for the page")
    report.add_argument("--title", default="Results", help="of the page")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a folder holds of a run that came to its end."""

    folder: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: dict[str, Any]
    table: str
    figures: dict[str, bytes]  # PNG, by name

    @property
    def title(self) -> str:
        """Return what the run is called; runs of earlier versions are called as their folder."""
        return str(self.environment.get("title") or self.name)

    @property
    def summary(self) -> dict[str, Any] | None:
        """Return the figures that can be drawn beside those of other runs, None if the run has none."""
        return self.metrics.get("summary")

    @property
    def facts(self) -> list[str]:
        """Return what must be known to repeat the run: settings, commit, versions, machine, time."""
        settings, environment = self.config.get("settings", {}), self.environment
        versions = environment.get("versions", {})
        chosen = [f"{name} = {settings[name]}" for name in ("model", "dtype", "window", "limit") if settings.get(name)]
        if settings.get("config"):
            from longmem.model.names import CHANGEABLE

            is_new = not settings["config"].keys() <= CHANGEABLE
            chosen.append(f"{'new ' * is_new}side network {settings['config']}")
        commit = str(environment.get("commit") or "unknown")[:12]
        changed = " with uncommitted changes" if environment.get("uncommitted_changes") else ""
        seconds = environment.get("wall_seconds")
        machine = [str(environment.get("device", ""))]
        machine += [f"{environment[name]} {name}" for name in ("cores", "threads") if name in environment]
        lines = [
            ", ".join(chosen),
            f"seed {environment.get('seed')}, commit {commit}{changed}",
            ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if name in versions),
            ", ".join(machine) + (f"; {spelled_seconds(seconds)}" if seconds is not None else ""),
        ]
        return [line for line in lines if line]


def read_run(folder: str | Path) -> FinishedRun:
    """Return a finished run. Raises ValueError if the folder is not one of a run that came to its end, or holds links."""
    place = Path(folder)
    folder = current(place)
    found: dict[str, bytes] = {}
    for name in NEEDED:
        # Of somebody else's folder a link could name any file, which the page would show to whom it is sent.
        with contextlib.suppress(FileNotFoundError):
            found[name] = own_file(folder, name)
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise ValueError(
            f"`folders` must be results of finished evaluations, but {folder} has no {', '.join(missing)}; run the "
            "evaluation again with the same settings, and it goes on to its end."
        )
    config, environment, metrics = (parsed(folder / name, found[name]) for name in NEEDED if name.endswith(".json"))
    table = printable(found["table.md"].decode("utf-8", "replace"))
    names = sorted(path.name for path in folder.glob("*.png") if not path.name.startswith("."))
    figures = {name: content for name in names if (content := own_file(folder, name)).startswith(PNG)}
    return FinishedRun(place, place.resolve().name, config, environment, metrics, table, figures)


def own_file(folder: Path, name: str) -> bytes:
    """Return what a file of a folder holds. Raises FileNotFoundError if there is none; ValueError if it is a link."""
    try:
        return read_file(folder / name, follow=False)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(
            f"`folders` must hold files of their own, but {folder / name} is none that can be read ({error.strerror}); take it "
            "out, or put the file itself there."
        ) from error


def parsed(path: Path, content: bytes) -> dict[str, Any]:
    """Return the object in the content of a JSON file, with text that is safe to show. Raises ValueError, which names it."""
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__} and no object")
        return dict(cleaned(found))
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def cleaned(value: Any) -> Any:
    """Return plain values whose texts are safe to show, each in one line."""
    if isinstance(value, str):
        return " ".join(printable(value).split())
    if isinstance(value, dict):
        return {cleaned(name): cleaned(each) for name, each in value.items()}
    return [cleaned(each) for each in value] if isinstance(value, list) else value


def write_report(folders: Sequence[str | Path], output: str | Path, title: str = "Results") -> Path:
    """Write `report.md`, its figures and `report.html` for finished runs, in their order; return the folder, made if missing.

    Raises ValueError if there is no folder, two have one name, or one is not of a finished run; nothing is written.
    """
    from longmem.evaluation.tables import PARITY, markdown_table, parity_rows
    from longmem.plots import plot_summaries

    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise ValueError(f"`folders` must be at least one, each of another name, got {names}; rename one of them.")
    output = Path(output)
    figures: dict[str, bytes] = {}
    try:
        parts = [f"# {title}", "", harmless(markdown_table(overview_rows(runs))), ""]
        if any(run.summary for run in runs):
            titles = [run.title for run in runs]
            names_of = {run.name: f" ({run.name})" if titles.count(run.title) > 1 else "" for run in runs}
            panels = {run.title + names_of[run.name]: run.summary for run in runs if run.summary}
            if (most := max(len(each["systems"]) for each in panels.values())) > MAX_SYSTEMS:
                raise ValueError(f"{most} systems are more than the {MAX_SYSTEMS} that a figure shows")
            with tempfile.TemporaryDirectory() as folder:
                plot_summaries(Path(folder, "overview.png"), panels)
                figures["figures/overview.png"] = Path(folder, "overview.png").read_bytes()
            parts += ["![All runs: means and 95 % intervals](figures/overview.png)", ""]
        joined = [each | {"of": f"{run.title}: {each['of']}"} for run in runs for each in run.metrics.get("parity", ())]
        if joined:
            parts += [f"## {PARITY}", "", harmless(markdown_table(parity_rows({"parity": joined}))), ""]
        for run in runs:
            facts = [f"- {harmless(line)}" for line in run.facts]
            parts += [f"## {harmless(run.title)}", "", *facts, "", deeper(harmless(run.table)), ""]
            for name, content in run.figures.items():
                copied = "figures/" + re.sub(r"[^\w.-]", "_", f"{run.name}-{name}")
                figures[copied] = content
                caption = re.sub(r"[^\w ,.:-]", "", f"{run.title}: {Path(name).stem}")
                parts += [f"![{caption}]({copied})", ""]
    except (AttributeError, TypeError, KeyError, IndexError, ArithmeticError, ValueError) as error:
        raise ValueError(
            f"`folders` must be results of finished evaluations, but one of {', '.join(names)} holds other values than an "
            f"evaluation writes ({type(error).__name__}: {error})."
        ) from error
    text = "\n".join(parts)
    page = as_html(text, title, figures)
    make_folder(output / "figures", follow=False)
    for name, image in figures.items():
        write_file(output / name, image)
    write_file(output / "report.md", text)
    write_file(output / "report.html", page)
    return output


def overview_rows(runs: Sequence[FinishedRun]) -> list[list[str]]:
    """Return the table of all runs, its head first."""
    rows = [["run", "model", "predictions", "time", "folder"]]
    for run in runs:
        settings, seconds = run.config.get("settings", {}), run.environment.get("wall_seconds")
        count = ""
        with contextlib.suppress(OSError), os.fdopen(open_regular(run.folder / "predictions.jsonl"), "rb") as lines:
            count = f"{sum(1 for _ in lines):,}"
        model = str(settings.get("model") or run.config.get("model", {}).get("backbone_name_or_path") or "")
        if settings.get("config"):
            model += ", untrained"
        rows.append([run.title, model, count, "" if seconds is None else spelled_seconds(seconds), run.name])
    return rows


def harmless(markdown: str) -> str:
    """Return Markdown of a run without images, which would name files and servers, and without HTML.

    >>> harmless("![x](/etc/passwd) <b> 1 < 2")
    '!\\\\[x](/etc/passwd) &lt;b> 1 < 2'
    """
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", markdown).replace("![", "!\\[")


def deeper(markdown: str) -> str:
    """Return Markdown with its headings one level down, so that they stand below the heading of their run.

    >>> deeper("## Windows of 512")
    '### Windows of 512'
    """
    return re.sub(r"^(#+ )", r"#\1", markdown, flags=re.MULTILINE)


def spelled_seconds(seconds: float) -> str:
    """Return a duration for people.

    >>> spelled_seconds(42), spelled_seconds(600), spelled_seconds(9000)
    ('42 s', '10.0 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def as_html(markdown: str, title: str, figures: Mapping[str, bytes]) -> str:
    """Return a page with figures inside it, by the paths that the text gives them; it shows no other image."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def inlined(match: re.Match[str]) -> str:
        if (figure := figures.get(html.unescape(match[1]))) is None:
            return ""
        return f'<img src="data:image/png;base64,{base64.b64encode(figure).decode()}"{match[2]}>'

    body = re.sub(r'<img src="([^"]*)"([^>]*)>', inlined, body)
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{head}<style>{STYLE}</style></head><body>\n{body}</body></html>\n"


def run(arguments: argparse.Namespace) -> None:
    """Write a page over results of evaluations."""
    folder = write_report(arguments.folders, arguments.output, arguments.title)
    files = {name: str(folder / f"report.{ending}") for name, ending in (("markdown", "md"), ("html", "html"))}
    common.tell(arguments, files, f"{files['markdown']} and {files['html']}: {len(arguments.folders)} runs.")
