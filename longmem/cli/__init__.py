"""The command `longmem`: one module for each command, its arguments and its work together."""
