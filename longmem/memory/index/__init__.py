"""Chunk search: which rows of a store have the largest inner product with a query."""

from longmem.memory.index.exact import ChunkIndex, ExactIndex, FlatIndex, Ranked, exact_top_chunks
from longmem.memory.index.kinds import INDEXES, make_index, validate_index
from longmem.memory.index.saved import SavedIndex, read_index, write_index

__all__ = [
    "INDEXES",
    "ChunkIndex",
    "ExactIndex",
    "FlatIndex",
    "Ranked",
    "SavedIndex",
    "exact_top_chunks",
    "make_index",
    "read_index",
    "validate_index",
    "write_index",
]
