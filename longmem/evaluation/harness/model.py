"""LongMem as a model of lm-evaluation-harness: what overflows the window of a request is in a memory of that request."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from longmem.console import without_warnings_of
from longmem.evaluation.systems import Banks, MemorySystem, Question
from longmem.model.modeling import LongMemForCausalLM
from longmem.model.opening import open_model
from longmem.settings.environment import chosen_device

Tokens = tuple[int, ...]


@register_model("longmem")
class LongMemLM(HFLM):
    """lm-eval's `hf` model (0.4.13), whose long requests read memory instead of being cut off.

    A request that fits the window is scored as `hf` scores it, without memory. Of a longer one the end stands in the
    window, the very tokens that `hf` would keep, and what that would cut off is in a memory bank. No bank outlives the call,
    and a request reads its own tokens only: requests with the same past are encoded once.

    Args:
        pretrained: what `open_model` takes, or an open model.
        dtype: of backbone and side network; None or "auto": as they were saved.
        window: tokens that the model sees at once; default: `segment_length`.
        max_length: what `hf` calls the window.
        memory: "on", or "off" to cut long requests off on the left, as `hf` does.
        local_tokens: tokens of a long context that stay in the window; default: as many as find room there. With fewer,
            options of different length share the work of reading the context.
        batch_size: rows that are run at once, or "auto".
        max_batch_size: at most, with "auto".
        device: default: the GPU; the CPU where there is none. An open model stays where it is.
        add_bos_token: as for `hf`; default: what the tokenizer does.
        prefix_token_id: stands before a text without context; default: the tokenizer's bos, or eos token.

    Raises:
        ValueError: a setting is out of its range, or the tokenizer has no eos token, which lm-eval needs.
    """

    def __init__(
        self,
        pretrained: str | LongMemForCausalLM,
        *,
        dtype: str | None = None,
        window: int | None = None,
        memory: str | bool = "on",
        local_tokens: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        device: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_length: int | None = None,
    ) -> None:
        if window is not None and max_length is not None:
            raise ValueError(f"`max_length` is another name of `window`, got {max_length} and {window}; give one.")
        window = max_length if window is None else window
        validate(window=window, memory=memory, local_tokens=local_tokens)
        if isinstance(pretrained, str):
            model = open_model(pretrained, dtype=None if dtype == "auto" else dtype)
            # lm-eval's command line says cuda:0 where nothing was said, also without a GPU.
            is_missing = device is not None and device.startswith("cuda") and not torch.cuda.is_available()
            model.to(chosen_device("auto" if is_missing else device))  # type: ignore[arg-type]
        else:
            model = pretrained
        validate_tokenizer(model)
        options: dict[str, Any] = {"batch_size": batch_size, "max_batch_size": max_batch_size}
        options |= {"add_bos_token": add_bos_token, "prefix_token_id": prefix_token_id, "softmax_dtype": "float32"}
        options |= {"tokenizer": copy.deepcopy(model.tokenizer)}  # which gets a padding token
        with without_warnings_of("lm_eval"):  # about what an open model makes superfluous
            super().__init__(model, "causal", max_length=window or model.config.segment_length, **options)
        self.memory = memory in ("on", True)
        self.local_tokens = self.max_length if local_tokens is None else local_tokens
        self.encoded_tokens = 0  # in all memories so far

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in the windows of `hf`; each reads all that stands before it."""
        if not self.memory:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for start in range(0, len(ids), self.max_length):
                windows.append((None, ids[:start] or [self.prefix_token_id], ids[start : start + self.max_length]))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether it is the greedy one) of each (texts, context, continuation)."""
        are_long = [self.memory and len(own) + len(more) > self.max_length + 1 for _, own, more in requests]
        long, rest = parted(requests, are_long)
        found = super()._loglikelihood_tokens(rest, disable_tqdm, override_bs) if rest else []
        return in_order(are_long, self._score_with_memory(long, disable_tqdm) if long else [], found)

    def _score_with_memory(self, requests: Sequence[Any], disable_tqdm: bool) -> list[tuple[float, bool]]:
        found = {}
        contexts = [(context, len(continuation)) for _, context, continuation in requests]
        for system, members in self._readers(contexts, "Scoring with memory", disable_tqdm):
            (answer,) = system.score([Question([], [requests[number][2] for number in members])])
            for number, continuation in zip(members, answer.candidates, strict=True):
                found[number] = continuation.total, continuation.is_greedy
                if requests[number][0] is not None:  # a window of a longer text is no request
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return [found[number] for number in range(len(requests))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each context, up to a stop string; those that fit the window in batches."""

        def is_long(request: Any) -> bool:
            return self.memory and len(self.tok_encode(request.args[0])) > self.max_length - self._room(request)

        are_long = list(map(is_long, requests))
        long, rest = parted(requests, are_long)
        found = super().generate_until(rest, disable_tqdm=disable_tqdm) if rest else []
        return in_order(are_long, self._generate_with_memory(long, disable_tqdm) if long else [], found)

    def _generate_with_memory(self, requests: Sequence[Any], disable_tqdm: bool) -> list[str]:
        # The window keeps what `hf` keeps: it leaves room for all new tokens, though the last one is never read.
        rooms = [self._room(request) + 1 for request in requests]
        contexts = [(self.tok_encode(request.args[0]), room) for request, room in zip(requests, rooms, strict=True)]
        found = {}
        for system, members in self._readers(contexts, "Generating with memory", disable_tqdm):
            for number in members:
                reader, ids = system.begun((), rooms[number], ())
                context, options = requests[number].args
                found[number] = self._continue(ids, options, reader.memory)
                self.cache_hook.add_partial("generate_until", (context, options), found[number])
        return [found[number] for number in range(len(requests))]

    @torch.no_grad()
    def _continue(self, ids: list[int], options: dict[str, Any], memory: Any) -> str:
        """Return what `hf` would make of a context, with a memory to read."""
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        settings: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        until = handle_stop_sequences(settings.pop("until"), eos=eos)
        tokens = torch.tensor([ids], device=self.device)
        settings |= {"attention_mask": torch.ones_like(tokens), "memory": memory}
        max_length = len(ids) + settings.pop("max_gen_toks")
        output = self._model_generate(tokens, max_length=max_length, stop=until, **settings)
        return postprocess_generated_text(self.tok_decode(output[0, len(ids) :].tolist()), until, None)

    def _room(self, request: Any) -> int:
        return normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]

    def _readers(
        self, requests: Sequence[tuple[Sequence[int], int]], title: str, disable_tqdm: bool
    ) -> Iterator[tuple[MemorySystem, list[int]]]:
        """Yield a system that has read a past and what stays in the window, and the numbers of the requests that have these.

        Sorted, so that a past comes right before those that begin with it, and a bank goes on instead of beginning anew. The
        banks are the system's alone. `requests` are contexts, each with the tokens after it to leave room for; `title` is of
        the progress bar.
        """
        groups: dict[tuple[Tokens, Tokens], list[int]] = {}
        for number, (context, room) in enumerate(requests):
            if room > self.max_length:
                raise ValueError(
                    f"`window` must hold what follows a context, got {self.max_length} tokens for {room}; choose a larger "
                    "one, at most what the backbone was trained on, or generate less (`max_gen_toks`)."
                )
            stop = max(0, len(context) - min(self.local_tokens, self.max_length + 1 - room))
            groups.setdefault((tuple(context[:stop]), tuple(context[stop:])), []).append(number)
        rows = self.batch_size if isinstance(self.batch_size, int) else 1
        banks = Banks(self.model, keep=1, batch_size=rows)
        # One more than the model sees: the last token of a continuation is predicted and never read.
        options = {"window": self.max_length + 1, "local_tokens": self.local_tokens, "batch_size": rows}
        system = MemorySystem("on", self.model, banks=banks, **options)
        for past_and_local, members in tqdm(sorted(groups.items()), desc=title, disable=disable_tqdm):
            system.read(past_and_local)
            yield system, members
        self.encoded_tokens += banks.encoded_tokens


