"""Examples in ChapterBreak's format from books of one's own, whose chapters begin with a line that says so."""

from __future__ import annotations

import bisect
import dataclasses
import gzip
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Entry = dict[str, Any]  # ctx, pos, negs

# Words that end in a full stop where no sentence ends.
ABBREVIATIONS = frozenset(
    ("mr", "mrs", "ms", "dr", "st", "mme", "mlle", "messrs", "prof", "rev", "hon", "capt", "col", "gen", "lieut", "esq")
)
SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildRules:
    """How books are cut; counts are of words, which whitespace separates."""

    chapter: str = r"^CHAPTER\b.*"
    """Regular expression of the line that begins a chapter."""

    context_words: int = 6000
    """Words before a boundary at most; fewer, by no more than `slack_words`, so that the context begins with a paragraph or
    a sentence."""

    slack_words: int = 250
    """See `context_words`."""

    suffix_words: int = 150
    """Words of a suffix, about: it ends with the sentence whose end is nearest."""

    shortest_suffix: int = 110
    """Words of a suffix at least."""

    longest_suffix: int = 170
    """Words of a suffix at most; where no sentence ends from the shortest to the longest, it has `suffix_words`."""

    negatives: int = 5
    """Wrong suffixes of an example: beginnings of later chapters."""

    boundaries: int = 20
    """Examples of a book at most, drawn from all that are possible."""

    seed: int = 0
    """Of what is drawn; a book's draws depend on its name and text alone, and not on other books."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 1 <= self.shortest_suffix <= self.suffix_words <= self.longest_suffix:
            raise ValueError(
                "`shortest_suffix`, `suffix_words` and `longest_suffix` must be in ascending order and at least 1, got "
                f"{self.shortest_suffix}, {self.suffix_words} and {self.longest_suffix}."
            )
        if not 0 <= self.slack_words < self.context_words or min(self.negatives, self.boundaries) < 1:
            raise ValueError(
                "`slack_words` must be less than `context_words`, and `negatives` and `boundaries` at least 1, got "
                f"{self.slack_words}, {self.context_words}, {self.negatives} and {self.boundaries}."
            )
        try:
            re.compile(self.chapter)
        except re.error as error:
            raise ValueError(f"`chapter` must be a regular expression, got {self.chapter!r}: {error}.") from error


class Chapter(NamedTuple):
    """Where a chapter stands in a text: its heading, and its text without headings."""

    start: int
    body: int
    end: int


def build(files: Sequence[Path], rules: BuildRules) -> dict[str, list[Entry]]:
    """Return the examples of every book that gives any, by the name of its file without the ending.

    Raises:
        ValueError: there is no file, two have the same name, or no book gives an example.
    """
    names = [file.stem for file in files]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`files` must be at least one .txt file, each of another name, got {names}.")
    found = {}
    for file in files:
        text = file.read_text(encoding="utf-8-sig")
        if entries := entries_of(text, rules, random.Random(f"{rules.seed}/{file.stem}")):
            found[file.stem] = entries
    if not found:
        raise ValueError(
            f"`files` must have a book with {rules.context_words} words before a chapter and {rules.negatives} chapters "
            f"after it, got none in {len(files)}; chapters are lines that match {rules.chapter!r}, see `chapter`."
        )
    return found


def entries_of(text: str, rules: BuildRules, generator: random.Random) -> list[Entry]:
    """Return the examples of a book in its order."""
    chapters = chapters_of(text, rules.chapter)
    if not chapters:
        return []
    suffixes = {n: suffix for n, chapter in enumerate(chapters) if (suffix := suffix_of(text, chapter, rules))}
    words = list(re.compile(r"\S+").finditer(text, chapters[0].start))
    starts = [word.start() for word in words]
    contexts: dict[int, str] = {}
    for number in suffixes:
        context = context_of(text, words[: bisect.bisect_left(starts, chapters[number].start)], rules)
        if context is not None and sum(other > number for other in suffixes) >= rules.negatives:
            contexts[number] = context
    drawn = sorted(generator.sample(sorted(contexts), min(rules.boundaries, len(contexts))))
    entries = []
    for number in drawn:
        negatives = generator.sample([other for other in suffixes if other > number], rules.negatives)
        entries.append(
            {"ctx": contexts[number], "pos": suffixes[number], "negs": [suffixes[other] for other in negatives]}
        )
    return entries


def chapters_of(text: str, pattern: str) -> list[Chapter]:
    """Return the chapters of a text; what stands before the first is none.

    The heading is the line that matches and, below it, lines in capitals, such as a title.
    """
    headings = list(re.finditer(pattern, text, re.MULTILINE))
    chapters = []
    for number, heading in enumerate(headings, start=1):
        body = heading.end()
        end = headings[number].start() if number < len(headings) else len(text)
        for line in re.compile(r"[^\n]*\n?").finditer(text, body, end):
            title = line[0].strip()
            if title and not (title.isupper() and title[-1] not in "!?\"'”’"):
                break  # a line in capitals that someone shouts is text
            body = line.end()
        chapters.append(Chapter(heading.start(), body, end))
    return chapters


def suffix_of(text: str, chapter: Chapter, rules: BuildRules) -> str | None:
    """Return the beginning of a chapter, None where it has less than `suffix_words` words."""
    words = list(re.compile(r"\S+").finditer(text, chapter.body, chapter.end))
    if len(words) < rules.suffix_words:
        return None
    ends = [
        count
        for count in range(rules.shortest_suffix, min(rules.longest_suffix, len(words)) + 1)
        if ends_sentence(words[count - 1][0])
    ]
    count = min(ends, key=lambda end: abs(end - rules.suffix_words), default=rules.suffix_words)
    return text[words[0].start() : words[count - 1].end()]


def context_of(text: str, before: Sequence[re.Match[str]], rules: BuildRules) -> str | None:
    """Return the last of the words before a boundary, None where there are too few; headings inside stay."""
    skipped = len(before) - rules.context_words
    if skipped < 0:
        return None
    first = None
    for number in range(skipped, skipped + rules.slack_words + 1):
        begins = number == 0 or "\n\n" in text[before[number - 1].end() : before[number].start()]
        if begins:  # a paragraph
            first = number
            break
        if first is None and ends_sentence(before[number - 1][0]):
            first = number
    return text[before[skipped if first is None else first].start() : before[-1].end()]


def ends_sentence(word: str) -> bool:
    """Return whether a sentence may end with this word.

    >>> [ends_sentence(word) for word in ("end.", 'end!"', "Mr.", "J.", "end,")]
    [True, True, False, False, False]
    """
    stem = SENTENCE_END.sub("", word)
    if stem == word:
        return False
    bare = stem.strip("\"'“‘([").lower()
    is_abbreviation = bare in ABBREVIATIONS or (len(bare) == 1 and bare.isalpha() and bare != "i")
    return not (is_abbreviation and word.endswith("."))


def save_split(path: Path, name: str, works: Mapping[str, Sequence[Entry]]) -> None:
    """Write a split to a JSON file, compressed if its name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as stream:
        json.dump({name: works}, stream, ensure_ascii=False)
