"""QuALITY: multiple-choice questions about stories and articles of 2,000 to 8,000 tokens (Pang et al. 2022).

Two files are read: QuALITY's own (github.com/nyu-mll/quality, `QuALITY.v1.0.1.htmlstripped.dev` and its kin), which has a
line for each set of questions about an article, and L-Eval's selection `quality.jsonl` (github.com/OpenLMLab/LEval).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from longmem.evaluation.qa.documents import Document, Item, read_json_lines

Style = Literal["text", "letter"]
LETTERS = "ABCDEFGHIJ"

_OPTION = re.compile(r"\s*\n\s*\(([A-J])\)\s*")
_ANSWER = re.compile(r"\s*\(?([A-J])(?:[).:,]|\s*$)")


def read_quality(path: Path) -> list[Document]:
    """Return the articles of a file with their questions; its lines say which of the two formats it has.

    Raises:
        ValueError: it has neither, or a question has no options or no right one.
    """
    documents: dict[str, Document] = {}
    for number, row in enumerate(read_json_lines(path), start=1):
        if isinstance(row, dict) and {"article", "questions"} <= row.keys():
            # Several lines, of different authors of questions, may share an article: it is read once.
            name = str(row.get("article_id", number))
            text, items = row["article"], _official_items(name, str(row.get("set_unique_id", number)), row["questions"])
        elif isinstance(row, dict) and {"input", "instructions", "outputs"} <= row.keys():
            name = str(number)
            text, items = row["input"], _leval_items(name, row["instructions"], row["outputs"])
        else:
            raise ValueError(
                f"`data` must have lines with article and questions (QuALITY) or with input, instructions and outputs "
                f"(L-Eval), line {number} of {path} has neither."
            )
        before = documents[name].items if name in documents else ()
        documents[name] = Document(name, (text,), (*before, *items))
    return list(documents.values())


def _official_items(document: str, part: str, questions: Sequence[Mapping[str, Any]]) -> list[Item]:
    items = []
    for number, each in enumerate(questions, start=1):
        options, gold = tuple(option.strip() for option in each["options"]), each.get("gold_label")
        name = f"{document}/{part}/{number}"
        if not isinstance(gold, int) or not 1 <= gold <= len(options):
            raise ValueError(
                f"`gold_label` must be from 1 to {len(options)}, got {gold!r} in question {name}; the test split has no "
                "public answers, use dev."
            )
        items.append(Item(item_id=name, question=each["question"].strip(), options=options, answer=options[gold - 1]))
    return items


def _leval_items(document: str, instructions: Sequence[str], outputs: Sequence[str]) -> list[Item]:
    items = []
    for number, (instruction, output) in enumerate(zip(instructions, outputs, strict=True), start=1):
        question, *rest = _OPTION.split(instruction)
        letters, options = rest[::2], tuple(option.strip() for option in rest[1::2])
        gold = _ANSWER.match(output)
        name = f"{document}/{number}"
        if letters != list(LETTERS[: len(options)]) or len(options) < 2 or gold is None or gold[1] not in letters:
            raise ValueError(
                f"`instructions` must end with options (A), (B), ... on lines of their own, and `outputs` name one of them, "
                f"got options {letters} and output {output!r} in question {name}."
            )
        answer = options[letters.index(gold[1])]
        items.append(Item(item_id=name, question=question.strip(), options=options, answer=answer))
    return items


def quality_prompt(item: Item, style: Style) -> str:
    """Return what is asked after the article; with letters, the options are in it.

    >>> print(quality_prompt(Item(item_id="1", question="Who?", options=("He", "She"), answer="He"), "letter"))
    <BLANKLINE>
    <BLANKLINE>
    Question: Who?
    (A) He
    (B) She
    Answer: (
    """
    if style == "text":
        return f"\n\nQuestion: {item.question}\nAnswer:"
    options = "".join(f"\n({letter}) {option}" for letter, option in zip(LETTERS, item.options, strict=False))
    return f"\n\nQuestion: {item.question}{options}\nAnswer: ("


def quality_candidates(item: Item, style: Style) -> list[str]:
    """Return the continuations that are compared, one for each option."""
    return [f" {option}" for option in item.options] if style == "text" else list(LETTERS[: len(item.options)])


def chosen_letter(text: str) -> int | None:
    """Return the number of the option whose letter a written answer begins with, None where it begins with none.

    >>> [chosen_letter(text) for text in ("B", " (C) the whale", "A whale", "D. No")]
    [1, 2, None, 3]
    """
    found = _ANSWER.match(text)
    return LETTERS.index(found[1]) if found else None


def longest_option(options: Sequence[str]) -> int:
    """Return the number of the option with the most characters, the first of equals: what needs no reading to guess."""
    return max(range(len(options)), key=lambda number: len(options[number]))
