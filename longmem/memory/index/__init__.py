"""Chunk search: which rows of a store have the largest inner product with a query."""

from longmem.memory.index.by_token import TokenIndex
from longmem.memory.index.exact import ChunkIndex, ExactIndex, FlatIndex, Ranked, exact_top_chunks
from longmem.memory.index.kinds import make_index, validate_index
from longmem.memory.index.saved import SavedIndex, arrays_of, index_of

__all__ = [
    "ChunkIndex",
    "ExactIndex",
    "FlatIndex",
    "Ranked",
    "SavedIndex",
    "TokenIndex",
    "arrays_of",
    "exact_top_chunks",
    "index_of",
    "make_index",
    "validate_index",
]
