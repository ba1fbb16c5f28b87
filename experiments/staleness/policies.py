"""The policy table: one encoder writes a bank, another one reads it, and every refresh policy says what happens then.

All systems of a seed answer the same stream of questions, window after window, so that policies that act when they are read
act as they would for a user. The record of a system holds every answer, and what was encoded again for them.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.learned_recall.task import RecallTask
from experiments.mapped_refresh import Mapped
from experiments.staleness.library import (
    AskedWindow,
    LibraryDocument,
    draw_library,
    draw_stream,
)
from experiments.staleness.settings import Asking, LibrarySettings
from experiments.staleness.systems import PolicySystem, weighted
from longmem.memory import MemoryBank
from longmem.model.modeling import LongMemForCausalLM


def write_library(model: LongMemForCausalLM, library: Sequence[LibraryDocument]) -> MemoryBank:
    """Return one bank, with exact search over all of it, that holds all documents."""
    bank = MemoryBank.for_model(model, capacity_tokens=None, index="flat")
    for document in library:
        model.memorize(bank, document.token_ids, document.document_id)
    return bank


def draw_questions_about(
    task: RecallTask, settings: LibrarySettings, asking: Asking, seed: int
) -> tuple[list[LibraryDocument], list[AskedWindow]]:
    """Return the library and the stream of questions of a seed."""
    generator = torch.Generator().manual_seed(3 * seed + 2)
    library = draw_library(task, settings, asking, generator)
    return library, draw_stream(task, settings, library, generator)


def copy_bank(bank: MemoryBank) -> MemoryBank:
    """Return a bank with the same content and encoders, for one system to change."""
    return bank.copy()


def run_system(
    system: PolicySystem,
    written: MemoryBank,
    reader: LongMemForCausalLM,
    library: Sequence[LibraryDocument],
    stream: Sequence[AskedWindow],
    asking: Asking,
) -> dict[str, Any]:
    """Return what a system answers about a library, and what it costs; the bank that the writer has written stays as it is.

    `losses` in nats, `right` and `found` (whether the answer was among the chunks that the question's last token read) have
    a number for each question; `tokens` for each window what had been encoded again by then, probes and samples included;
    `seconds` are of the processor, for the stream and all refreshing; `bank` is a hash of what the bank holds in the end.
    """
    bank = write_library(reader, library) if system.is_fresh else copy_bank(written)
    losses: list[float] = []
    right: list[bool] = []
    found: list[bool] = []
    tokens: list[int] = []
    begin = time.process_time()
    with weighted(reader, system.stale_weight), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no map from encoder version")  # the record has what it says
        system.prepare(bank, reader)
        for window in stream:
            nats, answered, was_read = ask(reader, bank, window, asking)
            losses += nats.tolist()
            right += answered.tolist()
            found += was_read.tolist()
            if system.idle_tokens:
                bank.freshness.sweep(reader, system.idle_tokens)
            tokens.append(bank.freshness.refreshed.tokens + bank.freshness.refreshed.probed_tokens)
    policy = bank.freshness.policy
    return {
        "losses": losses,
        "right": right,
        "found": found,
        "tokens": tokens,
        "mapped": bank.freshness.refreshed.mapped,
        "gains": list(policy.gains.values()) if isinstance(policy, Mapped) else [],
        "neighbours": list(policy.recalls.values()) if isinstance(policy, Mapped) else [],
        "seconds": time.process_time() - begin,
        "bank_tokens": bank.num_tokens,
        "bank": bank_hash(bank),
    }


@torch.no_grad()
def ask(
    reader: LongMemForCausalLM, bank: MemoryBank, window: AskedWindow, asking: Asking
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each question of a window its loss in nats, whether it is answered, and whether the answer was read."""
    memory = bank if asking == "shared" else bank.select(window.document_id)
    output = reader(window.questions, memory=memory, logits_to_keep=1, output_memory_reads=True)
    logits = output.logits[:, -1]
    losses = nn.functional.cross_entropy(logits, window.values, reduction="none")
    right = logits.argmax(dim=-1) == window.values
    if not output.memory_reads:  # nothing in the bank may be read
        return losses, right, torch.zeros_like(right)
    rows = output.memory_reads[0].rows[:, 0, -1]
    places = bank.locate(rows)
    hits = [
        place is not None and place.document_id == window.document_id and place.start <= answer < place.stop
        for place, answer in zip(places, window.places.repeat_interleave(rows.shape[1]).tolist(), strict=True)
    ]
    return losses, right, torch.tensor(hits).view(rows.shape).any(dim=1)


def bank_hash(bank: MemoryBank) -> str:
    """Return a hash of all search keys, keys and values of a bank."""
    found = hashlib.blake2b(digest_size=8)
    for layer in bank.memory_layers:
        keys = bank.search_keys(layer)
        rows = torch.arange(bank.num_chunks).expand(keys.shape[0], -1)
        for tensor in (keys, *bank.gather(layer, rows, bank.generation)):
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
