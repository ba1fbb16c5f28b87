"""Data of the two long tasks that come with the lm-eval harness."""
