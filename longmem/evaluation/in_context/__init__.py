"""In-context learning from many demonstrations: some in the window, the others in memory."""

from longmem.evaluation.in_context.measures import compute_metrics
from longmem.evaluation.in_context.running import ask_all
from longmem.evaluation.in_context.settings import InContextSettings
from longmem.evaluation.in_context.tables import all_tables, demonstration_rows, markdown_of, panels_of
from longmem.evaluation.in_context.tasks import make_tasks

__all__ = [
    "InContextSettings",
    "all_tables",
    "ask_all",
    "compute_metrics",
    "demonstration_rows",
    "make_tasks",
    "markdown_of",
    "panels_of",
]
