"""Perplexity of long texts: the same tokens scored with a local window, and with everything before it in memory.

One evaluation with two plans. Documents are read all over, and compared by their length and by how far back lies what is
needed. Of books one stretch is read, cut into windows in several ways, beside the backbone with longer windows. Training and
the demonstration score their texts by the same functions.
"""

from longmem.evaluation.perplexity.running import Perplexity, PerplexityOfBooks
from longmem.evaluation.perplexity.settings import PerplexitySettings

__all__ = ["Perplexity", "PerplexityOfBooks", "PerplexitySettings"]
