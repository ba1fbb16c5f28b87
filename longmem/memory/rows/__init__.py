"""The rows of a bank: documents cut into chunks, where each chunk stands, and how its numbers are kept."""
