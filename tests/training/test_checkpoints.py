"""Checkpoints are whole or passed over, hold nothing that runs, and go on only with what the run began with."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from killing import kill_at_any_time, kill_at_every_change
from safetensors.torch import load_file, save_file
from tiny_models import some_text
from tiny_runs import make_files, make_trainer, trained_weights

from longmem.training.checkpoints import Checkpoints

OPTIONS = {"data__validation": "null", "checkpoints__every_steps": 1, "checkpoints__keep": 3, "optimization__steps": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A run with the checkpoints of its three steps."""
    trainer = make_trainer(files, output=tmp_path_factory.mktemp("run"), **OPTIONS)
    trainer.run()
    return trainer


@pytest.fixture
def run(finished, tmp_path):
    """A copy of its folder."""
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def test_a_side_network_is_not_written_through_a_link(files, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "side-network").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="side-network' must be of its own folder alone"):
        make_trainer(files, output=tmp_path / "run", **OPTIONS)


def test_a_new_run_does_not_write_over_a_file_of_settings(files, tmp_path):
    (tmp_path / "config.yaml").write_text("# mine\n" + files.read_text())
    with pytest.raises(ValueError, match=r"config\.yaml is of none; give another"):
        make_trainer(files, output=tmp_path, **OPTIONS)
    assert (tmp_path / "config.yaml").read_text().startswith("# mine")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_holds_nothing_that_runs(files, run, tmp_path):
    newest = run / "checkpoints" / "step-3"
    assert {path.suffix for path in newest.rglob("*") if path.is_file()} == {".json", ".safetensors", ".yaml"}
    names = ["custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "pytorch_model.bin"]
    for name in names:
        (newest / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert make_trainer(files, output=run, **OPTIONS).step == 3
    assert not (tmp_path / "ran").exists()
    pickle.loads((newest / names[0]).read_bytes())  # it would have
    assert (tmp_path / "ran").exists()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(files, finished, run):
    weights = run / "checkpoints" / "step-3" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.warns(
        UserWarning, match=r"goes on from step 2, since of a newer .*step-3/model\.safetensors can't be read"
    ):
        trainer = make_trainer(files, output=run, **OPTIONS)
    assert trainer.step == 2
    trainer.run()
    expected = trained_weights(finished)
    assert all(torch.equal(each, expected[name]) for name, each in trained_weights(trainer).items())
    assert Checkpoints(run, 3).find(Accelerator()) == 3


@pytest.mark.parametrize("keep", [1, 2])
def test_newer_ones_that_are_damaged_push_no_whole_one_out(files, run, keep):
    (run / "checkpoints" / "step-3" / "progress.json").write_text("")
    (run / "checkpoints" / "step-2" / "progress.json").write_text("")
    with pytest.warns(UserWarning, match="goes on from step 1"):
        trainer = make_trainer(files, output=run, **{**OPTIONS, "checkpoints__keep": keep})
    trainer.checkpoints.last = 0
    trainer.checkpoints.save(trainer.accelerator, 1)
    assert Checkpoints(run, keep).find(Accelerator()) == 1
    trainer.checkpoints.save(trainer.accelerator, 2)
    assert Checkpoints(run, keep).find(Accelerator()) == 2
    assert trainer.checkpoints.steps() == [*range(3 - keep, 3), 3]


def test_no_changed_bit_of_a_checkpoint_passes(run):
    checkpoints, folder = Checkpoints(run, 3), run / "checkpoints" / "step-3"
    generator = torch.Generator().manual_seed(0)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for bit in torch.randint(0, 8 * len(whole), (20,), generator=generator).tolist():
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            with pytest.raises(ValueError, match="can't be read, it is damaged"):
                checkpoints._check(3)
        path.unlink()
        with pytest.raises(ValueError, match="it is missing"):
            checkpoints._check(3)
        path.write_bytes(whole)
    checkpoints._check(3)


def test_where_none_is_whole_the_run_does_not_begin_anew_in_silence(run):
    for step in (1, 2, 3):
        (run / "checkpoints" / f"step-{step}" / "progress.json").write_text("")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole.*step-3/progress\.json can't be read"):
        Checkpoints(run, 3).find(Accelerator())


def test_an_empty_configuration_of_the_run_does_not_stop_it(files, run):
    (run / "config.yaml").write_text("")  # of a full disk
    assert make_trainer(files, output=run, **OPTIONS).step == 3
    with pytest.raises(ValueError, match=r"`data\.lanes` was 4 and is 2"):
        make_trainer(files, output=run, **{**OPTIONS, "data__lanes": 2})


@pytest.mark.parametrize(("what", "name"), [("texts", "data.train"), ("backbone", "model.backbone")])
def test_a_run_does_not_go_on_with_other_texts_or_weights(files, run, tmp_path, what, name):
    moved = tmp_path / "files"
    shutil.copytree(files.parent, moved, ignore=shutil.ignore_patterns("cache", "run"))
    places = {"model__backbone": moved / "backbone", "data__train": moved / "texts", "data__cache": moved / "cache"}
    short = {"optimization__steps": 1, "optimization__warmup_steps": 0}
    options = {**OPTIONS, **places, **short, "output": tmp_path / "moved"}
    make_trainer(files, **options).run()
    assert make_trainer(files, **options).step == 1
    if what == "texts":
        (moved / "texts" / "document-0.txt").write_text(some_text(31, seed=99))
    else:
        path = moved / "backbone" / "model.safetensors"
        weights = load_file(path)
        last = sorted(weights)[-1]
        save_file({**weights, last: weights[last] + 0.01}, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=f"what `{name}` names has changed: its fingerprint was .* and is .*; put it back"
    ):
        make_trainer(files, **options)


def saving(trainer):
    """Return what saves checkpoints of ever new steps, and what checks that one is found."""
    checkpoints = trainer.checkpoints
    first = checkpoints.find(trainer.accelerator)

    def save() -> None:
        for _ in range(2):
            checkpoints.save(trainer.accelerator, checkpoints.find(trainer.accelerator) + 1)

    def check() -> None:
        step = checkpoints.find(trainer.accelerator)
        assert step >= first
        progress = json.loads((checkpoints.folder / f"step-{step}" / "progress.json").read_text())
        assert progress["step"] == step

    return save, check


@pytest.mark.parametrize("keep", [1, 3])
def test_a_killed_save_leaves_a_whole_checkpoint(files, run, keep):
    trainer = make_trainer(files, output=run, **{**OPTIONS, "checkpoints__keep": keep})
    save, check = saving(trainer)
    assert kill_at_every_change(run, save, check, every=25) > 2
    trainer.checkpoints.save(trainer.accelerator, 40)
    assert not [path.name for path in trainer.checkpoints.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_sixty_kills_lose_no_checkpoint(files, run):
    trainer = make_trainer(files, output=run, **{**OPTIONS, "checkpoints__keep": 1})
    save, check = saving(trainer)
    kill_at_any_time(save, check, kills=60, seconds=0.5)
    kill_at_every_change(run, save, check)
