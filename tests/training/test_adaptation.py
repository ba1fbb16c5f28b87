from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_models import save_tiny_backbone, some_text

from longmem.memory import MemoryBank
from longmem.modeling import LongMemForCausalLM
from longmem.training import adapt, adaptable_parameters
from longmem.training.adaptation import training_windows

WINDOW = 16


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone")))


@pytest.fixture
def model(backbone_folder):
    return LongMemForCausalLM.from_backbone(backbone_folder, segment_length=WINDOW, num_retrieved_tokens=8).eval()


@pytest.fixture
def token_ids(model):
    return torch.tensor(model.tokenizer(some_text(8) * 12)["input_ids"])


def test_the_loss_goes_down_on_a_repetitive_text(model, token_ids):
    log = adapt(model, token_ids, steps=12, learning_rate=3e-3)
    losses = [entry.loss for entry in log]
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.4
    assert not model.training


def test_only_chosen_parameters_move(model, token_ids):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    chosen = {f"side_network.{name}" for name in adaptable_parameters(model)}
    adapt(model, token_ids, steps=2)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == chosen
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    reading = len(model.config.memory_layers)
    assert sum(name.endswith("memory_bias") for name in moved) == reading
    assert sum("q_proj" in name for name in moved) == reading
    assert not any("mlp" in name or "norm" in name for name in moved)


def test_a_window_reads_only_the_text_before_it(model, token_ids, monkeypatch):
    seen = []
    forward = model.forward

    def spy(ids, *, memory, **options):
        (info,) = memory.documents()
        seen.append((memory.token_ids(info.document_id), ids[0]))
        return forward(ids, memory=memory, **options)

    monkeypatch.setattr(model, "forward", spy)
    log = adapt(model, token_ids[: 6 * WINDOW], steps=3)
    assert [entry.memory_tokens for entry in log] == [3 * WINDOW, 4 * WINDOW, 5 * WINDOW]
    for number, (in_memory, window) in enumerate(seen):
        end = (3 + number) * WINDOW
        torch.testing.assert_close(in_memory, token_ids[:end], rtol=0, atol=0)
        torch.testing.assert_close(window, token_ids[end : end + WINDOW], rtol=0, atol=0)


def test_the_first_step_is_the_gradient_of_the_plain_loss(model, token_ids):
    bank = MemoryBank.for_model(model)
    model.memorize(bank, token_ids[:WINDOW], "before")
    ids = token_ids[None, WINDOW : 2 * WINDOW]
    loss = model(ids, memory=bank, labels=ids).loss
    chosen = adaptable_parameters(model)
    gradients = torch.autograd.grad(loss, list(chosen.values()))
    (entry,) = adapt(model, token_ids[: 2 * WINDOW])
    assert entry.loss == pytest.approx(loss.item(), rel=1e-6)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    assert entry.gradient_norm == pytest.approx(norm, rel=1e-4)
    assert entry.learning_rate == pytest.approx(2e-4 / 4)


def test_windows_are_the_last_of_each_document():
    first, second, short = torch.arange(70), torch.arange(100, 150), torch.arange(20)
    parts = list(training_windows([first, short, second], 16, None))
    assert [(len(before), len(windows)) for before, windows in parts] == [(16, 3), (16, 2)]
    parts = list(training_windows([first, second], 16, 2))
    assert [(len(before), len(windows)) for before, windows in parts] == [(48, 1), (32, 1)]
    torch.testing.assert_close(parts[1][1][0], second[32:48])
    again = list(training_windows([first, second], 16, 8))
    assert sum(len(windows) for _, windows in again) == 8


def test_documents_do_not_share_a_memory(model, token_ids):
    log = adapt(model, [token_ids[:48], token_ids[48:96]])
    assert [entry.memory_tokens for entry in log] == [16, 32, 16, 32]


def test_a_small_bank_keeps_the_newest_text(model, token_ids):
    log = adapt(model, token_ids[: 6 * WINDOW], steps=2, bank_capacity=2 * WINDOW)
    assert [entry.memory_tokens for entry in log] == [2 * WINDOW, 2 * WINDOW]


def test_the_log_is_one_line_per_step_and_time_can_end_it(model, token_ids, tmp_path):
    seen = []
    file = tmp_path / "log.jsonl"
    log = adapt(model, token_ids, steps=3, log_file=file, progress=lambda entry, total: seen.append((entry, total)))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["loss"] for line in lines] == [entry.loss for entry in log]
    assert seen == [(entry, 3) for entry in log]
    assert adapt(model, token_ids, steps=3, max_seconds=0.0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "`window` must be at least 2"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0"),
        ({"window": 5000}, "at least one of two windows of 5000 tokens"),
    ],
)
def test_bad_input_is_explained(model, token_ids, options, message):
    with pytest.raises(ValueError, match=message):
        adapt(model, token_ids, **options)
