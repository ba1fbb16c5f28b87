"""Exact match and F1 of answers as SQuAD v1.1 scores them (Rajpurkar et al., 2016): case, punctuation, articles aside."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """Return 1 if the prediction is one of the gold answers after normalisation, otherwise 0.

    >>> exact_match("The Denver Broncos.", ["Carolina", "denver broncos"])
    1.0
    """
    return float(normalized(prediction) in {normalized(gold) for gold in some(golds)})


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of words, 0 to 1, for the gold answer that fits best.

    As in SQuAD v1.1, two answers without any word, such as "the" and "a", share none: F1 is 0 where the match is exact.

    >>> f1("in the year 1066", ["1066"])
    0.5
    """
    return max(_word_overlap(normalized(prediction).split(), normalized(gold).split()) for gold in some(golds))


def normalized(answer: str) -> str:
    """Return an answer in lower case, without ASCII punctuation, the words a, an, the, and spare whitespace.

    >>> normalized("A  U.S. citizen")
    'us citizen'
    """
    plain = answer.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(?:an?|the)\b", " ", plain).split())


def some(golds: Sequence[str]) -> Sequence[str]:
    """Return the gold answers. Raises ValueError if there are none, or one text instead of a list."""
    if isinstance(golds, str) or not golds:
        raise ValueError(f"`golds` must be a list of at least one answer, got {golds!r}.")
    return golds


def _word_overlap(prediction: Sequence[str], gold: Sequence[str]) -> float:
    shared = (Counter(prediction) & Counter(gold)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(gold)
    return 2 * precision * recall / (precision + recall)
