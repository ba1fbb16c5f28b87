"""The training loop against one in plain torch: one lane at a time, no padding, a bank per lane that grows after a step."""

from __future__ import annotations

import copy

import pytest
import torch
from kept_fast import fast
from tiny_runs import make_files, make_trainer, trained_weights
from torch import nn

from longmem.memory import BankShards, MemoryBank

SHORT = (4, 6, 9, 13, 5, 22, 30, 7, 11, 18)  # words: documents of 1 to 8 windows, most of which end in a short window


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), SHORT)


@pytest.fixture
def start(files, tmp_path):
    def start_run(**overrides):
        return make_trainer(files, **{"data__validation": "null", "output": tmp_path / "run", **overrides})

    return start_run


class NaiveLoop:
    """What training is by its definition, for the settings of a trainer that has not begun."""

    def __init__(self, trainer):
        self.settings, self.lanes = trainer.settings, trainer.lanes
        self.model = copy.deepcopy(trainer.model)
        self.banks = [self.new_bank() for _ in range(trainer.lanes.num_lanes)]
        biases = {"memory_bias", "output_scale"}
        matrices, vectors = [], []
        for name, weight in self.model.side_network.named_parameters():
            if weight.requires_grad:
                (vectors if weight.ndim == 1 or name.split(".")[-1] in biases else matrices).append(weight)
        wanted = self.settings.optimization
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": wanted.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            betas=(wanted.beta1, wanted.beta2),
            eps=wanted.epsilon,
        )
        self.trained = matrices + vectors

    def new_bank(self):
        return MemoryBank.for_model(
            self.model, capacity_tokens=self.settings.memory.tokens, index="flat", storage_dtype="float16"
        )

    def learning_rate(self, step):
        """Return the rate of a step, counted from 1: up to the highest over the warm-up, then down in a line."""
        wanted = self.settings.optimization
        if step <= wanted.warmup_steps:
            return wanted.learning_rate * step / (wanted.warmup_steps + 1)
        return wanted.learning_rate * (wanted.steps + 1 - step) / (wanted.steps - wanted.warmup_steps)

    def readable(self, lane, document_id):
        if not self.settings.memory.enabled:
            return None
        count = self.settings.memory.foreign_lanes
        order = [self.banks[(lane + other) % len(self.banks)] for other in range(1, len(self.banks))]
        foreign = [bank for bank in order if document_id not in bank][:count]
        return BankShards([self.banks[lane], *foreign]) if foreign else self.banks[lane]

    def window(self, batch, lane):
        """Return the summed loss of a lane's window, and what the backbone made of it."""
        ids = batch.input_ids[lane : lane + 1, : batch.lengths[lane]]
        output = self.model(ids, memory=self.readable(lane, batch.document_ids[lane]), output_memory_keys=True)
        return nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="sum"), output

    def step(self, step):
        """Do one optimizer step, counted from 1; return its loss, gradient norm and number of targets."""
        accumulation = self.settings.optimization.gradient_accumulation
        batches = [self.lanes.batch(number) for number in range((step - 1) * accumulation, step * accumulation)]
        targets = sum(length - 1 for batch in batches for length in batch.lengths)
        total = 0.0
        for batch in batches:
            written = []
            for lane, bank in enumerate(self.banks):
                if batch.is_new[lane] and self.settings.data.at_document_border == "reset":
                    bank.clear()
                elif batch.is_new[lane] and batch.document_ids[lane] in bank:
                    bank.delete(batch.document_ids[lane])
            for lane in range(len(self.banks)):
                loss, output = self.window(batch, lane)
                (loss / targets).backward()
                total += loss.item() / targets
                written.append(output)
            for lane, (bank, output) in enumerate(zip(self.banks, written, strict=True)):
                put = bank.append if batch.document_ids[lane] in bank else bank.add
                keys, values = ([part[0] for part in parts] for parts in (output.memory_keys, output.memory_values))
                ids = batch.input_ids[lane, : batch.lengths[lane]]
                put(batch.document_ids[lane], keys, values, token_ids=ids)
        norm = nn.utils.clip_grad_norm_(self.trained, self.settings.optimization.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, float(norm), targets


def same_memory(bank, other):
    assert [document.document_id for document in bank.documents()] == [
        document.document_id for document in other.documents()
    ]
    for document in bank.documents():
        ids = bank.token_ids(document.document_id)
        assert ids.tolist() == other.token_ids(document.document_id).tolist()
    if bank.is_empty:
        return
    rows = torch.arange(bank.num_chunks).expand(2, -1)
    for layer in bank.memory_layers:
        for found, expected in zip(
            bank.gather(layer, rows, bank.generation), other.gather(layer, rows, other.generation), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)  # a float16 step or two


@pytest.mark.parametrize(
    "overrides",
    fast(
        2,
        [
            {"optimization__gradient_accumulation": 2},
            {"memory__foreign_lanes": 2},
            {"data__lanes_per_document": 2, "data__window": 4},
            {"model__config__lora": "{rank: 4}"},
            {},
            {"memory__enabled": "false"},
            {"data__at_document_border": "keep"},
            {"optimization__trained": "reading_attention", "optimization__clip_norm": 0.2},
            {"optimization__gradient_checkpointing": "true"},
        ],
    ),
    ids=lambda overrides: ",".join(f"{name}={value}" for name, value in overrides.items()) or "plain",
)
def test_the_loop_does_what_a_naive_one_does(start, overrides):
    trainer = start(**overrides)
    naive = NaiveLoop(trainer)
    before = trained_weights(trainer)
    mixed = 0
    for step in range(1, 7):
        record = trainer.train_step()
        loss, norm, targets = naive.step(step)
        assert record.step == step
        assert record.loss == pytest.approx(loss, rel=2e-5)
        assert record.gradient_norm == pytest.approx(norm, rel=2e-3)
        assert record.learning_rate == pytest.approx(naive.learning_rate(step))
        accumulation = trainer.settings.optimization.gradient_accumulation
        begins = trainer.lanes.batch((step - 1) * accumulation).is_new
        mixed += any(begins) and not all(begins)
        assert record.tokens == targets + 4 * accumulation
        if trainer.settings.memory.enabled:
            for bank, other in zip(trainer.memories.banks, naive.banks, strict=True):
                same_memory(bank, other)
        else:
            assert record.memory_tokens == 0
            assert record.memory_share is None
    # A document of some lane began while others went on: lanes with and without memory in one batch.
    assert mixed
    after = trained_weights(trainer)
    for name, weight in naive.model.side_network.named_parameters():
        torch.testing.assert_close(after[name], weight.detach(), rtol=0, atol=2e-4)
    moved = max(float((after[name] - before[name]).abs().max()) for name in after)
    assert moved > 2e-3  # ten times what the weights may differ by
