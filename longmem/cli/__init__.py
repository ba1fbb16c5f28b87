"""The command `longmem`: one module for each command, its arguments and its work together.

Every module is imported before arguments are read, and `longmem --help` must answer at once. So torch, transformers, rich
and the modules of this package that need them are imported inside the functions that use them.
"""
