"""The model: side network, reading of memory, and the causal LM around them (section 2 of the paper)."""
