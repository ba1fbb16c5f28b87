"""Who read what: which passages of a memory a model reads for each word, as numbers and as a page."""

from longmem.tracing.standing_out import Passage, read_passages
from longmem.tracing.trace import Trace, TracePassage, TraceRead, explain

__all__ = ["Passage", "Trace", "TracePassage", "TraceRead", "explain", "read_passages"]
