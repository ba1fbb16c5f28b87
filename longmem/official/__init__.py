"""The released code's own numbers: its memory, its checkpoints, recordings of its runs.

Source: github.com/Victorwz/LongMem, commit b7f3c6b. Use it to compare and to convert; `MemoryBank` is the memory to use.
"""
