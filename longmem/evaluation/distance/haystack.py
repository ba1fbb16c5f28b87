"""The long text, cut into windows, and where in it facts are put."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from longmem.data.sources import find_source
from longmem.evaluation.distance.facts import Fact, Vocabulary, draw_facts
from longmem.evaluation.distance.settings import DistanceSettings
from longmem.evaluation.distance.words import FILLER
from longmem.model.modeling import LongMemForCausalLM

Window = list[int]
Tokenize = Callable[[str], list[int]]


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Tokens of a text, and how many of them are encoded at once, each window by itself."""

    token_ids: list[int]
    window_length: int

    def window(self, number: int) -> Window:
        """Return the tokens of one window."""
        return self.token_ids[number * self.window_length : (number + 1) * self.window_length]

    def windows(self, size: int, replaced: Mapping[int, Window]) -> list[Window]:
        """Return the windows of the first `size` tokens, some of them replaced."""
        return [replaced.get(number) or self.window(number) for number in range(size // self.window_length)]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One fact in one window of the haystack: `token_ids` take the place of window number `window`.

    `distance`: tokens after the line that is asked for, up to the end of memory.
    """

    task: str
    size: int
    depth: str
    item: int
    fact: Fact
    window: int
    token_ids: Window
    distance: int

    @property
    def trial_id(self) -> str:
        """Return the name of its record."""
        return f"{self.task}/{self.size}/{self.depth}/{self.item}"


def read_haystack(tokenizer: PreTrainedTokenizerBase, source: str, count: int) -> list[int]:
    """Return the first `count` tokens of the texts of a source, one after the other.

    Raises:
        ValueError: there is no such source, or it has fewer tokens.
    """
    ids: list[int] = []
    if source == "filler":
        sentences = tokenize(tokenizer, FILLER)
        return (sentences * (count // len(sentences) + 1))[:count]
    for document in find_source(source, text_column="text", split="train", is_bounded=True).documents():
        # Most texts have fewer characters per token: there is no need to tokenize the rest.
        ids += tokenize(tokenizer, document.text[: 8 * (count - len(ids))] + "\n\n")
        if len(ids) >= count:
            return ids[:count]
    raise ValueError(
        f"`sizes` must be at most the tokens of `haystack`, {len(ids):,} in {source!r}, got {count:,}; choose smaller "
        "ones, or a folder with more text."
    )


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def validate_sizes(settings: DistanceSettings, model: LongMemForCausalLM) -> None:
    """Raise ValueError unless sizes are whole windows of whole chunks, and facts that stand together have windows enough."""
    length, chunk = model.config.segment_length, model.config.chunk_size
    if length % chunk:
        raise ValueError(
            f"`config.segment_length` must be a multiple of `config.chunk_size` for this evaluation, got {length} and "
            f"{chunk}: what is left of a window would be in no chunk."
        )
    for size in settings.sizes:
        if size % length:
            raise ValueError(
                f"`sizes` must be multiples of the model's `segment_length`, {length}, got {size}; the next is "
                f"{size + length - size % length}."
            )
        windows = list(windows_of_depths(settings, size, length).values())
        if settings.needles == "together" and len(set(windows)) < len(windows):
            raise ValueError(
                f"`sizes` must have a window of {length} tokens for every depth where needles are together, got {size} "
                f"with {len(windows)} depths in windows {windows}; choose fewer depths, or larger sizes."
            )


def windows_of_depths(settings: DistanceSettings, size: int, length: int) -> dict[str, int]:
    """Return the number of the window for each depth of a memory of `size` tokens.

    >>> windows_of_depths(DistanceSettings(output="x"), 16384, 1024)
    {'0': 15, '0.25': 11, '0.5': 8, '0.75': 4, '1': 0}
    """
    if settings.distances:
        return {f"{each} tokens": (size - 1 - each) // length for each in settings.distances if each < size}
    last = size // length - 1
    return {f"{each:g}": int((1 - each) * last + 0.5) for each in settings.depths}


def plan_trials(
    settings: DistanceSettings, haystack: Haystack, tokenizer: PreTrainedTokenizerBase, task: str
) -> list[Trial]:
    """Return all trials of a task, by size and item; the facts of one item, one for each depth, may stand together.

    Raises:
        ValueError: a fact is longer than a window, or the haystack holds most of the values.
    """
    vocabulary = Vocabulary.absent_from(str(tokenizer.decode(haystack.token_ids)))
    needed = len(settings.distances or settings.depths) + settings.num_choices - 1
    if task == "needle" and len(vocabulary.activities) < needed:
        raise ValueError(
            f"`haystack` must leave {needed} values for the task needle, got {len(vocabulary.activities)} that do not occur "
            "in it; choose another text, or fewer `num_choices`."
        )
    trials = []
    for size in settings.sizes:
        depths = windows_of_depths(settings, size, haystack.window_length)
        for item in range(settings.items):
            generator = random.Random(f"{settings.seed}/{task}/{size}/{item}")
            facts = draw_facts(task, settings, vocabulary, generator, len(depths))
            for (depth, window), fact in zip(depths.items(), facts, strict=True):
                ids, stop = put(haystack, window, fact, tokenizer, generator)
                distance = size - window * haystack.window_length - stop
                trials.append(Trial(task, size, depth, item, fact, window, ids, distance))
    return trials


def put(
    haystack: Haystack, window: int, fact: Fact, tokenizer: PreTrainedTokenizerBase, generator: random.Random
) -> tuple[Window, int]:
    """Return a window with a fact somewhere in it, and where in it the line that is asked for ends.

    What is pushed out is the end of the window, so that all others stay as they are.
    """
    own, after = tokenize(tokenizer, fact.text), tokenize(tokenizer, fact.after)
    room = haystack.window_length - len(own) - len(after)
    if room < 0:
        raise ValueError(
            f"`config.segment_length` must hold a whole fact, {len(own) + len(after)} tokens, got "
            f"{haystack.window_length}; choose fewer `pairs`, or a model with longer segments."
        )
    start = generator.randint(0, room)
    text = haystack.window(window)
    return [*text[:start], *own, *after, *text[start:]][: haystack.window_length], start + len(own)


def replaced_windows(trial: Trial, trials: Sequence[Trial], together: bool) -> dict[int, Window]:
    """Return the windows that are not the haystack's: the trial's own or, together, those of all depths of its item."""
    if not together:
        return {trial.window: trial.token_ids}
    same = (trial.task, trial.size, trial.item)
    return {each.window: each.token_ids for each in trials if (each.task, each.size, each.item) == same}
