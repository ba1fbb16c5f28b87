"""What is shown on a terminal: headings, tables, progress bars that count tokens or items; and what libraries must not show."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from longmem.errors import printable

Report = Callable[[int, int], None]


class SafeConsole(Console):
    """A console on which no text, whoever wrote it, is more than text: what rich draws with stays, all else is `printable`."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the pieces of what is shown."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


class PlainTable:
    """A table of rows, the head first and numbers to the right; the row named `emphasized` is bold.

    Rows show their names at any width: what does not fit goes into tables below, with the names again.
    """

    def __init__(self, rows: Sequence[Sequence[str]], emphasized: str = "") -> None:
        self.rows, self.emphasized = rows, emphasized

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the tables, each with as many columns as fit."""
        widths = [max(map(cell_len, column)) + 2 for column in zip(*self.rows, strict=True)]
        room = options.max_width - min(widths[0], options.max_width // 2)
        start = 1
        while start == 1 or start < len(widths):
            stop = start + 1
            while stop < len(widths) and sum(widths[start : stop + 1]) <= room:
                stop += 1
            yield self._part(start, stop)
            start = stop

    def _part(self, start: int, stop: int) -> Table:
        head, *body = ([row[0], *row[start:stop]] for row in self.rows)
        table = Table(box=None, header_style="bold")
        for number, column in enumerate(head):
            table.add_column(column, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
        for row in body:
            table.add_row(*row, style="bold" if row[0] == self.emphasized else None)
        return table


class TokenSpeedColumn(ProgressColumn):
    """Show tokens per second: over the whole run once it has ended."""

    def render(self, task: Task) -> Text:
        """Return the text of one bar."""
        speed = task.completed / task.finished_time if task.finished_time else task.speed
        return Text(f"{speed:,.0f} tokens/s" if speed else "", style="cyan")


def token_progress(title: str, console: Console) -> AbstractContextManager[Report]:
    """Return a block that shows a bar, with what moves it: a function of (tokens done, tokens in all)."""
    return _progress(title, console, TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"), TokenSpeedColumn())


def item_progress(title: str, console: Console) -> AbstractContextManager[Report]:
    """Return a block that shows a bar, with what moves it: a function of (items done, items in all)."""
    return _progress(title, console, TextColumn("{task.completed:,.0f}/{task.total:,.0f}"))


def counting(report: Report, total: int) -> Callable[[int], None]:
    """Return a function that adds to what is done and reports it."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    return add


@contextlib.contextmanager
def without_transformers_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars of its own inside the block."""
    from transformers.utils import logging as transformers_logging

    show_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if show_bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def without_warnings_of(library: str) -> Iterator[None]:
    """Keep the warnings of a library's logger from the terminal inside the block; errors are shown."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _progress(title: str, console: Console, *columns: ProgressColumn) -> Iterator[Report]:
    """Show a bar with a title, these columns and the time left; where there is no terminal, one line at the end."""
    start = (TextColumn("  {task.description}", markup=False), BarColumn(bar_width=24))  # a title may hold brackets
    time_left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    with Progress(*start, *columns, time_left, console=console) as bars:
        task = bars.add_task(title, total=1)

        def report(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield report
