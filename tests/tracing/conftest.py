"""A tiny random model, with a memory of what stands before a text."""

from tiny_memory import bank, model, past, rest  # noqa: F401  fixtures
