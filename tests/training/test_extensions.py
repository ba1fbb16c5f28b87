"""Extensions of a training run: when they are called, what they add, and that a stopped run goes on with them."""

from __future__ import annotations

import copy

import pytest
import torch
from kept_fast import fast
from safetensors.torch import load_file, save_file
from tiny_runs import make_files, make_trainer, trained_weights

from longmem.settings import save_settings
from longmem.training import Extension


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def start(files, tmp_path):
    return lambda *extensions, output="run", **overrides: make_trainer(
        files, extensions=extensions, output=tmp_path / output, data__validation="null", **overrides
    )


def save(trainer):
    """Save a checkpoint, as a run does that is stopped."""
    trainer.checkpoints.save(trainer.accelerator, trainer.step)
    save_settings(trainer.settings, trainer.folder / "config.yaml")


class Average(Extension):
    """Keeps the running mean of the side network's weights over all steps."""

    def start(self, run):
        self.run = run
        self.mean = {name: torch.zeros_like(weight) for name, weight in self.weights()}

    def weights(self):
        return [(name, weight.detach()) for name, weight in self.run.model.side_network.named_parameters()]

    def after_step(self):
        for name, weight in self.weights():
            self.mean[name] += (weight - self.mean[name]) / self.run.step

    def save(self, folder):
        save_file(self.mean, folder / "mean.safetensors")

    def load(self, folder):
        self.mean = load_file(folder / "mean.safetensors")


class Scale(Extension):
    """Trains a number of its own, whose gradient is 3, and lets the lanes' banks store int8."""

    def start(self, run):
        self.number = torch.nn.Parameter(torch.zeros(()))
        run.model.side_network.register_forward_hook(lambda *_: setattr(self.number, "grad", torch.tensor(3.0)))

    def parameter_groups(self):
        return [{"params": [self.number], "lr": 0.5, "weight_decay": 0.0}]

    def bank_options(self):
        return {"storage_dtype": "int8"}


def test_an_extension_sees_every_step_when_it_is_done_and_changes_nothing_by_itself(start):
    average = Average()
    trainer = start(average)
    seen = []
    for _ in range(3):
        trainer.train_step()
        seen.append(trained_weights(trainer))
    for name, mean in average.mean.items():
        torch.testing.assert_close(mean, torch.stack([weights[name] for weights in seen]).mean(dim=0))
    plain = start(output="plain")
    for expected in seen:
        plain.train_step()
        assert all(torch.equal(weight, expected[name]) for name, weight in trained_weights(plain).items())


@pytest.mark.parametrize("stopped_after", fast(1, [5, 2]))
def test_what_it_saves_is_there_when_the_run_goes_on(start, stopped_after):
    whole, part, rest = Average(), Average(), Average()
    start(whole, output="whole").run()
    trainer = start(part)
    for _ in range(stopped_after):
        trainer.train_step()
    save(trainer)
    resumed = start(rest)
    assert resumed.step == stopped_after
    resumed.run()
    for name, mean in whole.mean.items():
        assert torch.equal(rest.mean[name], mean)
        assert not torch.equal(part.mean[name], mean)


def test_several_extensions_keep_apart_what_they_save(start):
    one, other = Average(), Average()
    trainer = start(one, other)
    trainer.train_step()
    expected = copy.deepcopy(one.mean)
    for mean in other.mean.values():
        mean.zero_()
    save(trainer)
    again = Average(), Average()
    start(*again)
    assert all(torch.equal(again[0].mean[name], mean) for name, mean in expected.items())
    assert not any(mean.any() for mean in again[1].mean.values())


def test_further_parameters_are_trained_at_their_own_rate_and_banks_are_as_it_says(start):
    scale = Scale()
    trainer = start(scale, optimization__warmup_steps=0)
    trainer.train_step()
    assert scale.number.item() == pytest.approx(-0.5)  # the first step of AdamW has the size of its rate
    assert [bank.storage_dtype for bank in trainer.memories.banks] == [torch.int8] * 4
    record = trainer.train_step()
    assert record.gradient_norm >= 3  # its gradient is in the norm, and clipped with the others
    plain = start(output="plain")
    assert [bank.storage_dtype for bank in plain.memories.banks] == [torch.float16] * 4
    assert plain.train_step().gradient_norm < 3
