"""A stream: unlimited tokens in and out. A token is in the local window, or in memory once it has left it, never in both."""

import contextlib
import copy
import itertools
import math
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, GenerationConfig

from longmem import files
from longmem.backbone.cache_names import as_keyword, cache_of
from longmem.errors import did_you_mean
from longmem.memory import MemoryBank
from longmem.memory.checks import checked_methods, got
from longmem.memory.memorize import encodable
from longmem.streaming import state as saved
from longmem.streaming.state import StreamingModel, StreamState, own_random_numbers, random_state, set_random_state

LOCK = "stream.lock"  # held by the process that saves
# Fields of transformers' generation configuration that say how one token is chosen.
CHOICE = (
    *("do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "sequence_bias"),
    *("renormalize_logits", "remove_invalid_values", "eos_token_id", "pad_token_id"),
)
LEAST_TEMPERATURE = 1e-6  # scores divided by less may be no numbers; and so near to 0 hardly anything is left to chance
# Those that act on what is drawn, each with its range; without `do_sample` nothing is.
DRAWN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": (f"a number of at least {LEAST_TEMPERATURE}", lambda value: LEAST_TEMPERATURE <= value < math.inf),
    "top_k": ("an integer of 0 (no limit) or more", lambda value: value >= 0 and value == int(value)),
    **dict.fromkeys(("top_p", "top_h", "typical_p"), ("above 0 and at most 1", lambda value: 0 < value <= 1)),
    "min_p": ("from 0 to 1", lambda value: 0 <= value <= 1),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), ("from 0 to below 1", lambda value: 0 <= value < 1)),
}
# How tokenizers that fall back to bytes write them.
BYTE = re.compile("<0x[0-9A-F]{2}>")


