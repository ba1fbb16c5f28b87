"""What happens to a memory, and to what reads it, when the writer moves."""
