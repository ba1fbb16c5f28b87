"""Predictions that ask what came next after the tokens of a memory that are most like the present one."""
