"""Whether a side network learns to answer from memory, on facts drawn from a seed."""
