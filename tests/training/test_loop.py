"""What a training run changes, what it leaves alone, what it writes, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_runs import make_files, make_trainer, settings_of, trained_weights, without_times
from torch import nn

from longmem.data.lanes import NO_LABEL
from longmem.model.modeling import LongMemForCausalLM
from longmem.training import load_settings
from longmem.training.records import read_log
from longmem.training.validation import Validation

NO_VALIDATION = {"data__validation": "null"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def start(files, tmp_path):
    return lambda **overrides: make_trainer(files, **{"output": tmp_path / "run", **NO_VALIDATION, **overrides})


def moved(trainer, steps=3):
    """Train; return the names of the side network's weights that moved and of all others."""
    before = trained_weights(trainer)
    for _ in range(steps):
        trainer.train_step()
    after = trained_weights(trainer)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    return changed, set(after) - changed


def test_the_backbone_never_changes(start):
    trainer = start()
    before = {name: weight.clone() for name, weight in trainer.model.backbone.state_dict().items()}
    changed, same = moved(trainer)
    assert changed
    assert not same
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.backbone.state_dict().items())


def test_without_memory_biases_stay(start):
    changed, same = moved(start(memory__enabled="false"))
    assert same == {name for name in changed | same if name.endswith("memory_bias")} != set()


def test_reading_attention_alone_is_trained(start):
    trainer = start(optimization__trained="reading_attention")
    reading = {
        name
        for number, layer in enumerate(trainer.model.side_network.layers)
        if layer.memory_bias is not None
        for name in trained_weights(trainer)
        if name.startswith(f"layers.{number}.layer.self_attn.") or name == f"layers.{number}.memory_bias"
    }
    changed, same = moved(trainer)
    assert changed == reading
    assert same


def test_lora_moves_adapters_and_biases_only(start):
    changed, same = moved(start(model__config__lora="{rank: 4}"))
    assert changed == {name for name in changed | same if ".lora_" in name or name.endswith("memory_bias")}
    assert same


def test_no_step_has_a_learning_rate_of_zero(start):
    trainer = start(optimization__warmup_steps=3, optimization__learning_rate=1e-3)
    rates = [trainer.train_step().learning_rate for _ in range(6)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])


def test_long_context_weights_change_gradients_and_not_the_reported_loss(start, tmp_path):
    options = {"loss__long_context_tokens": 40, "optimization__warmup_steps": 0}
    plain = start(output=tmp_path / "plain")
    weighted = start(output=tmp_path / "weighted", loss__long_context_weight=4, **options)
    first, first_weighted = plain.train_step(), weighted.train_step()
    assert without_times([first])[0]["gradient_norm"] == first_weighted.gradient_norm  # no text before: no weights
    plain.model.side_network.load_state_dict(weighted.model.side_network.state_dict())
    second, second_weighted = plain.train_step(), weighted.train_step()
    assert second_weighted.loss == second.loss
    assert second_weighted.gradient_norm != second.gradient_norm


def test_long_context_is_the_text_before_the_window(start):
    trainer = start(loss__long_context_weight=4, loss__long_context_tokens=40)
    lanes, number = trainer.lanes, 3
    batch = trainer._batch(number)
    local = trainer.features.of(batch.input_ids, batch.lengths).losses
    found = trainer._long_context_weights(number, batch, local)
    windows = [lanes.batch(step).input_ids for step in range(number + 1)]
    assert not any(lanes.batch(step).is_new[lane] for step in range(1, number + 1) for lane in range(4))
    for lane in range(4):
        text = torch.cat([window[lane] for window in windows])[-40:]
        with torch.no_grad():
            logits = trainer.model.backbone(text[None]).logits[0]
        long = nn.functional.cross_entropy(logits[:-1], text[1:], reduction="none")[-15:]
        expected = 1 + 4 * (local[lane] - long).clamp(0, 1)
        torch.testing.assert_close(found[lane], expected, rtol=1e-4, atol=1e-4)
    assert found.max() > 1.5


