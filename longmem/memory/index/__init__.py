"""Chunk search: which rows of a store have the largest inner product with a query."""

from longmem.memory.index.by_token import TokenIndex
from longmem.memory.index.exact import ChunkIndex, ExactIndex, FlatIndex, Ranked, exact_top_chunks
from longmem.memory.index.kinds import make_index, validate_index
from longmem.memory.index.saved import SavedIndex, read_index, write_index

__all__ = [
    "ChunkIndex",
    "ExactIndex",
    "FlatIndex",
    "Ranked",
    "SavedIndex",
    "TokenIndex",
    "exact_top_chunks",
    "make_index",
    "read_index",
    "validate_index",
    "write_index",
]
