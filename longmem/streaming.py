"""A stream: unlimited tokens in and out. A token is in the local window, or in memory once it has left it, never in both."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from longmem.memorizing import to_token_ids
from longmem.memory import MemoryBank

if TYPE_CHECKING:
    from longmem.modeling import LongMemForCausalLM

STATE_FILE = "stream.json"
# Tokens come one at a time, so what spans several tokens or sequences of one `generate` has no meaning.
NOT_FOR_STREAMS = (
    *("max_length", "min_new_tokens", "min_length", "num_beams", "num_return_sequences", "stopping_criteria"),
    *("stop_strings", "assistant_model", "past_key_values", "memory", "input_ids", "attention_mask"),
)


@dataclasses.dataclass
class StreamState:
    """What a stream is, beside its model and its bank: enough to go on from.

    `local_ids` are the tokens in the window, `random` the states of the random number generators, as JSON can hold them.
    """

    document_id: str
    window: int
    keep: int
    random: dict[str, str]
    num_tokens: int = 0
    local_ids: list[int] = dataclasses.field(default_factory=list)


class MemoryStream:
    """Unlimited tokens in and out; made by `LongMemForCausalLM.stream`, or by `load` from a folder that `save` wrote.

    The local window holds at most `window` tokens. When the next one finds no room, the oldest `window - keep` leave: their
    position-free keys and values, made by the frozen backbone in that window, go to the bank. The `keep` others begin the
    next window, whose cache is computed anew. So what the model computes depends on the bank and on the tokens in the
    window alone, whatever the architecture, and the memory it takes outside the bank is that of one window.
    """

    def __init__(self, model: LongMemForCausalLM, memory: MemoryBank, state: StreamState) -> None:
        self.model = model
        self.memory = memory
        self._state = state
        # The cache holds the first `_cached` tokens of the window; the last one waits for what follows it.
        self._cache: Cache | None = None
        self._cached = 0

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens read and generated so far."""
        return self._state.num_tokens

    @property
    def local_ids(self) -> Int[Tensor, " tokens"]:
        """Return the ids of the tokens in the local window; those before them are in memory."""
        return torch.tensor(self._state.local_ids, dtype=torch.int64)

    def __repr__(self) -> str:
        local = f"{len(self._state.local_ids)} of {self._state.window} local"
        return f"MemoryStream({self.num_tokens} tokens, {local}, {self.memory!r})"

    # In and out --------------------------------------------------------------------------------------------------------

    def read(self, text_or_ids: str | Sequence[int] | Tensor) -> int:
        """Take in text or token ids, as many as there are; return how many tokens these were.

        Raises:
            ValueError: there is nothing to read, or ids are outside the vocabulary.
        """
        ids = to_token_ids(self.model, text_or_ids).tolist()
        for _ in self._take_in(ids, logits_to_keep=1):
            pass
        return len(ids)

    def score(self, text_or_ids: str | Sequence[int] | Tensor) -> Float[Tensor, " tokens"]:
        """Take in text or token ids; return the negative log-likelihood of each in nats, given everything before it.

        The very first token of a stream has nothing before it: its entry is NaN.

        Raises:
            ValueError: there is nothing to read, or ids are outside the vocabulary.
        """
        ids = to_token_ids(self.model, text_or_ids)
        losses = [torch.tensor([math.nan])] if self.num_tokens == 0 else []
        done = len(losses)
        for logits in self._take_in(ids.tolist(), logits_to_keep=0):
            targets = ids[done : done + len(logits)].to(logits.device)
            losses.append(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu())
            done += len(logits)
        return torch.cat(losses)

    def generate(self, max_new_tokens: int | None = None, **options: Any) -> Iterator[int]:
        """Yield new tokens one at a time; what has been yielded is part of the stream.

        Args:
            max_new_tokens: stop after so many; None goes on to the end-of-sequence token, perhaps for ever.
            options: of transformers' `generate`, for one sequence (do_sample, temperature, top_p, repetition_penalty,
                eos_token_id, ...); what looks back, like the penalty, sees the local window.

        Raises:
            ValueError: nothing has been read yet, or an option has no meaning for a stream.
        """
        for name in options:
            if name in NOT_FOR_STREAMS:
                raise ValueError(
                    f"`{name}` has no meaning for a stream, whose tokens come one at a time; leave it out."
                )
        if not self._state.local_ids:
            raise ValueError("`generate` needs a token to go on from; `read` a prompt first.")
        return self._generate(max_new_tokens, options)

    def _generate(self, max_new_tokens: int | None, options: dict[str, Any]) -> Iterator[int]:
        ends = options.get("eos_token_id", self.model.generation_config.eos_token_id)
        ends = ends if isinstance(ends, list) else [ends]
        count = 0
        while max_new_tokens is None or count < max_new_tokens:
            token = self._next_token(options)
            for _ in self._take_in([token], logits_to_keep=1):
                pass
            count += 1
            yield token
            if token in ends:
                return

    def _next_token(self, options: dict[str, Any]) -> int:
        """Return the token that `generate` chooses, drawn with the stream's own random numbers."""
        local = self.local_ids[None].to(self.model.input_device)
        cache: dict[str, Any] = {} if self._cache is None else {"past_key_values": self._cache}
        with self._forgetting_cache_on_error(), own_random_numbers(self.model.input_device):
            set_random_state(self._state.random, self.model.input_device)
            output: Any = self.model.generate(  # type: ignore[misc]  # transformers names `self` by a protocol
                local,
                attention_mask=torch.ones_like(local),
                memory=self.memory,
                max_new_tokens=1,
                return_dict_in_generate=True,
                **cache,
                **options,
            )
            self._state.random = random_state(self.model.input_device)
        self._cache, self._cached = output.past_key_values, len(self._state.local_ids)
        return int(output.sequences[0, -1])

    # The window --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _take_in(self, ids: list[int], logits_to_keep: int) -> Iterator[Float[Tensor, "tokens vocabulary"]]:
        """Append ids to the window and make room as needed; yield the logits of what is computed meanwhile.

        With `logits_to_keep=0` these are the predictions of all `ids`, in order, except a stream's first token.
        """
        state = self._state
        if self._cached < len(state.local_ids) - 1:  # just opened, or interrupted before
            self._compute(len(state.local_ids) - 1, logits_to_keep=1)
        while ids:
            if len(state.local_ids) == state.window:
                if self._cached < state.window and logits_to_keep == 0:
                    yield self._compute(state.window, logits_to_keep)
                self._make_room()
            room = state.window - len(state.local_ids)
            state.local_ids += ids[:room]
            state.num_tokens += len(ids[:room])
            ids = ids[room:]
            if self._cached < len(state.local_ids) - 1:
                yield self._compute(len(state.local_ids) - 1, logits_to_keep)

    def _make_room(self) -> None:
        """Move the oldest tokens of the window to memory, and compute the cache of the others anew."""
        state = self._state
        leaving = self.local_ids[: state.window - state.keep]
        keys, values = self.model.encode(leaving[None].to(self.model.input_device))
        write = self.memory.append if state.document_id in self.memory else self.memory.add
        write(state.document_id, [k[0] for k in keys], [v[0] for v in values], token_ids=leaving)
        state.local_ids = state.local_ids[len(leaving) :]
        self._cache, self._cached = None, 0
        if state.local_ids:
            self._compute(state.keep, logits_to_keep=1)

    def _compute(self, stop: int, logits_to_keep: int) -> Float[Tensor, "tokens vocabulary"]:
        """Return the logits of the window's tokens from the first that is not cached to `stop`, and cache them."""
        ids = self.local_ids[None, self._cached : stop].to(self.model.input_device)
        with self._forgetting_cache_on_error():
            output = self.model(
                ids, memory=self.memory, past_key_values=self._cache, use_cache=True, logits_to_keep=logits_to_keep
            )
        self._cache, self._cached = output.past_key_values, stop
        return output.logits[0]

    @contextlib.contextmanager
    def _forgetting_cache_on_error(self) -> Iterator[None]:
        """Drop the cache when the block is interrupted, which may leave it filled in some layers only."""
        try:
            yield
        except BaseException:
            self._cache, self._cached = None, 0
            raise

    # Saving ------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | PathLike[str]) -> None:
        """Write stream and bank to a folder; a process killed meanwhile leaves the stream before, or this one.

        Raises:
            ValueError: the folder can't be written.
        """
        folder = Path(folder)
        bank = f"bank-{self.num_tokens}"
        self.memory.save(folder / bank)
        draft = folder / f"{STATE_FILE}.draft"
        draft.write_text(json.dumps({"bank": bank, "stream": dataclasses.asdict(self._state)}), encoding="utf-8")
        os.replace(draft, folder / STATE_FILE)
        for old in folder.glob("bank-*"):
            if old.name != bank:
                shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(
        cls, folder: str | PathLike[str], model: LongMemForCausalLM, *, device: torch.device | str = "cpu"
    ) -> MemoryStream:
        """Return the stream saved in `folder`, with its bank on `device`; it goes on as if it had never stopped.

        Raises:
            ValueError: there is no stream, it is damaged, or another encoder wrote it.
        """
        path = Path(folder) / STATE_FILE
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            bank, state = saved["bank"], StreamState(**saved["stream"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`folder` must hold a saved stream, got {str(folder)!r}: {error!r}.") from error
        return cls(model, MemoryBank.load(path.parent / bank, model=model, device=device), state)


def start_stream(
    model: LongMemForCausalLM, memory: MemoryBank, document_id: str, window: int | None, keep: int | None, seed: int
) -> MemoryStream:
    """Return a new stream; see `LongMemForCausalLM.stream`."""
    longest, chunk_size = model.config.segment_length, memory.chunk_size
    if document_id in memory:
        raise ValueError(
            f"`document_id` must be new to the bank, got {document_id!r}; to go on with a saved stream, open it with "
            "`MemoryStream.load`."
        )
    window = longest if window is None else window
    if not chunk_size < window <= longest:
        raise ValueError(
            f"`window` must be more than one chunk of {chunk_size} tokens and at most the model's `segment_length`, "
            f"{longest}, got {window}."
        )
    if keep is None:
        keep = window - max(window // 2 // chunk_size, 1) * chunk_size
    if not 0 <= keep < window or (window - keep) % chunk_size:
        raise ValueError(
            "`keep` must be 0 or more and leave whole chunks to go, `window - keep` a multiple of `chunk_size`, got "
            f"window {window}, keep {keep} and chunks of {chunk_size}; {window - chunk_size} would do."
        )
    device = model.input_device
    with own_random_numbers(device):
        torch.manual_seed(seed)
        random = random_state(device)
    return MemoryStream(model, memory, StreamState(document_id, window, keep, random))


def own_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which random numbers can be drawn from other states without a trace outside."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def random_state(device: torch.device) -> dict[str, str]:
    """Return the states of the generators that sampling on `device` draws from, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: base64.b64encode(state.numpy().tobytes()).decode() for kind, state in states.items()}


def set_random_state(states: dict[str, str], device: torch.device) -> None:
    """Put the generators into these states; one without a state is left as it is."""
    for kind, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if kind == "cpu":
            torch.set_rng_state(state)
        elif device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
