"""A synthetic recall task: pairs of a key and a value, a long text, then a key alone; which value belonged to it?

Every document has pairs of its own, drawn at random, so no weight can know them: only the window or a memory can. Keys,
values and words are single token ids. A text is words, each followed by one of four others, with pairs written over it;
distractors are pairs of keys that are never asked.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from longmem.memory.protocols import Memory
from longmem.model.modeling import LongMemForCausalLM

FOLLOWERS = 4  # words that can follow a word
PASSAGE = 64  # long texts are made of passages, side by side, because words are drawn one after the other
PAIR = 2  # tokens of a key and its value


@dataclasses.dataclass(frozen=True)
class RecallTask:
    """The vocabulary, keys first, then values, then words, and the share of tokens that begin a distracting pair."""

    num_keys: int = 128
    num_values: int = 64
    num_words: int = 128
    distractor_share: float = 0.05

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids."""
        return self.num_keys + self.num_values + self.num_words

    @property
    def chance(self) -> float:
        """Return the accuracy of guessing among the values."""
        return 1 / self.num_values


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Keys with a value each, different keys within a lane, and the keys that are left for distractors."""

    keys: Int[Tensor, "lanes pairs"]
    values: Int[Tensor, "lanes pairs"]
    other_keys: Int[Tensor, "lanes others"]


@dataclasses.dataclass(frozen=True)
class RecallDocument:
    """A text that begins with pairs and goes on without them, and the pairs."""

    token_ids: Int[Tensor, " tokens"]
    keys: Int[Tensor, " pairs"]
    values: Int[Tensor, " pairs"]


def draw_pairs(task: RecallTask, lanes: int, num_pairs: int, generator: Generator) -> Pairs:
    """Return random pairs for each lane.

    Raises:
        ValueError: there are not enough keys to leave one for the distractors.
    """
    if not 1 <= num_pairs < task.num_keys:
        raise ValueError(
            f"`num_pairs` must be from 1 to {task.num_keys - 1}, so that a key is left for distractors, got {num_pairs}; "
            "give the task more `num_keys`."
        )
    keys = torch.rand(lanes, task.num_keys, generator=generator).argsort(dim=1)
    values = torch.randint(task.num_values, (lanes, num_pairs), generator=generator) + task.num_keys
    return Pairs(keys[:, :num_pairs], values, keys[:, num_pairs:])


def draw_text(
    task: RecallTask,
    lanes: int,
    num_tokens: int,
    generator: Generator,
    other_keys: Int[Tensor, "lanes others"] | None = None,
) -> Int[Tensor, "lanes num_tokens"]:
    """Return words; with `other_keys`, also distractors: these keys, each followed by a value drawn anew every time."""
    language = torch.Generator().manual_seed(0)  # the same four followers of a word in every text
    followers = torch.randint(task.num_words, (task.num_words, FOLLOWERS), generator=language)
    text = torch.randint(task.num_words, (lanes, num_tokens), generator=generator)
    for position in range(1, num_tokens):
        text[:, position] = followers[text[:, position - 1], text[:, position] % FOLLOWERS]
    text += task.num_keys + task.num_values
    if other_keys is None:
        return text
    begins = torch.rand(lanes, num_tokens, generator=generator) < task.distractor_share
    begins[:, 1:] &= ~begins[:, :-1]
    begins[:, -1:] = False
    picks = torch.randint(other_keys.shape[1], (lanes, num_tokens), generator=generator)
    values = torch.randint(task.num_values, (lanes, num_tokens), generator=generator) + task.num_keys
    text = torch.where(begins, other_keys.gather(1, picks), text)
    return torch.where(begins.roll(1, dims=1), values, text)


def draw_starts(count: int, room: int, generator: Generator) -> Int[Tensor, " count"]:
    """Return ascending places for `count` pairs in `room` tokens, at any alignment, none over another.

    Raises:
        ValueError: the pairs do not fit.
    """
    if count * PAIR > room:
        raise ValueError(f"`room` must hold {count} pairs of {PAIR} tokens, got {room}; ask for fewer pairs.")
    gaps = torch.randint(room - count * PAIR + 1, (count,), generator=generator).sort().values
    return gaps + torch.arange(count) * PAIR


def write_pairs(
    text: Int[Tensor, "lanes tokens"],
    starts: Int[Tensor, " pairs"],
    keys: Int[Tensor, "lanes pairs"],
    values: Int[Tensor, "lanes pairs"],
) -> None:
    """Write pairs over a text, in place: the same places in every lane."""
    text[:, starts], text[:, starts + 1] = keys, values


def practice_windows(
    task: RecallTask, lanes: int, half: int, num_pairs: int, generator: Generator
) -> tuple[Int[Tensor, "lanes tokens"], Int[Tensor, " pairs"]]:
    """Return windows of two halves, pairs in the first and asked in the second, and where the asked keys stand.

    A pair is asked with replacement: otherwise the last value could be guessed as the one that has not come yet.
    """
    pairs = draw_pairs(task, lanes, num_pairs, generator)
    windows = draw_text(task, lanes, 2 * half, generator, pairs.other_keys)
    write_pairs(windows, draw_starts(num_pairs, half, generator), pairs.keys, pairs.values)
    asked = torch.randint(num_pairs, (lanes, num_pairs), generator=generator)
    places = half + draw_starts(num_pairs, half, generator)
    write_pairs(windows, places, pairs.keys.gather(1, asked), pairs.values.gather(1, asked))
    return windows, places


def draw_document(
    task: RecallTask, num_pairs: int, facts_within: int, distance: int, generator: Generator
) -> RecallDocument:
    """Return a document whose first `facts_within` tokens hold the pairs; `distance` tokens with distractors follow."""
    return write_document(task, draw_pairs(task, 1, num_pairs, generator), facts_within, distance, generator)


def write_document(
    task: RecallTask, pairs: Pairs, facts_within: int, distance: int, generator: Generator
) -> RecallDocument:
    """Return a document like those of `draw_document`, with the given pairs of one lane."""
    opening = draw_text(task, 1, facts_within, generator)
    write_pairs(opening, draw_starts(pairs.keys.shape[1], facts_within, generator), pairs.keys, pairs.values)
    passages = -(-distance // PASSAGE)
    rest = draw_text(task, passages, PASSAGE, generator, pairs.other_keys.expand(passages, -1)).flatten()[:distance]
    return RecallDocument(torch.cat([opening[0], rest]), pairs.keys[0], pairs.values[0])


def draw_questions(
    task: RecallTask, keys: Int[Tensor, " pairs"], num_words: int, generator: Generator
) -> Int[Tensor, "pairs tokens"]:
    """Return one window for each key: words, then the key, whose value is the next token."""
    return torch.cat([draw_text(task, len(keys), num_words, generator), keys[:, None]], dim=1)


def recalled(
    model: LongMemForCausalLM,
    questions: Int[Tensor, "pairs tokens"],
    values: Int[Tensor, " pairs"],
    memory: Memory | None = None,
) -> Bool[Tensor, " pairs"]:
    """Return which questions are answered: the likeliest of all tokens, not of the values alone, is the right one."""
    return answers_of(model, questions, memory) == values


@torch.no_grad()
def answers_of(
    model: LongMemForCausalLM, questions: Int[Tensor, "pairs tokens"], memory: Memory | None = None
) -> Int[Tensor, " pairs"]:
    """Return the token that the model finds likeliest after each question, of all tokens."""
    logits = model(questions.to(model.input_device), memory=memory, logits_to_keep=1).logits[:, -1]
    return logits.argmax(dim=-1).cpu()
