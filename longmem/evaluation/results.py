"""Forwards to where names and tables are now, for evaluations that have not moved yet."""

from longmem.evaluation.folder import as_json
from longmem.evaluation.systems.names import TITLES, title_of_system
from longmem.evaluation.tables import markdown_table

__all__ = ["TITLES", "as_json", "markdown_table", "title_of_system"]
