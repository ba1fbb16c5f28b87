"""The learned-recall check: a tiny backbone, its side network trained for seconds, questions about facts 16k tokens back.

What is trained where: the backbone learns from short windows that a key is followed by the value it had before, and is
frozen. Its side network then learns to answer from memory alone. No question, document or pair is ever used twice.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.learned_recall.task import (
    RecallTask,
    draw_document,
    draw_questions,
    draw_starts,
    draw_text,
    practice_windows,
    recalled,
    write_pairs,
)
from longmem.memory import MemoryBank
from longmem.model.modeling import LongMemForCausalLM

# (tokens of half a window, pairs in it). With three pairs and nothing else induction is learned in 200 steps; with 24 of
# them among words it was not in 1,500. So texts grow when nine in ten answers are right.
LESSONS = ((6, 3), (24, 6), (64, 12), (128, 24))
TOKENS_PER_STEP = 2048
WINDOW = 256  # of the backbone; the pairs of a document stand in its first one
NUM_PAIRS = 32
WORDS_BEFORE = 32  # a question


@dataclasses.dataclass(frozen=True)
class RecallSettings:
    """Lengths of a run: optimizer steps, and tokens between facts and questions in training and in evaluation."""

    backbone_steps: int = 1000
    side_steps: int = 200
    practice_distance: int = 1024
    distance: int = 16_384
    num_documents: int = 8


@dataclasses.dataclass(frozen=True)
class RecallResult:
    """Answers of each system, right or wrong, `questions`; seconds of the whole run and of its parts."""

    answers: dict[str, Tensor]
    seconds: dict[str, float]
    model: LongMemForCausalLM

    @property
    def accuracy(self) -> dict[str, float]:
        """Return the share of right answers of each system."""
        return {system: right.double().mean().item() for system, right in self.answers.items()}


def new_backbone(task: RecallTask, seed: int) -> LlamaForCausalLM:
    """Return an untrained Llama of two layers and one head each.

    Biases let its first layer attend to the token before whatever that is; one wide head keeps the noise of 16,000 other
    keys below the one that matches.
    """
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "max_position_embeddings": WINDOW,
    }
    no_special_tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=task.vocab_size,
            num_attention_heads=1,
            num_key_value_heads=1,
            attention_bias=True,
            initializer_range=0.05,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            **sizes,
            **no_special_tokens,
        )
    )


def train_backbone(task: RecallTask, steps: int, seed: int) -> LlamaForCausalLM:
    """Return a new backbone, trained to recall within its window."""
    backbone, generator = new_backbone(task, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = make_schedule(optimizer, steps, warmup=50)
    lesson, mastery = 0, 0.0
    for _ in range(steps):
        half, num_pairs = LESSONS[lesson]
        windows, places = practice_windows(task, TOKENS_PER_STEP // (2 * half), half, num_pairs, generator)
        output = backbone(windows, labels=windows)
        logits, values = output.logits[:, places], windows[:, places + 1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), values.flatten())
        # A tenth of the loss on every token teaches the language; before induction is there it only disturbs it.
        update(optimizer, schedule, loss if lesson == 0 else loss + 0.1 * output.loss)
        mastery = 0.9 * mastery + 0.1 * (logits.argmax(-1) == values).double().mean().item()
        if mastery > 0.9 and lesson + 1 < len(LESSONS):
            lesson, mastery = lesson + 1, 0.0
    return backbone.eval()


def add_side_network(backbone: LlamaForCausalLM, **config_fields: Any) -> LongMemForCausalLM:
    """Return the backbone with a new side network, whose upper layer reads memory.

    It starts as the backbone and gets nothing from memory (`residual="paper"`, `init="identity"`), so all that it recalls
    was learned; the default form recalls most of it untrained. A chunk is one token: longer ones, whose search key is a mean,
    recall fewer of these pairs, which stand at any alignment (`docs/experiments.md`).
    """
    fields: dict[str, Any] = {
        "residual": "paper",
        "init": "identity",
        "memory_layers": [1],
        "chunk_size": 1,
        "num_retrieved_tokens": 16,
        "segment_length": WINDOW,
    }
    return LongMemForCausalLM.from_backbone(backbone, **{**fields, **config_fields}).eval()


def memorized(model: LongMemForCausalLM, token_ids: Tensor) -> MemoryBank:
    """Return a bank that holds one document."""
    bank = MemoryBank.for_model(model)
    model.memorize(bank, token_ids, "document", batch_size=16)
    return bank


def train_side_network(
    model: LongMemForCausalLM, task: RecallTask, steps: int, distance: int, seed: int, learning_rate: float = 5e-3
) -> None:
    """Train the side network, in place: at each step the pairs of a new document, in memory alone, are all asked once.

    Args:
        model: its backbone stays as it is.
        task: what is drawn.
        steps: documents, one for each optimizer step.
        distance: tokens in memory after the pairs.
        seed: of what is drawn.
        learning_rate: after warm-up, and before it falls to zero over the last fifth.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.side_network.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = make_schedule(optimizer, steps, warmup=10)
    lanes, num_tokens = 16, 64
    model.train()
    for _ in range(steps):
        document = draw_document(task, NUM_PAIRS, WINDOW, distance, generator)
        bank = memorized(model, document.token_ids)
        keys, values = document.keys.view(lanes, -1), document.values.view(lanes, -1)
        windows = draw_text(task, lanes, num_tokens, generator)
        places = draw_starts(keys.shape[1], num_tokens, generator)
        write_pairs(windows, places, keys, values)
        labels = torch.full_like(windows, -100)
        labels[:, places + 1] = values
        update(optimizer, schedule, model(windows, memory=bank, labels=labels).loss)
    model.eval()