@checked_methods("__init__")  # made by `stream` and `load` alone
class MemoryStream:
    """Unlimited tokens in and out; made by `LongMemForCausalLM.stream`, or by `load` from a folder that `save` wrote.

    The local window holds at most `window` tokens. When the next one finds no room, the oldest `window - keep` leave: their
    position-free keys and values, made by the frozen backbone in that window, go to the bank. The `keep` others begin the
    next window, whose cache is computed anew; so it is when somebody else has changed the bank. What the model computes
    therefore depends on the bank and on the tokens in the window alone, whatever the architecture, and the memory it takes
    outside the bank is that of one window. After an interruption (Ctrl-C, an error) `num_tokens` says how many were taken
    in, and the stream can go on.
    """

    def __init__(self, model: StreamingModel, memory: MemoryBank, state: StreamState) -> None:
        self.model = model
        self.memory = memory
        self._state = state
        # The cache holds the first `_cached` tokens of the window; the last one waits for what follows it.
        self._cache: Cache | None = None
        self._cached = 0
        self._start: list[int] = []  # what stands before the window in the cache, and is no token of the stream
        self._bank_version = memory.version  # that the cache was computed with

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

    def read(self, text_or_ids: str | Sequence[int] | Tensor) -> int:
        """Take in text or token ids, as many as there are; return how many tokens these were.

        A text may come in any pieces, also blank ones: the tokens of all pieces decode to the whole. Raises ValueError if
        ids are none, or outside the vocabulary.
        """
        refuse_training(self.model)
        ids = self._to_ids(text_or_ids).tolist()
        for _ in self._take_in(ids, logits_to_keep=1):
            pass
        return len(ids)

    def score(self, text_or_ids: str | Sequence[int] | Tensor) -> Float[Tensor, " tokens"]:
        """Take in text or token ids; return the negative log-likelihood of each in nats, given everything before it.

        The very first token of a stream has nothing before it: its entry is NaN. Arguments and errors as for `read`.
        """
        refuse_training(self.model)
        ids = self._to_ids(text_or_ids)
        done = int(self.num_tokens == 0 and len(ids) > 0)
        losses = [torch.full((done,), math.nan)]
        for logits in self._take_in(ids.tolist(), logits_to_keep=0):
            targets = ids[done : done + len(logits)].to(logits.device)
            losses.append(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu())
            done += len(logits)
        return torch.cat(losses)

    def generate(self, max_new_tokens: int | None = None, **options: Any) -> Iterator[int]:
        """Yield new tokens one at a time; what has been yielded is part of the stream.

        Args:
            max_new_tokens: stop after so many; None goes on to the end-of-sequence token, perhaps for ever.
            options: how a token is chosen, as in transformers' `generate` (do_sample, temperature, top_p, repetition_penalty,
                eos_token_id, ...), in place of the model's `generation_config`; what looks back sees the local window.

        Raises ValueError if nothing has been read yet, or an option has no meaning for a stream.
        """
        refuse_training(self.model)
        config = one_token_config(self.model.generation_config, options)
        if not self._state.local_ids:
            raise ValueError("`generate` needs a token to go on from; `read` a prompt first.")
        # A view of the model with this configuration and no other: `generate` would fill in the model's own length limits.
        chooser = copy.copy(self.model)
        chooser.generation_config = config
        return self._generate(max_new_tokens, chooser)

    def generate_text(
        self, max_new_tokens: int | None = None, *, skip_special_tokens: bool = False, **options: Any
    ) -> Iterator[str]:
        """Yield the text of what `generate` yields, as soon as it is certain; the pieces together are what all ids decode to.

        A token may be part of a character, and the space before a word is none of it in some tokenizers, so tokens that are
        decoded one by one lose both. `skip_special_tokens`: leave out those that end a text and the like. Other arguments and
        errors as for `generate`.
        """
        return decoded(self.model.tokenizer, self.generate(max_new_tokens, **options), skip_special_tokens)

    def _to_ids(self, text_or_ids: str | Sequence[int] | Tensor) -> Int[Tensor, " tokens"]:
        return encodable(self.model, text_or_ids, is_piece=True, continues=self.num_tokens > 0).token_ids

    def _generate(self, max_new_tokens: int | None, chooser: StreamingModel) -> Iterator[int]:
        ends = end_tokens(chooser.generation_config)
        for _ in itertools.count() if max_new_tokens is None else range(max_new_tokens):
            token = self._next_token(chooser)
            for _ in self._take_in([token], logits_to_keep=1):
                pass
            yield token
            if token in ends:
                return

    def _next_token(self, chooser: StreamingModel) -> int:
        """Return the token that `generate` chooses, drawn with the stream's own random numbers."""
        self._forget_cache_if_bank_changed()
        self._begin()
        device, local = self.model.input_device, torch.tensor([[*self._start, *self._state.local_ids]])
        cache = {} if self._cache is None else as_keyword(self._cache)
        with self._forgetting_cache_on_error(), own_random_numbers(device):
            set_random_state(self._state.random, device)
            mask = torch.ones_like(local).to(device)
            output: Any = chooser.generate(local.to(device), attention_mask=mask, memory=self.memory, **cache)
            self._state.random = random_state(device)
        self._cache, self._cached = cache_of(output), len(self._state.local_ids)
        return int(output.sequences[0, -1])

    @torch.no_grad()
    def _take_in(self, ids: list[int], logits_to_keep: int) -> Iterator[Float[Tensor, "tokens vocabulary"]]:
        """Append ids to the window and make room as needed; yield the logits of what is computed meanwhile.

        With `logits_to_keep=0` these are the predictions of all `ids`, in order, except a stream's first token.
        """
        state, taken = self._state, 0
        self._forget_cache_if_bank_changed()
        if logits_to_keep == 0 and self._cached == len(state.local_ids):
            self._forget_cache()  # interrupted after it chose a token: the prediction of the next one is needed again
        if self._cached < len(state.local_ids) - 1:
            self._compute(len(state.local_ids) - 1, logits_to_keep=1)
        while taken < len(ids):
            if len(state.local_ids) == state.window:
                if self._cached < state.window and logits_to_keep == 0:
                    yield self._compute(state.window, logits_to_keep)
                self._make_room()
            new = ids[taken : taken + state.window - len(state.local_ids)]
            state.local_ids += new
            state.num_tokens += len(new)
            taken += len(new)
            if self._cached < len(state.local_ids) - 1:
                yield self._compute(len(state.local_ids) - 1, logits_to_keep)

    def _make_room(self) -> None:
        """Move the oldest tokens of the window to memory, and compute the cache of the others anew."""
        state = self._state
        leaving = self.local_ids[: state.window - state.keep]
        self.memory.ready_for(self.model)  # what is written now is the bank's current encoder's, or refused
        keys, values = self.model.encoder.encode(leaving[None])
        # The bank refuses a first write to a document that somebody else has written meanwhile.
        is_there = state.is_written and state.document_id in self.memory
        write = self.memory.append if is_there else self.memory.add
        write(state.document_id, [k[0] for k in keys], [v[0] for v in values], leaving, segment="new")
        state.is_written, state.local_ids = True, state.local_ids[len(leaving) :]
        self._forget_cache()
        if state.local_ids:
            self._compute(state.keep, logits_to_keep=1)

    def _compute(self, stop: int, logits_to_keep: int) -> Float[Tensor, "tokens vocabulary"]:
        """Return the logits of the window's tokens from the first that is not cached to `stop`, and cache them."""
        self._begin()
        start = [] if self._cached else self._start
        ids = torch.tensor([[*start, *self._state.local_ids[self._cached : stop]]], device=self.model.input_device)
        with self._forgetting_cache_on_error():
            options = {"memory": self.memory, "cache": self._cache, "logits_to_keep": logits_to_keep}
            output = self.model(ids, use_cache=True, **options)
        self._cache, self._cached = cache_of(output), stop
        return output.logits[0, len(start) if logits_to_keep == 0 else 0 :]

    def _begin(self) -> None:
        """Decide what stands before the window, if nothing is computed yet; tokens that come later change nothing."""
        if self._cache is None:
            self._start = self.model.config.missing_start(self._state.local_ids)

    @contextlib.contextmanager
    def _forgetting_cache_on_error(self) -> Iterator[None]:
        """Drop the cache when the block is interrupted, which may leave it filled in some layers only."""
        try:
            yield
        except BaseException:
            self._forget_cache()
            raise

    def _forget_cache_if_bank_changed(self) -> None:
        if self.memory.version != self._bank_version:
            self._forget_cache()

    def _forget_cache(self) -> None:
        self._cache, self._cached = None, 0
        self._bank_version = self.memory.version

    def save(self, folder: str | PathLike[str]) -> None:
        """Write stream and bank to a folder; a process killed meanwhile leaves the stream before, or this one.

        Banks that killed processes have left there go; nothing else does.

        Raises ValueError if the folder can't be written.
        """
        folder, bank = Path(folder), f"bank-{secrets.token_hex(8)}"
        try:
            files.make_folder(folder)
            with files.locked(folder / LOCK):
                try:
                    self.memory.save(folder / bank)
                    files.sync(folder)
                    saved.write_state(folder, bank, self._state)
                except BaseException:
                    # An error after the state was put into its place, such as that of a sync, leaves it there.
                    if not saved.may_name(folder, bank):
                        files.remove(folder / bank)
                    raise
                for path in folder.iterdir():
                    if re.fullmatch(saved.BANK_NAME, path.name) and path.name != bank:
                        files.remove(path)
        except OSError as error:
            raise ValueError(
                f"`folder` must be a folder that can be written, with room for the stream, got {str(folder)!r} ({error}); the "
                "stream that was saved there before is unharmed. Free some room, or use another folder."
            ) from error

    @classmethod
    def load(
        cls, folder: str | PathLike[str], model: StreamingModel, *, device: torch.device | str | None = None
    ) -> "MemoryStream":
        """Return the stream saved in `folder`; it goes on as if it had never stopped.

        Its bank is on `device`; None: with the model.

        Raises ValueError if there is no stream, it is damaged, or another encoder wrote it.
        """
        folder = Path(folder)
        while True:
            bank, state = saved.read_state(folder)
            try:
                memory = MemoryBank.load(folder / bank, model=model, device=device)
                break
            except ValueError:
                if saved.read_state(folder)[0] == bank:  # else a save has put another in its place meanwhile
                    raise
        state.validate(model, memory.chunk_size)
        return cls(model, memory, state)


