"""Brief adaptation: a few minutes of next-token training that teach the side network to use a memory like this one."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from longmem.memory import MemoryBank
from longmem.modeling import LongMemForCausalLM

WARMUP_STEPS = 4
MAX_GRADIENT_NORM = 1.0
DOCUMENT = "text so far"


@dataclasses.dataclass(frozen=True)
class AdaptationStep:
    """One optimizer step: `loss` before it in nats per token, `memory_tokens` that could be read, `seconds` it took."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    memory_tokens: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Return tokens trained per second, writing to memory included."""
        return self.tokens / self.seconds


def adaptable_parameters(model: LongMemForCausalLM) -> dict[str, nn.Parameter]:
    """Return, by name, what brief adaptation trains: attention and memory bias of each layer that reads memory.

    With LoRA that is the attention's adapters. The attention module is found the way the backbone's is, not by names,
    which differ between architectures.
    """
    chosen: dict[str, nn.Parameter] = {}
    trained = {id(weight) for weight in model.side_network.trained_parameters().values()}
    for number, layer in enumerate(model.side_network.layers):
        if layer.memory_bias is None:
            continue
        attends: Any = layer.attention
        attention = {id(weight) for weight in attends.parameters()} & trained
        for name, parameter in layer.named_parameters():
            if name == "memory_bias" or id(parameter) in attention:
                chosen[f"layers.{number}.{name}"] = parameter
    return chosen


def training_windows(
    documents: Sequence[Int[Tensor, " _tokens"]], window: int, steps: int | None
) -> Iterator[tuple[Int[Tensor, " _before"], list[Int[Tensor, " _window"]]]]:
    """Yield, for each document and pass, the text to write to memory first and the windows to train on after it.

    The windows are the last of each document, an equal share of the steps each, because they have the fullest memory;
    the first window of a document has nothing to remember and is never trained on. With more `steps` than windows the
    documents are passed again.
    """
    available = [len(ids) // window - 1 for ids in documents]
    if not documents or max(available) < 1:
        raise ValueError(
            f"`documents` must hold at least one of two windows of {window} tokens, got lengths "
            f"{[len(ids) for ids in documents][:8]}; choose a smaller `window` or a longer text."
        )
    left = math.inf if steps is None else steps
    while left > 0:
        for number, (ids, count) in enumerate(zip(documents, available, strict=True)):
            share = max(0, min(count, -(-left // (len(documents) - number))))
            left -= share
            if share:
                end = len(ids) // window * window
                start = end - int(share) * window
                yield ids[:start], list(ids[start:end].split(window))
        if steps is None:
            return


def adapt(
    model: LongMemForCausalLM,
    documents: Int[Tensor, " _tokens"] | Sequence[Int[Tensor, " _tokens"]],
    *,
    window: int | None = None,
    steps: int | None = None,
    max_seconds: float | None = None,
    learning_rate: float = 2e-4,
    bank_capacity: int = 65_536,
    log_file: str | PathLike[str] | None = None,
    progress: Callable[[AdaptationStep, int], None] | None = None,
) -> list[AdaptationStep]:
    """Train the reading layers' attention and memory biases on documents, each read in order; return the log.

    The loss is that of next-token prediction. A window reads a memory of the text before it in its document, nothing
    else, and is written only after its step, so that it can never read itself. AdamW without decay, linear warm-up
    over 4 steps, gradients clipped to norm 1. Windows come in order, because the memory is then written only once.

    Args:
        model: changed in place; the backbone and all other weights stay bit for bit.
        documents: token ids of one document, or of several, which never share a memory.
        window: tokens of one step; default `segment_length`.
        steps: optimizer steps; default: every window but each document's first, once.
        max_seconds: start no step after so many seconds.
        learning_rate: after warm-up.
        bank_capacity: tokens that the memory of a document can hold; the oldest leave.
        log_file: JSONL file to write, one line per step.
        progress: called with (step just done, steps in all).

    Raises:
        ValueError: no document has two windows, or a number is out of range.
    """
    documents = [documents] if isinstance(documents, Tensor) else list(documents)
    window = model.config.segment_length if window is None else window
    validate_adaptation(window, steps, learning_rate)
    plan = list(training_windows(documents, window, steps))
    total = sum(len(windows) for _, windows in plan)
    chosen = adaptable_parameters(model)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    was_training = model.training
    log: list[AdaptationStep] = []
    began = time.perf_counter()
    try:
        model.train().requires_grad_(False)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(chosen.values(), lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
        for before, windows in plan:
            bank = MemoryBank.for_model(model, capacity_tokens=bank_capacity)
            model.memorize(bank, before[-bank_capacity:], DOCUMENT)
            for ids in windows:
                if max_seconds is not None and time.perf_counter() - began > max_seconds:
                    return log
                log.append(train_step(model, bank, ids, optimizer, schedule, len(log) + 1))
                if log_file is not None:
                    append_line(log_file, log[-1])
                if progress is not None:
                    progress(log[-1], total)
    finally:
        model.train(was_training)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
    return log


def train_step(
    model: LongMemForCausalLM,
    bank: MemoryBank,
    token_ids: Int[Tensor, " window"],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    step: int,
) -> AdaptationStep:
    """Train on one window with the memory of the text before it, then write the window; return the log entry."""
    start = time.perf_counter()
    readable = bank.num_tokens
    learning_rate = float(schedule.get_last_lr()[0])
    ids = token_ids[None].to(model.input_device)
    output = model(ids, memory=bank, labels=ids)
    output.loss.backward()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM))
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    # Only now: the backward pass reads the bank once more (`longmem.attention.attend_rows`).
    keys, values = ([part[0] for part in parts] for parts in (output.memory_keys, output.memory_values))
    bank.append(DOCUMENT, keys, values, token_ids=token_ids)
    seconds = time.perf_counter() - start
    return AdaptationStep(step, output.loss.item(), norm, learning_rate, readable, len(token_ids), seconds)


def validate_adaptation(window: int, steps: int | None, learning_rate: float) -> None:
    """Raise ValueError for a number that is out of range."""
    if window < 2:
        raise ValueError(f"`window` must be at least 2 tokens, got {window}.")
    if steps is not None and steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}; leave it out to train on each window once.")
    if not learning_rate > 0:
        raise ValueError(f"`learning_rate` must be above 0, got {learning_rate}.")


def append_line(log_file: str | PathLike[str], entry: AdaptationStep) -> None:
    """Add one JSON object to a JSONL file."""
    values = {**dataclasses.asdict(entry), "tokens_per_second": round(entry.tokens_per_second, 1)}
    with Path(log_file).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