def parted(requests: Sequence[Any], are_long: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    """Return the long requests, and the rest."""
    long, rest = ([each for each, own in zip(requests, are_long, strict=True) if own == kind] for kind in (True, False))
    return long, rest


def in_order(are_long: Sequence[bool], long: Sequence[Any], rest: Sequence[Any]) -> list[Any]:
    """Return the answers to the long requests and to the rest, in the order of all."""
    parts = {True: iter(long), False: iter(rest)}
    return [next(parts[each]) for each in are_long]


def validate(*, window: int | None, memory: str | bool, local_tokens: int | None) -> None:
    """Raise ValueError for a setting out of its range."""
    if window is not None and window < 2:
        raise ValueError(f"`window` must be at least 2 tokens, got {window}.")
    if local_tokens is not None and local_tokens < 1:
        raise ValueError(f"`local_tokens` must be at least 1, which predicts the next token, got {local_tokens}.")
    if memory not in ("on", "off", True, False):
        raise ValueError(f"`memory` must be on or off, got {memory!r}.")


def validate_tokenizer(model: LongMemForCausalLM) -> None:
    """Raise ValueError if the tokenizer has no eos token."""
    if model.tokenizer.eos_token_id is None:
        raise ValueError(
            "`pretrained` must have a tokenizer with an `eos_token`, where generation stops and which stands before texts "
            f"without context, got none for {model.config.backbone_name_or_path}; set one in the tokenizer's files."
        )
