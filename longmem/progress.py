"""Progress bars that count tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Report = Callable[[int, int], None]


class TokenSpeedColumn(ProgressColumn):
    """Show tokens per second: over the whole run once it has ended."""

    def render(self, task: Task) -> Text:
        """Return the text of one bar."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} tokens/s" if speed else "", style="cyan")


@contextlib.contextmanager
def token_progress(title: str, console: Console) -> Iterator[Report]:
    """Show a bar and yield what moves it: a function of (tokens done, tokens in all).

    A console that is no terminal gets one line, at the end.
    """
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TokenSpeedColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=1)

        def report(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield report
