"""The kinds of chunk index by name; a new kind is one class and one line here."""

from longmem.memory.index import ChunkIndex, ExactIndex, FlatIndex
from longmem.memory.ivf import InvertedFileIndex

INDEXES: dict[str, type[ChunkIndex]] = {"auto": InvertedFileIndex, "flat": FlatIndex, "exact": ExactIndex}
