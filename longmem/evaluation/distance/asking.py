"""What a system makes of one question: which value is likeliest, and what it writes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from longmem.evaluation.systems import Question, System
from longmem.evaluation.systems.system import text_before

STOP = ("\n",)


def ask(
    system: System, question: str, values: Sequence[str], *, before_value: str = " ", max_new_tokens: int | None = 16
) -> dict[str, Any]:
    """Return log-likelihoods of the values after a question, in nats per token, what is written, and the seconds.

    Args:
        system: has its stream and memory.
        question: the end of what stands in the window.
        values: to compare.
        before_value: between question and value.
        max_new_tokens: None: nothing is written.
    """
    before = system.preparing_seconds + system.answering_seconds
    query = system.tokens(question)
    candidates = [system.tokens(before_value + value) for value in values]
    (answer,) = system.score([Question(query, candidates)])
    found: dict[str, Any] = {
        "per_token": [round(each.mean, 5) for each in answer.candidates],
        "choice": answer.best(per_token=True),
    }
    if max_new_tokens is not None:
        (ids,) = system.generate([query], max_new_tokens=max_new_tokens, stop=STOP)
        found["text"] = text_before(str(system.model.tokenizer.decode(ids, skip_special_tokens=True)), STOP)
    found["seconds"] = round(system.preparing_seconds + system.answering_seconds - before, 3)
    return found


def is_right(record: Mapping[str, Any], system: str) -> bool:
    """Return whether the right value was the likeliest of a record."""
    return bool(record["systems"][system]["choice"] == record["right"])


def is_exact(text: str, value: str) -> bool:
    """Return whether a written answer begins with the value, but for capitals and punctuation.

    >>> [is_exact(text, "12345") for text in ("12345.", "<12345>", "123456", "it is 12345")]
    [True, True, False, False]
    """
    wanted = words_of(value)
    return words_of(text)[: len(wanted)] == wanted


def words_of(text: str) -> list[str]:
    """Return the words of a text in small letters."""
    return re.findall(r"\w+", text.lower())
