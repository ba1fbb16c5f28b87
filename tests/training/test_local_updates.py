"""Processes that train on their own between two averages."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from processes import run
from safetensors.torch import load_file
from tiny_runs import make_files, make_trainer, settings_of, trained_weights, without_times

from longmem.training.local_updates import LocalUpdates
from longmem.training.records import read_log

DIGESTS = "tests/training/train_and_digest.py"
NO_VALIDATION = "data.validation=null"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def accelerator_of(reduce=None, num_processes=2, kind=DistributedType.MULTI_CPU):
    return SimpleNamespace(
        num_processes=num_processes, distributed_type=kind, device=torch.device("cpu"), reduce=reduce, process_index=0
    )


def test_one_process_is_unchanged_to_the_last_bit(files, tmp_path):
    trainers = [
        make_trainer(files, output=tmp_path / str(every), data__validation="null", exchange__every_steps=every)
        for every in (0, 4)
    ]
    logs = [without_times(trainer.run()) for trainer in trainers]
    assert len(logs[0]) == 6
    assert logs[0] == logs[1]
    weights, others = map(trained_weights, trainers)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def some_optimizer(seed, with_bias):
    """AdamW after three steps; the last weight has had a gradient only in some processes, as memory biases may."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(2, 3), (4,), (2,)]]
    optimizer = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:]}], lr=0.1)
    for _ in range(3):
        for weight in weights if with_bias else weights[:-1]:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return optimizer, weights


def numbers(optimizer, weights):
    """All that is to be averaged, zeros for what is not there."""
    found = []
    for weight in weights:
        state = optimizer.state.get(weight, {})
        zeros = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        found += [weight.detach().clone(), *({**zeros, **state}[name].clone() for name in zeros)]
    return found


def test_weights_and_moments_are_means_also_where_a_process_had_no_gradient():
    optimizers = [some_optimizer(seed, with_bias=seed == 1) for seed in (1, 2)]
    expected = [
        (one + other) / 2 for one, other in zip(*(numbers(*optimizer) for optimizer in optimizers), strict=True)
    ]
    sent: list[list[torch.Tensor]] = []
    for optimizer, _ in optimizers:  # what each process would send; a mean of itself alone changes nothing
        messages = []
        accelerator = accelerator_of(lambda flat, how, messages=messages: messages.append(flat.clone()) or flat)
        LocalUpdates(accelerator, 2, 10).after_step(4, optimizer)
        sent.append(messages)
    assert [len(message) for message in sent[0]] == [len(message) for message in sent[1]] == [12, 12, 12, 3]
    for optimizer, weights in optimizers:
        places = [weight.data_ptr() for weight in weights]
        answers = iter([(one + other) / 2 for one, other in zip(*sent, strict=True)])
        LocalUpdates(accelerator_of(lambda flat, how, answers=answers: next(answers)), 2, 10).after_step(4, optimizer)
        found = numbers(optimizer, weights)
        assert all(map(torch.equal, found, expected))
        assert [weight.data_ptr() for weight in weights] == places
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()  # takes half a count of steps
        assert all(weight.isfinite().all() for weight in weights)


def test_when_processes_agree():
    sent = []
    local = LocalUpdates(accelerator_of(lambda flat, how: sent.append(1) or flat), 4, last_step=10)
    assert [step for step in range(11) if local.agree(step)] == [0, 4, 8, 10]
    optimizer, _ = some_optimizer(1, with_bias=True)
    counts = []
    for step in range(1, 11):
        local.after_step(step, optimizer)
        counts.append(len(sent))
    assert counts == [0, 0, 0, 4, 4, 4, 4, 8, 8, 12]
    assert all(LocalUpdates(accelerator_of(num_processes=1), 4, 10).agree(step) for step in range(11))


