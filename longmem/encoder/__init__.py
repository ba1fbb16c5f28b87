"""The encoder of a bank: which weights, recipe and tokenizer wrote what it holds, and whether they have changed since."""
