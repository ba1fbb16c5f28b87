"""Tokens as pieces of the text that they make together."""

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer makes of bytes that are no character yet
LONGEST_CHARACTER = 16  # tokens; bytes that never become one are shown as they are decoded


def pieces_of_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[str]:
    """Return the text that each token adds to those before it; joined, the pieces are the decoded text.

    Of a character that takes several tokens the last one has it all, and the others are empty.
    """
    pieces: list[str] = []
    start = done = (
        0  # the tokens from `start` on are decoded together: the first of a text loses its space in some tokenizers
    )
    for stop in range(1, len(token_ids) + 1):
        before = str(tokenizer.decode(token_ids[start:done])) if done > start else ""
        text = str(tokenizer.decode(token_ids[start:stop]))
        if text.endswith(UNFINISHED) and stop - done < LONGEST_CHARACTER and stop < len(token_ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        start, done = done, stop
    return pieces