def start_stream(
    model: StreamingModel, memory: MemoryBank, document_id: str, window: int | None, keep: int | None, seed: int
) -> MemoryStream:
    """Return a new stream; see `LongMemForCausalLM.stream`."""
    if not isinstance(memory, MemoryBank):
        raise ValueError(f"`memory` must be one MemoryBank, which can be written to, got {type(memory).__name__}.")
    memory.refuse_reader()
    if document_id in memory:
        raise ValueError(
            f"`document_id` must be new to the bank, got {document_id!r}; to go on with a saved stream, open it with "
            "`MemoryStream.load`."
        )
    window = model.config.segment_length if window is None else window
    if keep is None:
        keep = window - max(window // 2 // memory.chunk_size, 1) * memory.chunk_size
    with own_random_numbers(model.input_device):
        torch.manual_seed(seed)
        state = StreamState(document_id, window, keep, random_state(model.input_device))
    state.validate(model, memory.chunk_size)
    return MemoryStream(model, memory, state)


def one_token_config(defaults: GenerationConfig, options: dict[str, Any]) -> GenerationConfig:
    """Return the generation configuration for one token: the model's defaults, with the caller's options instead.

    Raises ValueError if an option says something else than how one token is chosen.
    """
    for name in options:
        if name not in CHOICE:
            raise ValueError(
                f"`{name}` has no meaning for a stream, whose tokens come one at a time.{did_you_mean(name, CHOICE)} "
                f"Options: {', '.join(CHOICE)}."
            )
    samples = options.get("do_sample", defaults.do_sample)
    for name, value in options.items():
        rule, holds = DRAWN.get(name, ("", lambda _: True))
        if rule and not (isinstance(value, int | float) and not isinstance(value, bool) and holds(value)):
            raise ValueError(f"`{name}` must be {rule}, got {got(value)}; leave it out for the model's own.")
        if rule and not samples:
            raise ValueError(f"`{name}` acts on what is drawn, and nothing is, got {got(value)}; add `do_sample=True`.")
    given = {name: value for name in CHOICE if (value := getattr(defaults, name, None)) is not None}
    return GenerationConfig(**{**given, **options}, max_new_tokens=1, return_dict_in_generate=True)


class Decoder:
    """Makes text of tokens, one after the other, as soon as it is certain; joined, it is what decoding all of them gives."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = False) -> None:
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        # Tokens that were shown, which say what stands between them and the next ones, and those that wait.
        self._window: list[int] = []
        self._num_shown = 0

    def push(self, token: int) -> str:
        """Return the text that a token makes certain; empty where more must come."""
        self._window.append(token)
        text = self.rest()
        # Half a character; or a byte, which makes the bytes before it unreadable if it does not go on with them.
        if not text or text.endswith("\ufffd") or BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))):
            return ""
        self._window, self._num_shown = self._window[self._num_shown :], len(self._window) - self._num_shown
        return text

    def rest(self) -> str:
        """Return the text of the tokens that wait, as they are."""
        shown, text = (
            self._tokenizer.decode(ids, skip_special_tokens=self._skips)
            for ids in (self._window[: self._num_shown], self._window)
        )
        return str(text[len(shown) :])


def decoded(tokenizer: Any, tokens: Iterable[int], skip_special_tokens: bool = False) -> Iterator[str]:
    """Yield the text of tokens, as soon as it is certain; the pieces together are what decoding all of them gives."""
    decoder = Decoder(tokenizer, skip_special_tokens)
    for token in tokens:
        if text := decoder.push(token):
            yield text
    if text := decoder.rest():
        yield text


def end_tokens(config: GenerationConfig) -> set[int]:
    """Return the ids that end a text."""
    ends: Any = config.eos_token_id
    if isinstance(ends, Tensor):
        ends = ends.flatten().tolist()
    return set(ends) if isinstance(ends, Iterable) else set() if ends is None else {ends}


def refuse_training(model: StreamingModel) -> None:
    """Raise ValueError in training mode, where dropout would make what a stream computes a matter of chance."""
    if model.training:
        raise ValueError("a stream needs the model in eval mode, got training mode; call `model.eval()`.")
