"""What is right without a model: words that context and suffix share, and the length of the suffix."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from longmem.evaluation.chapterbreak.data import Example

NEAR_WORDS = 1000
BASELINES = {
    "bag-of-words": "bag of words, whole context",
    "bag-of-words-near": f"bag of words, last {NEAR_WORDS:,} words",
    "longest": "longest suffix",
}


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case.

    >>> words_of("Don't go, Emma!")
    ["don't", 'go', 'emma']
    """
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def rarity(texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return for each word the inverse document frequency: the logarithm of (texts / texts that have the word)."""
    counts = Counter(word for words in texts for word in set(words))
    return {word: math.log(len(texts) / count) for word, count in counts.items()}


def overlap(context: Sequence[str], suffix: Sequence[str], weights: Mapping[str, float]) -> float:
    """Return the weights of the different words that a suffix shares with a context, over the length of the suffix."""
    shared = sorted(set(suffix) & set(context))  # in an order, so that equal sets have equal sums
    return sum(weights[word] for word in shared) / max(1, len(suffix))


def baseline_values(
    examples: Sequence[Example], chosen: Sequence[Example]
) -> Iterator[tuple[Example, dict[str, list[float]]]]:
    """Yield each chosen example with the values that every baseline gives to its suffixes.

    Words are weighted by how few contexts of the whole split have them. All words of a suffix count, also those beyond the
    tokens that models are asked about.

    Args:
        examples: of the split.
        chosen: those to score.
    """
    weights = rarity([words_of(example.context) for example in examples])
    for example in chosen:
        context = words_of(example.context)
        suffixes = [words_of(text) for text in example.suffixes]
        yield (
            example,
            {
                "bag-of-words": [overlap(context, suffix, weights) for suffix in suffixes],
                "bag-of-words-near": [overlap(context[-NEAR_WORDS:], suffix, weights) for suffix in suffixes],
                "longest": [float(len(suffix)) for suffix in suffixes],
            },
        )
