"""Labelled demonstrations to train on, from texts of one's own."""
