"""Texts to train on: tokenised once, kept on disk, and read in lanes."""

from longmem.data.corpus import load_corpus
from longmem.data.lanes import LaneBatch, Lanes, process_lanes

__all__ = ["LaneBatch", "Lanes", "load_corpus", "process_lanes"]