def test_a_process_that_steps_alone_has_the_mean_of_its_own_targets():
    lengths = [(16, 9, 3, 2), (16, 16, 5, 8)]
    local = LocalUpdates(accelerator_of(), 4, 10)
    assert local.loss_scale(lengths, range(2)) == 1 / (15 + 8 + 15 + 15)
    assert local.loss_scale(lengths, range(2, 4)) == 1 / (2 + 1 + 4 + 7)
    assert LocalUpdates(accelerator_of(), 0, 10).loss_scale(lengths, range(2)) == 2 / (53 + 14)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"checkpoints__every_steps": 3},
            "`checkpoints.every_steps` must be a multiple of .* got 3 and 2.* 4 would do",
        ),
        ({"validation__every_steps": 5}, "`validation.every_steps` must be a multiple .* got 5 and 2.* 6 would do"),
        ({"optimization__mixed_precision": "fp16"}, "must be 0 with `optimization.mixed_precision: fp16`, got 2"),
        ({"exchange__every_steps": -1}, "exchange.every_steps"),
    ],
)
def test_refused_settings_say_why(files, overrides, message):
    assert settings_of(files, exchange__every_steps=2, checkpoints__every_steps=4, validation__every_steps=2)
    with pytest.raises(ValueError, match=message):
        settings_of(files, **{"exchange__every_steps": 2, **overrides})


def test_a_part_of_a_network_takes_no_step_alone():
    with pytest.raises(ValueError, match="must be 0 with FSDP, got 2.*plain data parallel"):
        LocalUpdates(accelerator_of(kind=DistributedType.FSDP), 2, 10)
    LocalUpdates(accelerator_of(kind=DistributedType.FSDP), 0, 10)


def digests(folder):
    return [json.loads((folder / f"digests-{rank}.json").read_text()) for rank in (0, 1)]


def weights_of(folder):
    return load_file(folder / "side-network" / "model.safetensors")


@pytest.mark.slow
def test_processes_are_one_at_averages_and_themselves_in_between(files, tmp_path):
    codes, output = run(
        files, tmp_path / "run", 2, "exchange.every_steps=2", "optimization.steps=5", NO_VALIDATION, script=DIGESTS
    )
    assert codes == [0, 0], output
    one, other = digests(tmp_path / "run")
    same = [[mine == yours for mine, yours in zip(*step, strict=True)] for step in zip(one, other, strict=True)]
    assert same == [[False, False], [True, True], [False, False], [True, True], [True, True]]  # weights, moments
    assert [record.step for record in read_log(tmp_path / "run").steps] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_same_losses(files, tmp_path):
    settings = ["exchange.every_steps=2", "checkpoints.every_steps=4", NO_VALIDATION]
    settings += ["model.config.lora={rank: 4, dropout: 0.3}", "optimization.gradient_accumulation=2"]
    for folder in ("whole", "parts"):
        codes, output = run(files, tmp_path / folder, 2, *settings, script=DIGESTS)
        assert codes == [0, 0], output
    newest = tmp_path / "parts" / "checkpoints" / "step-6"  # a kill in step 6 leaves the checkpoint of step 4
    newest.rename(newest.with_name("later"))
    codes, output = run(files, tmp_path / "parts", 2, *settings, script=DIGESTS)
    assert codes == [0, 0], output
    whole, parts = (without_times(read_log(tmp_path / folder).steps) for folder in ("whole", "parts"))
    assert len(whole) == 6
    assert whole == parts
    assert digests(tmp_path / "parts")[1] == digests(tmp_path / "whole")[1][4:]
    weights, expected = (weights_of(tmp_path / folder) for folder in ("parts", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_plain_sgd_averaged_after_each_step_is_gradient_averaging(files, tmp_path):
    """Without clipping and with as many targets in each process: the mean of `w - r g` is `w - r (mean of g)`."""
    plain = [NO_VALIDATION, "optimization.learning_rate=0.05", "optimization.clip_norm=1e9"]
    found = {}
    for name, every, optimizer in [
        ("gradients", 0, ["sgd"]),
        ("every step", 1, ["sgd"]),
        ("every third", 3, ["sgd"]),
        ("AdamW, gradients", 0, []),
        ("AdamW, every step", 1, []),
    ]:
        codes, output = run(
            files, tmp_path / name, 2, *plain, f"exchange.every_steps={every}", *optimizer, script=DIGESTS
        )
        assert codes == [0, 0], output
        assert all(record.tokens == 4 * 16 for record in read_log(tmp_path / name).steps)  # no short window
        found[name] = weights_of(tmp_path / name)

    def difference(one, other):
        return max(float((weight - found[other][name]).abs().max()) for name, weight in found[one].items())

    assert difference("gradients", "every step") < 1e-5
    assert difference("gradients", "every third") > 1e-4
    assert difference("AdamW, gradients", "AdamW, every step") > 1e-3
