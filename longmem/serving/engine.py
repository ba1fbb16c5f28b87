"""What a server does with its model: one request after the other, each with a memory of its own beside a bank that it names."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from longmem.memory import BankShards, MemoryBank
from longmem.memory.checks import got, validate_text
from longmem.model.modeling import LongMemForCausalLM
from longmem.serving.banks import NamedBanks
from longmem.streaming.stream import Decoder
from longmem.tracing import Trace, explain

Result = TypeVar("Result")


class BusyError(RuntimeError):
    """So many requests wait that no more are taken."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for: text to continue, and how. `bank`: name of one that is read; None: what the text holds is all."""

    token_ids: Sequence[int]
    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    stop: Sequence[str] = ()
    seed: int | None = None
    bank: str | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was written; `finish_reason`: "stop" at its natural end or a stop string, "length" at the limit of tokens."""

    text: str
    finish_reason: str
    num_tokens: int


class Engine:
    """A model, its named banks, and one thread that works for all requests.

    Args:
        model: answers.
        banks: that requests may name.
        max_waiting: requests that wait at most; one more raises BusyError.
    """

    def __init__(self, model: LongMemForCausalLM, banks: NamedBanks, max_waiting: int = 64) -> None:
        self.model, self.banks, self.max_waiting = model, banks, max_waiting
        self._waiting = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="longmem")
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="longmem-aside")

    def refuse_if_busy(self) -> None:
        """Raise BusyError if as many wait as may."""
        if self._waiting >= self.max_waiting:
            raise BusyError(f"{self._waiting} requests wait already; ask again in a moment.")

    async def run(self, work: Callable[[], Result], *, aside: bool = False) -> Result:
        """Return what `work` returns, when its turn comes; `aside`: beside the model's work, for what does without it."""
        self.refuse_if_busy()
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._aside if aside else self._worker, work)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Finish what runs, and close the banks."""
        self._aside.shutdown(cancel_futures=True)
        self._worker.shutdown(cancel_futures=True)
        self.banks.close()

    def ids(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of a text or, up to where its answer begins, of a conversation."""
        return prompt_ids(self.model.tokenizer, prompt)

    def answer(self, request: Request, on_text: Callable[[str], None], cancelled: threading.Event) -> Answer:
        """Write an answer; `on_text` gets its text in pieces, and `cancelled` ends it early.

        Without a temperature `top_p` draws at the model's own, as a client expects who knows no other default than 1.
        """
        ids, memory = self.place(request, cancelled)
        watcher = _Watcher(self.model.tokenizer, request.stop, on_text)
        sampled = {"temperature": request.temperature, "top_p": request.top_p}
        options: dict[str, Any] = {name: value for name, value in sampled.items() if value is not None}
        if request.temperature == 0:  # the likeliest token is in every share
            options = {"do_sample": False}
        elif request.temperature is not None or (request.top_p or 1) < 1:
            options["do_sample"] = True
        start = torch.tensor([ids], device=self.model.input_device)
        with torch.random.fork_rng(), torch.no_grad():
            if request.seed is not None:
                torch.manual_seed(request.seed)
            output = self.model.generate(
                start,
                attention_mask=torch.ones_like(start),
                memory=memory,
                max_new_tokens=request.max_new_tokens,
                streamer=watcher,
                stopping_criteria=StoppingCriteriaList([_Ended(watcher, cancelled)]),
                **options,
            )
        num_tokens = output.shape[1] - len(ids)
        at_limit = num_tokens >= request.max_new_tokens and not watcher.has_stopped
        return Answer(watcher.text, "length" if at_limit and not self._ends(int(output[0, -1])) else "stop", num_tokens)

    def explain(self, request: Request, answer: str, cancelled: threading.Event | None = None) -> Trace:
        """Return who read what in an answer that was given."""
        ids, memory = self.place(request, cancelled)
        return explain(self.model, ids, memory=memory or MemoryBank.for_model(self.model), answer=answer)

    def place(self, request: Request, cancelled: threading.Event | None = None) -> tuple[list[int], Any]:
        """Return the tokens that go into the window, and the memory: of those before them, and of the bank that is named.

        Raises CancelledError if `cancelled` is set while those before are encoded.
        """

        def go_on(*_: int) -> None:
            if cancelled is not None and cancelled.is_set():
                raise CancelledError

        ids, config = list(request.token_ids), self.model.config
        shared = [] if request.bank is None else [self.banks.get(request.bank)]
        if len(ids) > config.segment_length:
            leaving = len(ids) - config.segment_length // 2
            leaving += -leaving % config.chunk_size
            leaving -= config.chunk_size * (leaving >= len(ids))  # of large chunks: something must stand in the window
            own = MemoryBank.for_model(self.model, capacity_tokens=None)
            self.model.memorize(own, ids[:leaving], "earlier in this conversation", progress=go_on)
            shared.append(own)
            ids = [*config.missing_start(ids[leaving:]), *ids[leaving:]]
        readable = [bank for bank in shared if not bank.is_empty]
        return ids, BankShards(readable) if len(readable) > 1 else readable[0] if readable else None

    def _ends(self, token: int) -> bool:
        ends = self.model.generation_config.eos_token_id
        return token in (ends if isinstance(ends, list) else [ends])


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Return a conversation in a tokenizer's chat format or, if it has none, as lines that name who speaks.

    Raises ValueError if the format has no place for it, as for a system's message, or two of one speaker in a row.
    """
    if getattr(tokenizer, "chat_template", None):
        try:
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        except Exception as error:  # whatever a template makes of it; most raise jinja's own error
            roles = ", ".join(each["role"] for each in messages)
            raise ValueError(
                f"`messages` must be a conversation that the model's chat template takes, got {got(roles)}, of which it says: "
                f"{error}; leave out what it has no place for."
            ) from error
    # An answer stands right behind the colon: so it is written, and a talk that goes on has it where it was.
    said = (
        f"{each['role'].capitalize()}:{' ' * (each['role'] != 'assistant')}{each['content']}\n" for each in messages
    )
    return f"{''.join(said)}Assistant:"


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """Return the tokens of a text or, by `chat_text`, of a conversation up to where its answer begins; errors as there."""
    is_text, has_format = isinstance(prompt, str), getattr(tokenizer, "chat_template", None)
    text = prompt if isinstance(prompt, str) else chat_text(tokenizer, prompt)
    validate_text("prompt" if is_text else "messages", text)
    return list(tokenizer(text, add_special_tokens=is_text or not has_format)["input_ids"])


class _Watcher(BaseStreamer):
    """Hands on text as it comes, and holds back what may be the start of a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], on_text: Callable[[str], None]) -> None:
        self.stop, self.on_text = [each for each in stop if each], on_text
        self.text, self.has_stopped, self._held = "", False, ""
        self._decoder: Decoder | None = None  # there from the prompt on, which comes first and is not shown
        self._tokenizer = tokenizer

    def put(self, value: Tensor) -> None:
        if self._decoder is None:
            self._decoder = Decoder(self._tokenizer, skip_special_tokens=True)
            return
        for token in value.flatten().tolist():
            self._take(self._decoder.push(token))

    def end(self) -> None:
        if self._decoder is not None:
            self._take(self._decoder.rest(), is_end=True)

    def _take(self, text: str, is_end: bool = False) -> None:
        if self.has_stopped:
            return
        held = self._held + text
        places = [place for each in self.stop if (place := held.find(each)) >= 0]
        self.has_stopped = bool(places)
        keep = min(places) if places else len(held) if is_end else len(held) - self._may_begin(held)
        self._held = held[keep:]
        if keep:
            self.text += held[:keep]
            self.on_text(held[:keep])

    def _may_begin(self, text: str) -> int:
        """Return how many of the last characters are the start of a stop string."""
        lengths = (size for each in self.stop for size in range(1, len(each)) if text.endswith(each[:size]))
        return max(lengths, default=0)


class _Ended(StoppingCriteria):
    def __init__(self, watcher: _Watcher, cancelled: threading.Event) -> None:
        self.watcher, self.cancelled = watcher, cancelled

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ended = self.watcher.has_stopped or self.cancelled.is_set()
        return torch.full((input_ids.shape[0],), ended, dtype=torch.bool, device=input_ids.device)
