"""`longmem train`: which file of settings is meant, what a run leaves, and what a wrong setting is answered with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from tiny_runs import make_files

from longmem.cli.train import CONFIGS
from longmem.settings.files import settings_file, shipped_settings
from longmem.training import load_settings

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def new_process():
    """Let accelerate forget what other runs of this process told it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_run_is_told_to_a_program_and_goes_on(config, tmp_path, run):
    short = (f"output={tmp_path / 'run'}", "optimization.warmup_steps=0")
    code, out, error = run("train", config, *short, "optimization.steps=2", "--json")
    assert code == 0, error
    result = json.loads(out)
    assert (result["step"], result["steps"], result["last_record"]["step"]) == (2, 2, 2)
    assert Path(result["side_network"], "model.safetensors").is_file()
    assert "step 2/2" in error
    code, out, error = run("train", config, *short, "optimization.steps=2", "--json")
    assert (code, json.loads(out)["last_record"]) == (0, None)
    assert "All 2 steps were done before." in error
    code, out, error = run("train", config, *short, "optimization.steps=3")
    assert (code, out) == (2, "")
    assert error.startswith("longmem: a run with checkpoints goes on with the settings it began with")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["python-manuel"], 'known: "books", "python-manual", "smollm2-books". Did you mean `python-manual`?'),
        (["none.yaml"], "got 'none.yaml', which is no file"),
        (["books"], "`data.train` must be given"),
        (["python-manual", "data.lane=4"], "Did you mean `data.lanes`?"),
        (["python-manual", "data.lanes=three"], "`data.lanes` must be an integer"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run("train", *arguments)
    assert code == 2
    assert error.startswith("longmem: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_name_of_the_package_comes_before_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("books").write_text("output: mine\n")
    assert settings_file(CONFIGS, "books") == CONFIGS / "books.yaml"
    assert settings_file(CONFIGS, "./books").read_text() == "output: mine\n"
    assert settings_file(CONFIGS, str(Path("./books").resolve())).read_text() == "output: mine\n"


@pytest.mark.parametrize("name", shipped_settings(CONFIGS))
def test_settings_of_the_package_are_whole(name):
    assert load_settings(settings_file(CONFIGS, name), ["data.train=a", "data.validation=b"]).output == f"runs/{name}"
