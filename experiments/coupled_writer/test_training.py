"""Training with a coupled writer: what moves, what memory holds, how a run goes on, what is refused."""

from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_runs import make_files, make_trainer, run_for, settings_of, trained_weights, without_times

from experiments.coupled_writer.training import CoupledSettings, Coupling
from longmem.backbone.capture import Backbone
from longmem.model.modeling import LongMemForCausalLM
from longmem.training import load_settings
from longmem.training.records import read_log
from longmem.training.validation import Validation


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def start_frozen(files, tmp_path):
    return lambda **overrides: make_trainer(
        files, **{"output": tmp_path / "run", "data__validation": "null", **overrides}
    )


@pytest.fixture
def start(start_frozen):
    return lambda **overrides: start_frozen(kind=CoupledSettings, extensions=[Coupling()], **overrides)


def writer_of(trainer):
    return trainer.extensions[0].writer


def backbone_weights(model):
    return {name: weight.detach().clone() for name, weight in model.backbone.named_parameters()}


def stored(trainer):
    """Return the stored keys of all lanes, in the order in which they were written."""
    banks = trainer.memories.banks
    layer = banks[0].memory_layers[0]
    rows = [torch.arange(bank.num_chunks) for bank in banks]
    heads = trainer.model.config.get_text_config().num_key_value_heads
    return [
        bank.gather(layer, row.expand(heads, -1), bank.generation)[0] for bank, row in zip(banks, rows, strict=True)
    ]


def test_the_backbone_moves_along(start):
    trainer = start()
    before = backbone_weights(trainer.model)
    for _ in range(3):
        trainer.train_step()
    after = backbone_weights(trainer.model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(writer_of(trainer).parameters)
    assert writer_of(trainer).version == 3
    assert writer_of(trainer) is trainer.model.backbone_view
    assert writer_of(trainer).parameters


@pytest.mark.slow
def test_a_step_is_one_of_adamw_over_both(start):
    """Against autograd on the whole model, with the logits of all lanes at once, and AdamW by its definition."""
    trainer = start(optimization__warmup_steps=0, writer__backbone_learning_rate=1e-2, optimization__weight_decay=0.1)
    model, wanted = copy.deepcopy(trainer.model), trainer.settings.optimization
    batch = trainer._batch(0)
    trainer.train_step()
    model(batch.input_ids, labels=batch.labels).loss.backward()
    moved = {**dict(model.side_network.named_parameters()), **model.backbone_view.parameters}
    own = dict(model.side_network.named_parameters())
    found = {**dict(trainer.model.side_network.named_parameters()), **writer_of(trainer).parameters}
    weights = {name: weight for name, weight in moved.items() if weight.grad is not None}
    norm = torch.stack([weight.grad.norm() for weight in weights.values()]).norm()
    for name, weight in weights.items():
        gradient = weight.grad * min(1.0, wanted.clip_norm / (norm.item() + 1e-6))
        rate = wanted.learning_rate if name in own else 1e-2
        decayed = weight * (1 - rate * 0.1) if weight.ndim > 1 else weight
        expected = decayed - rate * gradient / (gradient.abs() + wanted.epsilon)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=rate * 0.02)


def test_memory_holds_what_the_writer_of_each_step_computed(start):
    trainer = start(memory__tokens=64)
    model = trainer.model
    written = []
    for number in range(4):
        batch = trainer._batch(number)
        with torch.no_grad():
            keys = model.encode(batch.input_ids)[0][0]
        written.append(keys.half())
        trainer.train_step()
    assert not any(is_new for number in range(1, 4) for is_new in trainer._batch(number).is_new)
    for lane, keys in enumerate(stored(trainer)):
        expected = torch.cat([part[lane] for part in written], dim=1)
        torch.testing.assert_close(keys.flatten(1, -2), expected, rtol=2e-3, atol=2e-3)
    now = model.encode(trainer._batch(0).input_ids)[0][0]
    assert (now - written[0].float()).abs().max() > 0.05  # which is not what it would write now


@pytest.mark.slow
def test_with_an_average_memory_holds_what_the_average_computed(start):
    trainer = start(writer__average=0.9)
    for _ in range(2):
        trainer.train_step()
    batch = trainer._batch(2)
    averaged = writer_of(trainer).average.encode(batch.input_ids, trainer.model.config.memory_layers)[0][0]
    own = Backbone.encode(writer_of(trainer), batch.input_ids, trainer.model.config.memory_layers)[0][0]
    trainer.train_step()
    newest = torch.stack([keys.flatten(1, -2)[:, -16:] for keys in stored(trainer)])
    torch.testing.assert_close(newest, averaged.half(), rtol=2e-3, atol=2e-3)
    assert (averaged - own).abs().max() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"writer__average": 0.9},
        {"writer__refresh": "'bounded:max_lag=1'"},
        {"memory__start_tokens": 16, "memory__growth_steps": 4, "optimization__gradient_accumulation": 2},
        {"memory__foreign_lanes": 2, "data__at_document_border": "keep", "data__window": 8},
    ],
    ids=lambda overrides: ",".join(overrides),
)
def test_resumed_equals_uninterrupted(start, files, tmp_path, overrides):
    """One run is stopped after its first step and again after its fourth."""
    if "data__window" not in overrides:
        overrides = {**overrides, "data__validation": settings_of(files).data.validation, "validation__every_steps": 2}
    whole = start(output=tmp_path / "whole", **overrides)
    whole.run()
    parts = run_for(start(output=tmp_path / "parts", **overrides), 1)
    for steps, more in ((1, 3), (4, None)):
        resumed = start(output=tmp_path / "parts", **overrides)
        assert resumed.step == writer_of(resumed).version == steps
        assert resumed.model.encoder_fingerprint() == parts.model.encoder_fingerprint()
        parts = resumed
        resumed.run() if more is None else run_for(resumed, more)
    logs = [read_log(tmp_path / name) for name in ("parts", "whole")]
    assert without_times(logs[0].steps) == without_times(logs[1].steps)
    assert logs[0].validations == logs[1].validations
    for weights in (trained_weights, lambda trainer: backbone_weights(trainer.model)):
        expected = weights(whole)
        assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed).items())


