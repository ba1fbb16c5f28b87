"""A training run on the terminal: a bar over a line of its means, or a plain line now and then where nothing can move."""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from longmem.training.records import StepRecord

MEAN_OVER = 20  # steps; single steps differ by what their texts are
SECONDS_BETWEEN_LINES = 30.0
SHOWN = {
    "loss": "loss {:.3f}",
    "backbone_loss": "backbone {:.3f}",
    "gain": "gain {:+.3f}",
    "memory_share": "memory {:.1%}",
}


class BarOverText(Progress):
    """Show the description of a task below its bar: beside it, it would be cut off at 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield what is shown."""
        for task in self.tasks:
            yield self.make_tasks_table([task])
            yield Text(f"  {task.description}", style="dim")


def summary_of(records: deque[StepRecord] | list[StepRecord]) -> str:
    """Return the means of some steps in one line; what was not computed is left out.

    >>> summary_of([StepRecord(7, 0.1, 2.5, 2.75, 0.25, 2e-4, 0.9, 4096, 8192.0, 0.125, -1.0, 2.0, 2048.0)])
    'loss 2.500, backbone 2.750, gain +0.250, memory 12.5 %, 2,048 tokens/s'
    """
    parts = []
    for field, form in SHOWN.items():
        if values := [value for record in records if (value := getattr(record, field)) is not None]:
            parts.append(form.format(statistics.fmean(values)).replace("%", " %"))
    speed = sum(record.tokens for record in records) / max(sum(record.seconds for record in records), 1e-9)
    return ", ".join([*parts, f"{speed:,.0f} tokens/s"])


@contextlib.contextmanager
def training_progress(
    console: Console, total_steps: int, done_steps: int = 0, seconds_between_lines: float = SECONDS_BETWEEN_LINES
) -> Iterator[Callable[[StepRecord], None]]:
    """Show how a run goes on from `done_steps` and yield what moves it: a function of the record of each step.

    Numbers are means over the last 20 records. A console that is no terminal gets a line for the first record, one
    every `seconds_between_lines` and one for the last step.
    """
    recent: deque[StepRecord] = deque(maxlen=MEAN_OVER)
    began, last_line = time.monotonic(), -math.inf

    def say(record: StepRecord) -> None:
        nonlocal last_line
        recent.append(record)
        now = time.monotonic()
        if now - last_line < seconds_between_lines and record.step < total_steps:
            return
        last_line = now
        minutes = (now - began) / max(record.step - done_steps, 1) * (total_steps - record.step) / 60
        left = f", {minutes:.0f} min left" if record.step < total_steps else ""
        line = f"step {record.step:,}/{total_steps:,}: {summary_of(recent)}{left}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    if not console.is_terminal:
        yield say
        return
    time_left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    columns = (TextColumn("  step"), MofNCompleteColumn(), BarColumn(bar_width=32), time_left)
    with BarOverText(*columns, console=console, speed_estimate_period=120) as bars:
        task = bars.add_task("", total=total_steps, completed=done_steps)

        def report(record: StepRecord) -> None:
            recent.append(record)
            bars.update(task, completed=record.step, description=summary_of(recent))

        yield report
