"""Experiments with LongMem that are no part of the package: run them from a checkout; each folder has a README."""