def score_recall(model: LongMemForCausalLM, task: RecallTask, settings: RecallSettings, seed: int) -> dict[str, Tensor]:
    """Return, for each system, which questions about all documents it answers; the wrong memory is the next document's."""
    generator = torch.Generator().manual_seed(seed)
    documents = [
        draw_document(task, NUM_PAIRS, WINDOW, settings.distance, generator) for _ in range(settings.num_documents)
    ]
    banks = [memorized(model, document.token_ids) for document in documents]
    answers: dict[str, list[Tensor]] = {"off": [], "on": [], "wrong": []}
    for document, bank, wrong in zip(documents, banks, banks[1:] + banks[:1], strict=True):
        questions = draw_questions(task, document.keys, WORDS_BEFORE, generator)
        for system, memory in (("off", None), ("on", bank), ("wrong", wrong)):
            answers[system].append(recalled(model, questions, document.values, memory))
    return {system: torch.cat(right) for system, right in answers.items()}


def check_recall(
    seed: int = 0, settings: RecallSettings | None = None, task: RecallTask | None = None, **config_fields: Any
) -> RecallResult:
    """Run the whole check from one seed: train a backbone, freeze it, train its side network, ask.

    Systems: "untrained" reads the right memory with the side network as it was made; "off", "on" and "wrong" are the
    trained one without memory, with the document's, with another document's. The documents asked about are the same.
    """
    settings, task = settings or RecallSettings(), task or RecallTask()
    seconds, start = {}, time.perf_counter()
    model = add_side_network(train_backbone(task, settings.backbone_steps, 3 * seed), **config_fields)
    seconds["backbone"] = time.perf_counter() - start
    untrained = score_recall(model, task, settings, 3 * seed + 2)["on"]
    start_side = time.perf_counter()
    train_side_network(model, task, settings.side_steps, settings.practice_distance, 3 * seed + 1)
    seconds["side network"] = time.perf_counter() - start_side
    answers = {"untrained": untrained, **score_recall(model, task, settings, 3 * seed + 2)}
    seconds["all"] = time.perf_counter() - start
    return RecallResult(answers, seconds, model)


def make_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a linear warm-up, and a linear fall to zero over the last fifth."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup, 5 * (steps - step) / steps)
    )


def update(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, loss: Tensor) -> None:
    """Take one step, with gradients clipped to norm 1."""
    loss.backward()
    nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