@pytest.mark.slow
def test_validation_leaves_training_as_it_is(start, files, tmp_path):
    text = settings_of(files).data.validation
    lora = {"model__config__lora": "{rank: 4, dropout: 0.3}"}  # draws random numbers
    plain = start(output=tmp_path / "plain", **lora)
    records = without_times(plain.run())
    plain_random = torch.get_rng_state()
    assert len(read_log(tmp_path / "plain").validations) == 0
    plain_banks = [bank.num_tokens for bank in plain.memories.banks]
    plain_weights = trained_weights(plain)
    validated = start(output=tmp_path / "often", data__validation=text, validation__every_steps=1, **lora)
    assert without_times(validated.run()) == records
    assert torch.equal(torch.get_rng_state(), plain_random)
    assert [bank.num_tokens for bank in validated.memories.banks] == plain_banks
    assert all(torch.equal(weight, plain_weights[name]) for name, weight in trained_weights(validated).items())
    assert validated.model.training
    losses = [record.on for record in read_log(tmp_path / "often").validations]
    assert len(set(losses)) == 6


def test_what_a_run_leaves_in_its_folder(start, files, tmp_path):
    trainer = start(data__validation=settings_of(files).data.validation)
    trainer.run()
    folder = tmp_path / "run"
    assert load_settings(folder / "config.yaml") == trainer.settings
    assert (folder / "curve.png").stat().st_size > 1000
    (record,) = read_log(folder).validations
    model = LongMemForCausalLM.from_pretrained(folder / "side-network")
    again = Validation(model, trainer.validation.texts, trainer.settings.data.window).run()
    assert again == {name: getattr(record, name) for name in ("backbone", "off", "on", "wrong")}
    assert len(set(again.values())) == 4


def test_changed_settings_are_refused_by_name(start):
    start().run()
    with pytest.raises(ValueError, match=r"`optimization\.steps` was 6 and is 7"):
        start(optimization__steps=7)
    assert start(checkpoints__keep=1).run() == []  # changes nothing of what is computed


def test_a_log_without_a_checkpoint_is_begun_anew(start, tmp_path):
    trainer = start()
    trainer.run()
    trainer.checkpoints.folder.rename(tmp_path / "elsewhere")
    start(optimization__steps=3).run()
    assert [record.step for record in read_log(tmp_path / "run").steps] == [1, 2, 3]


def test_only_the_newest_checkpoints_stay(start):
    trainer = start(checkpoints__every_steps=1, checkpoints__keep=2)
    trainer.run()
    assert trainer.checkpoints.steps() == [5, 6]
    assert len(list(trainer.checkpoints.folder.iterdir())) == 2


def test_records_count_text(start):
    trainer = start(optimization__steps="null", optimization__epochs=0.5, optimization__gradient_accumulation=2)
    records = trainer.run()
    per_epoch = trainer.lanes.steps_per_epoch
    assert len(records) == round(per_epoch / 4)
    for record in records:
        batches = [trainer.lanes.batch(number) for number in (2 * record.step - 2, 2 * record.step - 1)]
        assert record.tokens == sum(int((batch.labels != NO_LABEL).sum()) for batch in batches)
        assert record.epoch == record.step * 2 / per_epoch
        assert record.gain == record.backbone_loss - record.loss
        assert math.isfinite(record.gradient_norm)
    assert records[0].memory_tokens == 8  # nothing at the first window, 16 tokens at the second
    assert records[-1].epoch == pytest.approx(0.5, abs=1 / per_epoch)


def test_bf16_is_near_float32(start, tmp_path):
    exact = start(output=tmp_path / "a").train_step()
    rounded = start(output=tmp_path / "b", optimization__mixed_precision="bf16").train_step()
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)
    assert rounded.loss != exact.loss


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_fp16_without_a_gpu(start):
    with pytest.raises(ValueError, match=r"`optimization.mixed_precision` .* got 'fp16'"):
        start(optimization__mixed_precision="fp16")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__lanes": 9}, "take more documents, fewer lanes, or `lanes_per_document=3`"),
        ({"validation__memory_tokens": 5000}, "must hold at least 2 documents of 5032 tokens .* got 0"),
        ({"memory__foreign_lanes": 4}, "`memory.foreign_lanes` must be below `data.lanes`"),
    ],
)
def test_settings_that_do_not_fit_the_texts(start, files, overrides, message):
    with pytest.raises(ValueError, match=message):
        start(**{"data__validation": settings_of(files).data.validation, **overrides})


def test_a_run_that_diverges_stops_before_its_weights_are_saved(start):
    trainer = start(optimization__learning_rate=1e30, checkpoints__every_steps=1)
    with pytest.raises(ValueError, match=r"training diverged in step [23]: .* lower `optimization.learning_rate`"):
        trainer.run()
    assert trainer.checkpoints.steps()[-1] < trainer.step
    assert not (trainer.folder / "side-network").exists()
