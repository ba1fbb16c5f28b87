"""A run that was stopped goes on as if nothing had happened: losses, gradients, weights and validation to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kept_fast import fast
from rich.console import Console
from tiny_runs import make_files, make_trainer, run_for, trained_weights, without_times

from longmem.training.records import read_log

SCRIPT = Path(__file__).parents[2] / "train" / "train_longmem.py"
SHORT = (4, 6, 9, 13, 5, 22, 30, 7, 11, 18)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def short_files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("short"), SHORT)


def logged(folder):
    log = read_log(folder)
    return without_times(log.steps), [vars(record) for record in log.validations]


@pytest.mark.parametrize(
    "overrides",
    fast(
        2,
        [
            {"model__config__lora": "{rank: 4, dropout: 0.3}", "optimization__gradient_accumulation": 2},
            {"memory__foreign_lanes": 2, "memory__start_tokens": 16, "memory__growth_steps": 4},
            {"features__folder": "features", "loss__long_context_weight": 2, "loss__long_context_tokens": 40},
            {"validation__every_steps": 2},
            {"data__at_document_border": "keep", "data__window": 8, "optimization__mixed_precision": "bf16"},
            {"data__lanes_per_document": 2, "optimization__steps": "null", "optimization__epochs": 0.3},
        ],
    ),
    ids=lambda overrides: ",".join(overrides),
)
def test_resumed_equals_uninterrupted(files, short_files, tmp_path, overrides):
    """One run is stopped after its first step and again after its fourth."""
    overrides = dict(overrides)
    if "features__folder" in overrides:
        overrides["features__folder"] = tmp_path / "features"
    if overrides.get("data__window") == 8:  # documents end within the run
        files, overrides = short_files, {**overrides, "data__validation": "null"}
    whole = make_trainer(files, output=tmp_path / "whole", **overrides)
    whole.run()
    run_for(make_trainer(files, output=tmp_path / "parts", **overrides), 1)
    for stop, more in ((1, 3), (4, None)):
        assert len(logged(tmp_path / "parts")[0]) == stop
        resumed = make_trainer(files, output=tmp_path / "parts", **overrides)
        assert resumed.step == stop
        resumed.run() if more is None else run_for(resumed, more)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    weights, expected = trained_weights(resumed), trained_weights(whole)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len(logged(tmp_path / "whole")[0]) == whole.steps > 4


def test_what_is_dropped_out_is_drawn_anew_in_every_step(files, tmp_path):
    """Without it, the test above could not tell restored random numbers from none."""
    overrides = {"model__config__lora": "{rank: 4, dropout: 0.5}", "optimization__warmup_steps": 0}
    first = make_trainer(files, output=tmp_path / "a", **overrides)
    second = make_trainer(files, output=tmp_path / "b", **overrides)
    first.train_step()
    second.train_step()
    torch.rand(1)
    assert first.train_step().loss != second.train_step().loss


def test_a_stopped_run_says_how_to_go_on(files, tmp_path, capsys):
    run_for(make_trainer(files, output=tmp_path / "run"), 2)
    assert capsys.readouterr().out == ""  # silent without a console
    trainer = make_trainer(files, output=tmp_path / "run")
    trainer.console = Console(width=200)
    run_for(trainer, 1)
    assert "Stopped by SIGTERM after step 3 of 6; the same command goes on." in capsys.readouterr().out


def test_a_run_stopped_before_its_first_step_can_begin_later(files, tmp_path):
    stopped = make_trainer(files, output=tmp_path / "run", optimization__max_minutes=1e-9)
    assert stopped.run() == []
    assert len(make_trainer(files, output=tmp_path / "run").run()) == 6


def test_a_finished_run_does_nothing_more(files, tmp_path):
    make_trainer(files, output=tmp_path / "run").run()
    before = logged(tmp_path / "run")
    assert make_trainer(files, output=tmp_path / "run").run() == []
    assert logged(tmp_path / "run") == before


@pytest.mark.slow
def test_a_killed_process_goes_on(files, tmp_path):
    settings = ["optimization.steps=40", "checkpoints.every_steps=3", "validation.every_steps=5"]

    def start(folder):
        command = [sys.executable, str(SCRIPT), str(files), *settings, f"output={folder}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    killed = start(tmp_path / "killed")
    log = tmp_path / "killed" / "log.jsonl"
    while not log.is_file() or log.read_text().count("\n") < 8:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert 8 <= len(log.read_text().splitlines()) < 48
    terminated = start(tmp_path / "killed")
    while log.read_text().count("\n") < 20:
        assert terminated.poll() is None, terminated.communicate()[0]
        time.sleep(0.01)
    terminated.terminate()
    assert "Stopped by SIGTERM after step" in terminated.communicate()[0]
    assert terminated.returncode == 0
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert (tmp_path / "killed" / "checkpoints" / f"step-{last}").is_dir()
    for folder in ("killed", "whole"):
        process = start(tmp_path / folder)
        output = process.communicate()[0]
        assert process.returncode == 0, output
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    steps, validations = logged(tmp_path / "whole")
    assert [record["step"] for record in steps] == list(range(1, 41))
    assert [record["step"] for record in validations] == list(range(5, 41, 5))