@pytest.mark.slow
def test_banks_rebuilt_by_the_restored_writer_would_be_others(start, tmp_path):
    """Without it, the test above could not tell saved banks from rebuilt ones."""
    trainer = start(output=tmp_path / "a", writer__backbone_learning_rate=1e-2)
    for _ in range(4):
        trainer.train_step()
    saved = stored(trainer)
    trainer.memories.capacity = 0
    trainer.memories.prepare(trainer._batch(4), 4, 64, trainer._batch, trainer._states)
    rebuilt = stored(trainer)
    assert max((old - new).abs().max() for old, new in zip(saved, rebuilt, strict=True)) > 0.05


def test_with_a_policy_memory_is_no_older_than_it_allows(start, tmp_path):
    trainer = start(memory__tokens=64, writer__refresh="'bounded:max_lag=1'")
    for _ in range(4):
        trainer.train_step()
    bank = trainer.memories.banks[0]
    assert bank.freshness.refreshed.tokens > 0
    assert (
        bank.freshness.lags().values[bank._table.ledger.versions[0]].max() <= 1
    )  # of what the last step read, and what it wrote
    eager = start(output=tmp_path / "eager", memory__tokens=64, writer__refresh="eager")
    for _ in range(4):
        eager.train_step()
    eager.memories.readable(eager._batch(4))
    for number, found in enumerate(stored(eager)):
        now = [eager.model.encode(eager._batch(step).input_ids)[0][0][number] for step in range(4)]
        torch.testing.assert_close(found.flatten(1, -2), torch.cat(now, dim=1).half(), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_what_a_run_leaves_is_the_trained_model(start, files, tmp_path):
    trainer = start(data__validation=settings_of(files).data.validation, validation__every_steps=1)
    trainer.run()
    folder = tmp_path / "run"
    validations = read_log(folder).validations
    assert len({record.backbone for record in validations}) == len({record.on for record in validations}) == 6
    model = LongMemForCausalLM.from_pretrained(folder / "side-network")
    again = Validation(model, trainer.validation.texts, trainer.settings.data.window).run()
    assert again == {name: getattr(validations[-1], name) for name in ("backbone", "off", "on", "wrong")}
    assert model.tokenizer.get_vocab() == trainer.model.tokenizer.get_vocab()


def test_the_first_loss_is_that_of_a_frozen_run_and_later_ones_are_not(start, start_frozen, tmp_path):
    coupled, frozen = start(), start_frozen(output=tmp_path / "frozen")
    assert coupled.train_step().loss == frozen.train_step().loss
    assert coupled.train_step().loss != frozen.train_step().loss


@pytest.mark.slow
def test_checkpoints_hold_memories_and_the_backbone_is_saved_where_the_writer_is_coupled_alone(
    start, start_frozen, tmp_path
):
    for begin, holds in ((start_frozen, False), (start, True)):
        trainer = begin(output=tmp_path / str(holds))
        trainer.run()
        assert (trainer.checkpoints.folder / "step-6" / "extension-0" / "lane-3").exists() == holds
        assert (trainer.folder / "side-network" / "backbone").exists() == holds


@pytest.mark.slow
def test_the_script_trains_a_file_of_settings_and_goes_on_with_the_same_alone(files, tmp_path, monkeypatch, capsys):
    def run_script(average):
        AcceleratorState._reset_state(reset_partial_state=True)
        overrides = [f"output={tmp_path / 'run'}", "data.validation=null", f"writer.average={average}"]
        monkeypatch.setattr(sys, "argv", ["train.py", str(files), *overrides])
        runpy.run_path(str(Path(__file__).parent / "train.py"), run_name="__main__")

    run_script(0.9)
    assert "its moving average writes memory" in capsys.readouterr().out
    assert load_settings(tmp_path / "run" / "config.yaml", kind=CoupledSettings).writer.average == 0.9
    LongMemForCausalLM.from_pretrained(tmp_path / "run" / "side-network")
    with pytest.raises(SystemExit):
        run_script(0.99)
    assert "`writer.average` was 0.9 and is 0.99" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"features__folder": "features"}, "`features.folder` must be left out where the writer is trained"),
        ({"features__ahead": 2}, "`features.ahead` must be 0 where the writer is trained, .* got 2"),
        ({"model__backbone_dtype": "bfloat16"}, "`model.backbone_dtype` must be float32 where the writer is trained"),
        ({"writer__refresh": "egaer"}, "`writer.refresh`: .*eager"),
        ({"writer__average": 1}, r"`writer.average` must be a number above 0 and below 1"),
    ],
)
def test_refused_settings(files, overrides, message):
    with pytest.raises(ValueError, match=message):
        settings_of(files, kind=CoupledSettings, **overrides)


def test_settings_without_a_writer_are_refused(start_frozen):
    with pytest.raises(
        ValueError, match="`settings` must be CoupledSettings to couple the writer, got TrainingSettings"
    ):
        start_frozen(extensions=[Coupling()])


def test_several_processes_are_refused(start, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match="a coupled writer needs a single process, got 2"):
        start()
