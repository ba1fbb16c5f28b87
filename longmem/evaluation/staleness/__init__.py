"""Experiments on staleness: what happens to a memory, and to what reads it, when the writer moves."""
